"""TRL's trainers as a stage: folder in, folder out, on our ids; their losses against the papers; what is refused.

The truth is the papers' formulas on log-probabilities of one unpadded row at a time, from transformers' plain forward.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from align import ensemble, examples, held_out, trl, trl_loop
from align.implicit import Implicit
from align.scorers import Scorer
from fledge import artifact, distributed, recipe
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.errors import InputError, Preempted, RunError
from fledge.models import language
from fledge.track import Run
from tests import launch

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]


def chat(folder, tokens, arch="llama"):
    """A tiny chat model as an artifact."""
    torch.manual_seed(0)
    sizes = language.CausalConfig(arch=arch, embed_dim=16, depth=2, num_heads=2, context_length=96)
    return artifact.write(
        folder,
        kind="chat-model",
        save=lambda at: language.save(language.build_causal(sizes, tokens), tokens, at),
        config="stage: finetune.sft\n",
        architecture={},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pairs, labelled answers and a reward in files; a tiny chat model and a tiny reward model of one tokenizer."""
    from align import reward
    from fledge.data import tokenizer

    folder = tmp_path_factory.mktemp("trl")
    pairs = [
        {"prompt": f"{a} {b}?", "chosen": NAMES[i % 3], "rejected": NAMES[3 + j % 3]}
        for i, a in enumerate(NAMES)
        for j, b in enumerate(NAMES)
    ]
    labels = [{"prompt": r["prompt"], "completion": r[side], "good": side == "chosen"}
              for r in pairs for side in ("chosen", "rejected")]  # fmt: skip
    ranked = [{"prompt": f"{a}?", "said": NAMES[:4], "scores": [2, 0.5, 2, 1]} for a in NAMES]
    for name, lines in (("pairs", pairs), ("labels", labels), ("ranked", ranked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "fancies.py").write_text(
        "def short(records, responses):\n    return [-float(len(text)) for text in responses]\n"
        "def broken(records, responses):\n    return [float('nan') for text in responses]\n"
    )
    settings = tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1)
    tokens = tokenizer.train(settings, [f"{a} {b}?" for a in NAMES for b in NAMES])
    made = chat(folder / "chat", tokens)
    chat(folder / "gpt2", tokens, "gpt2")
    seen = {"template": "chat", "tokenizer": artifact.tokenizer_digest(made.path)}
    for seed, name in enumerate(("reward", "other")):
        model = reward.build(made, tokens, seed)
        model.config.reward_offset, model.config.reward_scale = 0.1, 2.0
        artifact.write(
            folder / name, kind="reward-model", save=lambda at, model=model: language.save(model, tokens, at),
            config="stage: align.reward\n", architecture={}, preprocessing=seen,
        )  # fmt: skip
    members = {"member_1": str(folder / "reward"), "member_2": str(folder / "other")}
    both = ensemble.Config.model_validate(
        {"out": str(folder), "name": "ensemble", "parents": members, "data": files(folder, "pairs"),
         "device": "cpu", "track": {"wandb": "off"}}
    )  # fmt: skip
    ensemble.main(both).path.rename(folder / "both")
    return folder


def files(home, name, **kw):
    """A data section."""
    return {"source": "files", "path": str(home / f"{name}.jsonl"), "max_length": 48, "test_fraction": 0.2, **kw}


def settings(home, **kw):
    return trl.Config.model_validate(
        {
            "out": str(home / "runs"),
            "parents": {"policy": str(home / "chat")},
            "data": files(home, "pairs"),
            "optim": {"lr": 1e-2, "warmup": 0, "decay": "constant"},
            "train": {"batch": 4, "steps": 4, "precision": "fp32", "device": "cpu"},
            "evaluation": {"prompts": 6, "max_new_tokens": 8},
            "track": {"wandb": "off"},
            **kw,
        }
    )


def curve(made):
    return [json.loads(line) for line in (made.path.parent / "metrics.jsonl").read_text().splitlines()]


def policies(home):
    """The policy and its tokenizer."""
    chat_model = artifact.open(home / "chat")
    return language.read(chat_model), language.read_tokenizer(chat_model)


@torch.no_grad()
def logprob(model, prompt, answer):
    """log p(answer | prompt), one row, no padding, no mask."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


def noisy(model, seed):
    """The same model, its weights a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------------------ a stage

ANSWERS = {"num_generations": 2, "max_completion_length": 8}


@pytest.mark.parametrize(
    "change",
    [
        {"trainer": "dpo"},
        {"trainer": "kto"},
        {"trainer": "grpo", "reward": "fancies:short", "arguments": {**ANSWERS, "beta": 0.1}},
        {
            "trainer": "rloo", "arguments": ANSWERS, "lora": {"rank": 2}, "train": {"batch": 4, "steps": 4},  # bf16
            "rewards": [{"model": "reward"}, {"function": "fancies:short", "weight": 0.1}],
        },
    ],
    ids=lambda change: change["trainer"],
)  # fmt: skip
def test_a_trainer_is_a_stage(home, monkeypatch, change):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(home)
    parents = {"policy": str(home / "chat")}
    if change["trainer"] == "rloo":
        parents["reward"] = str(home / "reward")
    judge = {} if change["trainer"] in ("grpo", "rloo") else {"judge": "fancies:short"}
    if change["trainer"] == "kto":
        judge["data"] = files(home, "labels", label="good")
    made = trl.main(settings(home, name=change["trainer"], parents=parents, **judge, **change))

    assert made.kind == "chat-model" and set(made.parents) == set(parents)
    assert made.parents["policy"]["digest"] == artifact.open(home / "chat").digest
    assert made.manifest["data"]["trl"] and made.manifest["step"] == 4
    lines = curve(made)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and all(line["train/lr"] == 1e-2 for line in lines)
    shown = {"dpo": "train/rewards/margins", "kto": "train/kl"}.get(change["trainer"], "train/rewards/reward/mean")
    assert all(math.isfinite(line["train/loss"]) and shown in line for line in lines)
    metrics = [score["metric"] for score in made.scores]
    over = "labelled answers" if "data" in judge else "pairs"
    given = [f"implicit reward's accuracy on {over}"] if judge else []
    if "rewards" in change:
        assert all(line["train/reward_reward"] and line["train/reward_short"] for line in lines)
    named = "reward" if change["trainer"] == "rloo" or "reward" in change else "short"
    assert metrics[: len(given)] == given and len(metrics) == len(given) + 2 and made.metrics["kl"] >= 0
    assert ("trained on this reward" in made.scores[-2]["note"]) == (named == "reward")

    before = artifact.open(home / "chat").tensors()
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    assert AutoTokenizer.from_pretrained(made.path).chat_template
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, loaded.state_dict()[name])}
    if "lora" not in change:
        assert len(moved) > len(before) / 2
        return
    from peft import PeftModel

    assert moved == {n for n in before if "proj" in n}  # merged
    base = AutoModelForCausalLM.from_pretrained(home / "chat")
    adapted = PeftModel.from_pretrained(base, str(made.path / "adapter")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(adapted(ids).logits, loaded.eval()(ids).logits)


def test_what_is_not_trainable_stays_as_it_was(home):
    made = trl.main(settings(home, name="gains", trainable="norm"))
    before, after = artifact.open(home / "chat").tensors(), made.tensors()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if "norm" in n}


def test_dpo_learns_pairs_that_it_has_not_seen(home):
    """Of six names three are always right."""
    made = trl.main(settings(home, name="learns", train={"batch": 8, "steps": 10, "precision": "fp32"}))
    (score,) = made.scores
    assert score["baseline"] == 0.5 and score["low"] > 0.5
    lines = curve(made)
    assert lines[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["train/loss"] < 0.5


def test_grpo_learns_what_it_is_rewarded_for(home, monkeypatch):
    """Short answers, also to prompts that it has not seen."""
    monkeypatch.chdir(home)
    train = {"batch": 16, "steps": 30, "precision": "fp32", "device": "cpu"}
    made = trl.main(
        settings(home, name="grows", trainer="grpo", reward="fancies:short", arguments=ANSWERS, train=train)
    )
    reward, gain = made.scores
    assert gain["low"] > 0 and reward["after"] > reward["before"] and made.metrics["kl"] > 0


@pytest.fixture(scope="module")
def in_one_go(home):
    return trl.main(settings(home, name="in_one_go"))


def equal(one, other):
    theirs = other.tensors()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.tensors().items())


def test_answers_of_the_policy_come_again(home, monkeypatch):
    monkeypatch.chdir(home)
    same = {"trainer": "grpo", "reward": "fancies:short", "arguments": {**ANSWERS, "temperature": 2.0}}
    once, again = (trl.main(settings(home, name=name, **same)) for name in ("once", "again"))
    assert equal(once, again) and not equal(once, artifact.open(home / "chat"))


def test_an_interrupted_stage_begins_anew_and_leaves_no_artifact(home, in_one_go, monkeypatch):
    config, log = settings(home, name="broken_off"), Run.log

    def stopped(self, step, values):
        log(self, step, values)
        if step == 2:
            raise Preempted("stopped by SIGTERM")

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Run, "log", stopped)
        trl.main(config)
    assert not (config.run_dir / "artifact").exists() and not (config.run_dir / "checkpoints").exists()
    made = trl.main(config)
    assert [line["step"] for line in curve(made)] == [0, 1, 2, 3] and equal(made, in_one_go)


def test_two_ranks_see_the_batch_of_one(home, in_one_go, tmp_path):
    """DPO's loss is a mean over pairs, wherever they lie."""
    path = tmp_path / "config.json"
    path.write_text(settings(home, name="two_ranks").model_dump_json())
    code = f"from align.trl import *; main(Config.model_validate_json(open({str(path)!r}).read()))"
    launch.run(2, ["-c", code], timeout=400)
    two = artifact.open(home / "runs" / "two_ranks" / "artifact")
    for mine, theirs in zip(curve(in_one_go), curve(two), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- ids


def trainer_of(home, config, folder):
    """TRL's trainer as the stage builds it, and its rows."""
    distributed.setup("cpu")
    policy, tokens = policies(home)
    found = trl.read_examples(config, tokens, "train")
    args = trl_loop.told(config, folder)
    args.max_steps = 1
    with distributed.lent("no"):
        return trl_loop.build(config, args, policy, tokens, found, {}, None)


def batch_of(trainer, rows):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_trl_trains_on_our_ids(home, tmp_path, template):
    data = {"source": "files", "path": str(home / "pairs.jsonl"), "max_length": 48, "template": template}
    trainer = trainer_of(home, settings(home, data=data), tmp_path)
    _, tokens = policies(home)
    ours = Preferences(PreferencesConfig.model_validate(data), tokens, "train")
    rows = {(tuple(r["prompt_ids"]), tuple(r["chosen_ids"]), tuple(r["rejected_ids"])) for r in trainer.train_dataset}
    assert {(p + c, p + r) for p, c, r in rows} == {
        tuple(tuple(prompt + answer) for answer in answers)
        for prompt, answers in zip(ours.prompts, ours.answers, strict=True)
    }
    for prompt, chosen, _ in rows:
        assert chosen[-1] == tokens.eos_token_id and tokens.eos_token_id not in chosen[:-1]
        written = tokens.decode(prompt)
        assert written.endswith("?") if template == "plain" else tokens.decode(chosen[:-1]) in NAMES
    collated = batch_of(trainer, range(3))
    for row, (ids, mask) in enumerate(zip(collated["input_ids"], collated["attention_mask"], strict=True)):
        example, side = trainer.train_dataset[row % 3], "chosen_ids" if row < 3 else "rejected_ids"
        assert ids[mask.bool()].tolist() == example["prompt_ids"] + example[side]


def test_the_chat_template_is_what_trl_itself_would_render(home, tmp_path):
    """Where TRL can render a conversation by itself, it comes to the ids that we hand over."""
    from datasets import Dataset
    from trl import DPOTrainer

    config = settings(home)
    _, tokens = policies(home)
    found = Preferences(config.data, tokens, "train")
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in found.records]
    trainer = trainer_of(home, config, tmp_path)
    theirs = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokens, trainer.args, "train")
    ours = examples.pairs(found).columns
    # Theirs keeps what the template puts behind the end token.
    for name in ours:
        for mine, their in zip(ours[name], theirs[name], strict=True):
            end = len(their) if name == "prompt_ids" else their.index(tokens.eos_token_id) + 1
            assert mine == their[:end]
            assert not tokens.decode(their[end:]).strip()


def test_kto_rows_from_pairs_and_from_labels(home):
    _, tokens = policies(home)
    pairs = trl.read_examples(settings(home, trainer="kto"), tokens, "train")
    data = files(home, "labels", label="good")
    labels = trl.read_examples(settings(home, trainer="kto", data=data), tokens, "train")
    assert pairs.columns == labels.columns and sum(labels.columns["label"]) == len(labels) / 2
    seven = examples.Examples({"completion_ids": list("abcdefg")}, [{}] * 7, {}, "")
    rotated = examples.with_kl_answers(seven, 3).columns["KL_completion_ids"]
    assert rotated == list("cabfde") + ["g"]


def test_of_a_ranking_every_decided_pair(home):
    """Scores 2, .5, 2, 1: the first and the third are tied, and the pairs are those by hand."""
    _, tokens = policies(home)
    data = files(home, "ranked", responses="said", scores="scores", test_fraction=0.0, validation_fraction=0.0)
    found = trl.read_examples(settings(home, data=data), tokens, "train")
    said = [
        tokens.decode(ids, skip_special_tokens=True)
        for ids in (*found.columns["chosen_ids"], *found.columns["rejected_ids"])
    ]
    alpha, beta, gamma, delta = NAMES[:4]
    expected = sorted([(alpha, beta), (alpha, delta), (gamma, beta), (gamma, delta), (delta, beta)])
    for first in range(0, 30, 5):
        assert sorted(zip(said[first : first + 5], said[30 + first : 35 + first], strict=True)) == expected
    assert len(found) == 30 and found.records[0]["prompt"] == found.records[4]["prompt"]
    both = trl.read_examples(settings(home, data=data, trainer="kto"), tokens, "train").columns
    assert both["completion_ids"][::2] == found.columns["chosen_ids"] and both["label"] == [True, False] * 30


# ------------------------------------------------------------------------------------------------------------- losses


def test_dpo_is_rafailovs_equation_7(home, tmp_path):
    """-log σ(β (log π/π_ref of the chosen - log π/π_ref of the rejected))."""
    config = settings(home, arguments={"beta": 0.3})
    trainer = trainer_of(home, config, tmp_path)
    reference, _ = policies(home)
    rows = [trainer.train_dataset[i] for i in range(5)]
    batch = batch_of(trainer, range(5))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)
    policy = noisy(trainer.model, 1)
    expected = []
    for row in rows:
        ratio = {
            side: logprob(policy, row["prompt_ids"], row[side]) - logprob(reference, row["prompt_ids"], row[side])
            for side in ("chosen_ids", "rejected_ids")
        }
        expected.append(-F.logsigmoid(0.3 * (ratio["chosen_ids"] - ratio["rejected_ids"])))
    loss = trainer.compute_loss(policy, batch)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)
    implicit = Implicit(policy, reference, "fp32", 2)
    rewards = implicit.rewards([r["prompt_ids"] for r in rows], [r["chosen_ids"] for r in rows])
    truth = [logprob(policy, r["prompt_ids"], r["chosen_ids"]) - logprob(reference, r["prompt_ids"], r["chosen_ids"])
             for r in rows]  # fmt: skip
    torch.testing.assert_close(rewards, torch.stack(truth), rtol=1e-4, atol=1e-5)


def test_kto_is_ethayarajhs_equation_8(home, tmp_path):
    """λ (1 - σ(β (r - z₀))) of desirable and λ (1 - σ(β (z₀ - r))) of undesirable answers, z₀ from rotated ones."""
    config = settings(home, trainer="kto", arguments={"beta": 0.3, "desirable_weight": 1.5})
    trainer = trainer_of(home, config, tmp_path)
    reference, _ = policies(home)
    policy, rows = noisy(trainer.model, 1), [trainer.train_dataset[i] for i in range(4)]

    def ratio(row, answer):
        return logprob(policy, row["prompt_ids"], answer) - logprob(reference, row["prompt_ids"], answer)

    others = [rows[i - 1]["completion_ids"] for i in range(4)]
    assert [row["KL_completion_ids"] for row in rows] == others
    kl = torch.stack([ratio(row, other) for row, other in zip(rows, others, strict=True)]).mean().clamp(min=0)
    losses = []
    for row in rows:
        r = ratio(row, row["completion_ids"])
        losses.append(1.5 * (1 - (0.3 * (r - kl)).sigmoid()) if row["label"] else 1 - (0.3 * (kl - r)).sigmoid())
    assert {row["label"] for row in rows} == {True, False}
    loss = trainer.compute_loss(policy, batch_of(trainer, range(4)))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pairs", "ranked"])
def test_the_implicit_reward_agrees_with_held_out_preferences_as_often_as_is_said(home, name):
    """Pair by pair, one unpadded row at a time; more prompts of more answers than one forward takes."""
    fields = {"responses": "said", "scores": "scores"} if name == "ranked" else {}
    config = settings(home, data=files(home, name, test_fraction=0.6, **fields), evaluation={"pairs": 8})
    reference, tokens = policies(home)
    policy = noisy(policies(home)[0], 2)
    score = trl.agreement(config, tokens)(Implicit(policy, reference, "fp32", 3))
    data = Preferences(config.data, tokens, "test")
    chosen = held_out.sample(data, 8).ids
    right = []
    for i in chosen:
        rewards = [
            logprob(policy, data.prompts[i], a) - logprob(reference, data.prompts[i], a) for a in data.answers[i]
        ]
        ranks = data.ranks[i]
        right += [
            bool(rewards[j] > rewards[k]) for j in range(len(ranks)) for k in range(len(ranks)) if ranks[j] < ranks[k]
        ]
    assert score.after == pytest.approx(sum(right) / len(right)) and 0 < score.after < 1
    assert (score.baseline, score.before) == (0.5, None)


def test_and_with_labels(home):
    """Right is above 0 where an answer is desirable; the baseline always says the more frequent label."""
    data = files(home, "labels", label="good", test_fraction=0.5)
    config = settings(home, trainer="kto", data=data, evaluation={"pairs": 25})
    reference, tokens = policies(home)
    policy = noisy(policies(home)[0], 2)
    score = trl.agreement(config, tokens)(Implicit(policy, reference, "fp32", 4))
    some = examples.labelled(config.data, tokens, "test").shuffled(0).at(list(range(25)))
    c = some.columns
    right = [
        bool(logprob(policy, prompt, answer) - logprob(reference, prompt, answer) > 0) == label
        for prompt, answer, label in zip(c["prompt_ids"], c["completion_ids"], c["label"], strict=True)
    ]
    assert score.after == pytest.approx(sum(right) / 25) and 0 < score.after < 1
    assert score.baseline == pytest.approx(max(sum(c["label"]), 25 - sum(c["label"])) / 25)
    unmoved = trl.agreement(config, tokens)(Implicit(reference, reference, "fp32", 4))
    assert unmoved.after == 0.5  # a reward of 0 says neither


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_what_grpo_and_rloo_learn_from(home, tmp_path, monkeypatch, name):
    """Their prompts' ids are ours; rewards are our scorer's; GRPO's advantage is the reward's z-score in its group
    (Shao et al. 2024), RLOO's its lead over the others' mean (Ahmadian et al. 2024)."""
    monkeypatch.chdir(home)
    config = settings(home, trainer=name, arguments={**ANSWERS, "num_generations": 4}, reward="fancies:short")
    distributed.setup("cpu")
    policy, tokens = policies(home)
    prompts = trl.prompts_of(config, tokens, "train", 48)
    found = examples.of_prompts(prompts, tokens, config.data.template)
    ids = dict(zip(found.columns["prompt"], prompts.ids, strict=True))
    scorer = trl.build_scorer(config, {})
    seen = []

    def reward(**kw):
        given = trl.reward_function(scorer, prompts)(**kw)
        seen.append((kw["completions"], given, kw["row"], kw["completion_ids"]))
        return given

    args = trl_loop.told(config, tmp_path)
    args.max_steps = 1
    with distributed.lent("no"):
        trainer = trl_loop.build(config, args, policy, tokens, found, ids, reward)
        batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    (completions, rewards, rows, answers) = seen[0]
    prompt = trainer.train_dataset[0]
    assert rows == [prompt["row"]] * 4 and rewards == [-float(len(text)) for text in completions]
    real = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
    assert real == prompts.ids[prompt["row"]] == tokens(prompt["prompt"], add_special_tokens=False)["input_ids"]
    assert [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ] == answers
    r = torch.tensor(rewards)
    if name == "grpo":
        expected = (r - r.mean()) / (r.std() + 1e-4)
    else:
        expected = torch.stack([r[i] - torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(4)])
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_nothing(home):
    """GPT-2 has positions of its own: without them a padded row would mean something else."""
    model = language.read(artifact.open(home / "gpt2")).eval()
    ids = torch.tensor([[9, 8, 7, 6]])
    plain = model(ids).logits
    padded, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    assert (model(input_ids=padded, attention_mask=mask).logits[:, 3:] - plain).abs().max() > 1e-3
    trl_loop.pass_positions(model)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits[:, 3:], plain)


def test_a_reward_model_scores_calibrated(home, tmp_path):
    """(raw - .1) · 2 at the last token, one unpadded row at a time."""
    config = settings(home, trainer="grpo", parents={"policy": str(home / "chat"), "reward": str(home / "reward")})
    distributed.setup("cpu")
    parents = artifact.open_parents(config)
    _, tokens = policies(home)
    prompts = trl.prompts_of(config, tokens, "train", 48)
    answers = [[5, 6], [7, 8, 9, tokens.eos_token_id]]
    reward = trl.reward_function(trl.build_scorer(config, parents), prompts)
    found = reward(completions=["", ""], completion_ids=answers, row=[0, 3], log_metric=None)
    model = language.read(parents["reward"], "AutoModelForSequenceClassification").eval()
    with torch.no_grad():
        hidden = [
            model.base_model(torch.tensor([prompts.ids[i] + answer])).last_hidden_state[0, -1]
            for i, answer in zip((0, 3), answers, strict=True)
        ]
        expected = [(model.score(h).item() - 0.1) * 2.0 for h in hidden]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_sum_of_rewards_and_an_ensemble_are_scored_part_by_part(home, monkeypatch):
    monkeypatch.chdir(home)
    parents = {"policy": str(home / "chat"), "reward": str(home / "reward"), "reward_2": str(home / "both")}
    parts = [
        {"model": "reward", "weight": 2.0},
        {"model": "reward_2", "name": "two"},
        {"function": "fancies:short", "weight": -0.5},
    ]
    config = settings(home, trainer="rloo", parents=parents, rewards=parts, ensemble={"objective": "worst_case"})
    distributed.setup("cpu")
    opened = artifact.open_parents(config)
    _, tokens = policies(home)
    prompts = trl.prompts_of(config, tokens, "train", 48)
    logged = {}
    asked = {"completions": ["ab", "c"], "completion_ids": [[5, 6], [7, 8, 9]], "row": [0, 3]}
    found = trl.reward_function(trl.build_scorer(config, opened), prompts)(**asked, log_metric=logged.__setitem__)

    def alone(folder):
        one = settings(home, trainer="rloo", parents={"policy": str(home / "chat"), "reward": str(home / folder)})
        scorer = trl.build_scorer(one, artifact.open_parents(one))
        return torch.tensor(trl.reward_function(scorer, prompts)(**asked, log_metric=logged.__setitem__))

    one, other = alone("reward"), alone("other")
    expected = 2 * one + torch.minimum(one, other) - 0.5 * torch.tensor([-2.0, -1.0])
    torch.testing.assert_close(torch.tensor(found), expected)
    assert {"reward_reward", "reward_two", "reward_short", "disagreement_two"} <= set(logged)
    assert logged["reward_reward"] == pytest.approx(one.mean().item()) and logged["reward_short"] == -1.5


class Unsure(Scorer):
    """Of no opinion about the second answer."""

    def figures(self, records, texts, batch):
        return {"score": torch.tensor([1.0, math.nan])}


def test_a_reward_that_is_no_number_ends_the_run(home, monkeypatch):
    """TRL itself would leave the answer out."""
    monkeypatch.chdir(home)
    config = settings(home, name="unsure", trainer="grpo", reward="fancies:broken", arguments=ANSWERS)
    with pytest.raises(RunError, match="fancies:broken is nan for the response"):
        trl.main(config)
    assert not (home / "runs" / "unsure" / "artifact").exists()
    _, tokens = policies(home)
    prompts = trl.prompts_of(config, tokens, "train", 48)
    with pytest.raises(RunError, match="the reward is nan for the response 'b'"):
        trl.reward_function(Unsure(), prompts)(
            completions=["a", "b"], completion_ids=[[5], [6]], row=[0, 1], log_metric=None
        )


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arguments": {"bta": 0.1}}, "arguments.bta is no argument of DPOConfig; did you mean beta"),
        ({"arguments": {"learning_rate": 0.1}}, "say it as optim.lr"),
        ({"arguments": {"max_steps": 3}}, "say it as train.steps"),
        ({"arguments": {"push_to_hub": True}}, "push_to_hub is left to fledge"),
        ({"arguments": {"trust_remote_code": True}}, "left to fledge"),
        ({"arguments": {"beta": "much"}}, "'much' does not fit DPOConfig"),
        ({"arguments": {"loss_type": ["exo_pair"]}}, "Label smoothing must be greater"),
        ({"trainer": "grpo"}, "needs a reward"),
        ({"trainer": "rloo", "reward": "fancies:nothing"}, "fancies:nothing"),
        (
            {"trainer": "grpo", "reward": "fancies:short", "arguments": {"num_generations": 3}},
            "divisible by num_generations",
        ),
        (
            {"trainer": "grpo", "reward": "fancies:short", "arguments": {"num_generations": 2}},
            "560, but the parent model has 96",
        ),
        ({"train": {"batch": 4, "micro_batch": 3}}, "TRL cuts batches evenly"),
        ({"evaluation": {"max_new_tokens": 96}}, "evaluation.max_new_tokens is 98"),
        ({"train": {"batch": 400, "device": "cpu"}}, "train.batch is 400"),
        (
            {"trainer": "rloo", "reward": "fancies:short", "arguments": {**ANSWERS, "generation_batch_size": 400}},
            "400 are generated at once",
        ),
        ({"trainer": "kto", "data": {"label": "prompt"}}, "expected true or false"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(home, monkeypatch, change, words):
    monkeypatch.chdir(home)
    if "data" in change:
        change = {**change, "data": files(home, "labels", **change["data"])}
    with pytest.raises(InputError, match=words):
        trl.main(settings(home, name="refused", **change))
    assert not list((home / "runs").glob("refused*/artifact"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainer": "ppo"}, "dpo"),
        ({"reward": "fancies:short"}, "dpo learns from preferences"),
        ({"trainer": "kto", "rewards": [{"model": "reward"}]}, "kto learns from preferences"),
        ({"trainer": "grpo", "reward": "a:b", "rewards": [{"model": "reward"}]}, "both given"),
        ({"trainable": "norm("}, "no regular expression"),
        ({"trainable": "norm", "lora": {"rank": 2}}, "all of which lora freezes"),
        ({"data": {"margin": "by"}}, "data.margin: TRL's losses know no margins"),
        ({"data": {"label": "good", "source": "files"}}, "data.label is for trainer: kto"),
        ({"trainer": "kto", "data": {"label": "good"}}, "data.label is for trainer: kto"),
    ],
)
def test_contradictions_in_the_config(home, change, words):
    with pytest.raises(ValidationError, match=words):
        settings(home, **change)


def test_a_loss_that_is_not_finite_ends_the_run(home):
    wild = {"lr": 1e30, "warmup": 0, "decay": "constant", "clip": None}
    with pytest.raises(RunError, match="the loss is nan"):
        trl.main(settings(home, name="wild", optim=wild))
    assert not (home / "runs" / "wild" / "artifact").exists()


def test_what_breaks_behind_the_last_line_of_the_log_ends_the_run(home):
    wild = {"lr": 1e30, "warmup": 0, "decay": "constant", "clip": None}
    train = {"batch": 4, "steps": 3, "precision": "fp32", "device": "cpu", "log_every": 50}
    with pytest.raises(RunError, match="step 2: a parameter is not finite"):
        trl.main(settings(home, name="silent", optim=wild, train=train))
    assert not (home / "runs" / "silent" / "artifact").exists()


def test_a_loop_that_ends_early_hands_nothing_over(home, monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "train", lambda self: None)
    with pytest.raises(RunError, match="ended after 0 of 4 steps"):
        trl.main(settings(home, name="early"))
    assert not (home / "runs" / "early" / "artifact").exists()


def test_arguments_have_trls_types(home):
    config = settings(home, trainer="rloo", reward="a:b", arguments={"reward_clip_range": [-1, 1], "beta": "1e-2"})
    assert trl_loop.arguments(config) == {"reward_clip_range": (-1.0, 1.0), "beta": 0.01}


# ------------------------------------------------------------------------------------------------------------- recipe


def test_in_a_recipe_it_is_planned_run_and_reused(home, tmp_path):
    """On the world, by the YAML's own names; another argument makes another run."""
    text = f"""
stages:
  dpo:
    stage: align.trl
    set:
      trainer: dpo
      data: {{source: world, max_length: 90, portion: [0.0, 0.02]}}
      train: {{batch: 4, steps: 2, precision: fp32}}
      evaluation: {{pairs: 4, prompts: 2, max_new_tokens: 4}}
      track: {{wandb: "off"}}
    parents: {{policy: {home / "chat"}}}
"""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    out = str(tmp_path / "runs")

    def would(*overrides):
        (decision,) = recipe.decisions(recipe.load(path, overrides, out))
        return decision

    assert would().action == "run"
    made = recipe.run(path, [], out)["dpo"]
    assert would().action == "reuse" and would("dpo.train.log_every=2").action == "reuse"
    changed = would("dpo.arguments.beta=0.2")
    assert changed.action == "run" and "arguments.beta" in changed.why
    assert [score["metric"] for score in made.scores][1:] == ["gold score", "gain in gold score"]

"""Reward models: losses against closed forms, brute force and TRL; then from records to an artifact."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from align import ensemble, ppo, reward, scorers
from fledge import artifact
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.errors import InputError
from fledge.models import language, reward_model
from tests.objectives import RANKS, build

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
F64 = torch.float64

# ------------------------------------------------------------------------------------------------------ losses


def ranked(*rows):
    K = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (K - len(row))] for row in rows])


def test_equal_rewards_cost_ln_2_a_pair_and_ln_factorial_a_ranking():
    for K in (2, 4, 9):
        ranks = torch.stack([torch.randperm(K) for _ in range(5)])
        equal = torch.full((5, K), 0.3, dtype=F64)
        assert reward.pairwise_loss(equal, ranks).item() == pytest.approx(5 * math.log(2))
        expected = 5 * math.log(math.factorial(K)) / K
        assert reward.plackett_luce_loss(equal, ranks).item() == pytest.approx(expected)


def test_plackett_luce_is_a_distribution_over_rankings_and_bradley_terry_for_two():
    rewards = torch.randn(1, 4, dtype=F64)
    worth = rewards[0].exp()
    total = 0.0
    for order in itertools.permutations(range(4)):  # best first
        ranks = torch.tensor([[order.index(i) for i in range(4)]])
        found = math.exp(-4 * reward.plackett_luce_loss(rewards, ranks).item())
        drawn = math.prod((worth[i] / sum(worth[j] for j in order[place:])).item() for place, i in enumerate(order))
        assert found == pytest.approx(drawn)
        total += found
    assert total == pytest.approx(1)
    pair = rewards[:, :2]
    one, two = reward.plackett_luce_loss(pair, ranked([0, 1])), reward.pairwise_loss(pair, ranked([0, 1]))
    assert 2 * one.item() == pytest.approx(two.item())


def test_tied_answers_of_a_ranking_do_not_stand_against_each_other():
    r = torch.randn(1, 4, dtype=F64)
    a, b, c, d = r[0].tolist()
    found = reward.plackett_luce_loss(r, ranked([1, 0, 1, 2])).item()

    def least(best, *rest):
        return math.log(sum(math.exp(x) for x in (best, *rest))) - best

    assert found == pytest.approx((least(b, a, c, d) + least(a, d) + least(c, d) + 0) / 4)
    assert reward.plackett_luce_loss(r, ranked([0, 0, 0, 0])).item() == 0


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_margins_are_taken_from_the_lead(margin):
    r = torch.tensor([[1.0, 0.25], [0.5, 2.0]], dtype=F64)
    found = reward.pairwise_loss(r, ranked([0, 1], [0, 1]), torch.tensor([margin, 2 * margin], dtype=F64))
    expected = math.log1p(math.exp(-0.75 + margin)) + math.log1p(math.exp(1.5 + 2 * margin))
    assert found.item() == pytest.approx(expected)


def test_rao_and_kupper_share_out_all_probability_and_ties_pull_together():
    eta = 0.6
    for gap in (-2.0, 0.0, 0.4, 3.0):
        r = torch.tensor([[gap, 0.0]], dtype=F64, requires_grad=True)
        won, lost, tie = (reward.pairwise_loss(r, ranked(x), None, eta) for x in ([0, 1], [1, 0], [0, 0]))
        assert sum(math.exp(-x.item()) for x in (won, lost, tie)) == pytest.approx(1)
        assert math.exp(-won.item()) == pytest.approx(1 / (1 + math.exp(eta) * math.exp(-gap)))  # π_i / (π_i + θ π_j)
        (grad,) = torch.autograd.grad(tie, r)
        assert grad[0, 0].item() * gap >= 0
    assert reward.pairwise_loss(torch.randn(1, 2), ranked([0, 0])).item() == 0  # without a threshold not compared


def test_centring_is_the_mean_square_of_sums():
    r = torch.tensor([[1.0, 2.0, 4.0], [3.0, -1.0, 9.0]], dtype=F64)
    assert reward.centre_loss(r, ranked([0, 1, 2], [0, 1])).item() == pytest.approx((9 + 25 + 36) / 3 + 4)


# ------------------------------------------------------------------------------------------ objectives, whole models


def gradients(objective, batch):
    objective.zero_grad()
    found, counts = objective(batch, 0), objective.counts(batch)
    sum(objective.weights[name] * found[name] / counts[name] for name in objective.weights).backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters()]), found


def alone(batch, row, i, j):
    """Two answers of a prompt as a batch of one pair."""
    both = torch.tensor([i, j])
    return {name: batch[name][row][both][None] for name in ("input_ids", "attention_mask", "ranks")}


def test_the_gradient_of_a_ranking_is_that_of_all_its_pairs():
    """Every pair by itself, two forwards each; mean over a prompt's pairs, then over prompts."""
    objective, batch = build("reward_ranked")
    objective.tie_threshold, objective.weights["centre"] = None, 0.0
    found, _ = gradients(objective, batch)
    objective.zero_grad()
    loss = torch.zeros((), dtype=F64)
    for row, ranks in enumerate(RANKS):
        pairs = [(i, j) for i, j in itertools.permutations(range(4), 2) if 0 <= ranks[i] < ranks[j]]
        for i, j in pairs:
            pair = alone(batch, row, i, j)
            loss = loss - F.logsigmoid(reward_model.of_answers(objective.model, pair).diff().neg()).sum() / len(pairs)
    (loss / len(RANKS)).backward()
    expected = torch.cat([p.grad.flatten() for p in objective.parameters()])
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", ["reward", "reward_ranked", "reward_plackett_luce"])
def test_padding_its_id_and_the_order_of_rows_and_answers_change_nothing(name):
    objective, batch = build(name)
    truth, found = gradients(objective, batch)
    g = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(batch["ranks"]), generator=g)
    columns = torch.randperm(batch["ranks"].shape[1], generator=g)
    moved = {n: x[rows][:, columns] if x.ndim > 1 else x[rows] for n, x in batch.items()}
    wide = {**batch, **{n: F.pad(batch[n], (0, 3, 0, 2)) for n in ("input_ids", "attention_mask")}}
    wide["ranks"] = F.pad(batch["ranks"], (0, 2), value=-1)
    padding = batch["attention_mask"] == 0
    end = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 1)}  # the end token's id
    for other in (moved, wide, end):
        grads, values = gradients(objective, other)
        assert (grads - truth).norm() <= 1e-12 * truth.norm()
        for key, value in values.items():
            torch.testing.assert_close(value, found[key], rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def tokens():
    from fledge.data import tokenizer

    settings = tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1)
    return tokenizer.train(settings, [f"{a} {b}?" for a in NAMES for b in NAMES])


@pytest.mark.parametrize(("centre", "margin"), [(None, False), (0.3, True)])
def test_losses_and_gradients_are_trls(tokens, tmp_path, centre, margin):
    """RewardTrainer.compute_loss of TRL on its own collator's batch of the same ids."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    said = [("alpha beta?", "beta", "a gamma", 0.5), ("zeta?", "eta", "e", 0.0), ("gamma delta?", "delta", "da", 1.5)]
    records = [dict(zip(("prompt", "chosen", "rejected", "margin"), row, strict=True)) for row in said]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = PreferencesConfig(source="files", path=str(tmp_path / "pairs.jsonl"), validation_fraction=0.0,
                               test_fraction=0.0, margin="margin" if margin else None)  # fmt: skip
    data = Preferences(config, tokens, "train")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=1,
            initializer_range=0.3,
            **language.special_ids(tokens),
        )  # fmt: skip
    )
    args = RewardConfig(
        output_dir=str(tmp_path), center_rewards_coefficient=centre, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    text = Dataset.from_list([{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in records])
    trainer = RewardTrainer(model=model, args=args, train_dataset=text, processing_class=tokens)
    examples = []
    for prompt, (chosen, rejected), record in zip(data.prompts, data.answers, data.records, strict=True):
        more = {"margin": record["margin"]} if margin else {}
        examples.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, **more})
    theirs = trainer.compute_loss(model, trainer.data_collator(examples))
    theirs.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    objective = reward.RewardModel(model, centre or 0.0)
    found, values = gradients(objective, data.rows([0, 1, 2]))
    ours = sum(objective.weights[name] * values[name] / 3 for name in objective.weights)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert values["accuracy"].item() / 3 == pytest.approx(trainer._metrics["train"]["accuracy"][-1])


# ------------------------------------------------------------------------------------------------------ the stage


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokens):
    """Pairs, rankings and prompts of which the answer with an a is better, and a tiny chat model."""
    from fledge.data import tokenizer

    folder = tmp_path_factory.mktemp("reward")
    asked = [f"{a} {b}?" for a in NAMES for b in NAMES]
    pairs = [{"prompt": q, "chosen": f"{q[0]}a", "rejected": "be", "sure": n / 36} for n, q in enumerate(asked)]
    lists = [
        {"prompt": q, "answers": ["a", "be", "da", "zeta"][: 2 + n % 3], "grades": [3, 0, 2, 2][: 2 + n % 3]}
        for n, q in enumerate(asked)
    ]
    for name, rows in (("pairs", pairs), ("lists", lists)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "liked.py").write_text("def short(records, responses):\n    return [-len(said) for said in responses]\n")
    torch.manual_seed(0)
    sizes = language.CausalConfig(arch="llama", embed_dim=16, depth=2, num_heads=2, context_length=48)
    artifact.write(
        folder / "chat", kind="chat-model", config="stage: finetune.sft\n", architecture={},
        save=lambda at: language.save(language.build_causal(sizes, tokens), tokens, at),
        preprocessing={"tokenizer": tokenizer.digest(tokens)},
    )  # fmt: skip
    return folder


def settings(home, name="reward", file="pairs", data=None, **more):
    held = {"validation_fraction": 0.2, "test_fraction": 0.3, "max_length": 40}
    return reward.Config.model_validate(
        {
            "out": str(home / "runs"),
            "name": name,
            "parents": {"model": str(home / "chat")},
            "data": {"source": "files", "path": str(home / f"{file}.jsonl"), **held, **(data or {})},
            "optim": {"lr": 3e-3},
            "train": {"batch": 8, "steps": 12, "precision": "fp32", "device": "cpu"},
            "track": {"wandb": "off"},
            **more,
        }
    )


@pytest.fixture(scope="module")
def trained(home):
    """Two reward models of other seeds."""
    return [reward.main(settings(home, f"reward_{seed}", seed=seed)) for seed in (1, 2)]


@torch.no_grad()
def raw_of(model, sequences):
    """Each by itself, without padding, by the plain loader's own forward."""
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])


def test_calibration_survives_saving_loading_and_handing_over(home, trained, tokens):
    from transformers import AutoModelForSequenceClassification

    config = settings(home)
    train = Preferences(config.data, tokens, "train")
    best, worst = ([train.prompts[i] + train.answers[i][k] for i in range(len(train))] for k in (0, 1))
    plain = AutoModelForSequenceClassification.from_pretrained(trained[0].path).eval()
    chosen, rejected = raw_of(plain, best), raw_of(plain, worst)
    offset, scale = plain.config.reward_offset, plain.config.reward_scale
    assert abs(chosen.mean().item()) > 1e-3  # raw, so that the test can fail
    assert ((chosen - offset) * scale).mean().item() == pytest.approx(0, abs=1e-4)
    assert (torch.cat([chosen, rejected]) * scale).std().item() == pytest.approx(1, abs=1e-4)

    scorer = scorers.build(None, None, None, {"reward": trained[0]}, "fp32", None)
    rows = train.rows(list(range(len(train))))
    ids, mask = rows["input_ids"][:, 0], rows["attention_mask"][:, 0]
    batch = {"input_ids": ids, "attention_mask": mask, "response_mask": mask}  # all of it a response
    given = scorer([], [""] * len(train), batch)
    torch.testing.assert_close(given, (chosen - offset) * scale, atol=1e-5, rtol=1e-4)
    head = reward_model.calibrated_head(plain)
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(head(hidden), (plain.score(hidden) - offset) * scale)


def test_rankings_margins_and_plackett_luce_as_a_stage(home):
    lists = {"responses": "answers", "scores": "grades"}
    made = reward.main(settings(home, "lists", "lists", lists))
    assert made.kind == "reward-model" and made.scores[0]["unit"] == "prompts" and "ties" in made.metrics
    assert set(made.metrics["length"]) >= {"correlation", "longer_is_better", "longer_is_preferred"}
    other = reward.main(settings(home, "order", "lists", lists, loss="plackett_luce", head_init="zero"))
    assert other.digest != made.digest
    assert other.scores[0]["before"] == 0.5 < made.scores[0]["after"]  # a head of zeros knows nothing, which is chance
    sure = reward.main(settings(home, "sure", data={"margin": "sure"}))
    assert sum(b["n"] for b in sure.metrics["annotated_margins"]) == sure.scores[0]["n"]


def test_an_adapter_and_its_head_are_merged_and_saved_as_pefts(home):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    lora = {"rank": 2, "alpha": 4.0}
    made = reward.main(settings(home, "lora", lora=lora, optim={"lr": 0.03}))
    base = reward.build(artifact.open(home / "chat"), language.read_tokenizer(made), 0)
    merged = AutoModelForSequenceClassification.from_pretrained(made.path).eval()
    ids = torch.randint(5, 30, (3, 9))
    before = base.eval()(ids).logits
    adapted = PeftModel.from_pretrained(base, made.path / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-4)
    assert (before - merged(ids).logits).abs().max() > 0.01


def test_heads_of_the_references(home, tokens):
    chat = artifact.open(home / "chat")
    for name, std in (("normal", 1 / math.sqrt(17)), ("transformers", 0.02), ("zero", 0.0)):
        weights = torch.cat([reward.build(chat, tokens, seed, name).score.weight for seed in range(20)])
        assert weights.std().item() == pytest.approx(std, rel=0.15, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "plackett_luce", "tie_threshold": 0.5}, "tie_threshold belongs to loss: pairwise"),
        ({"loss": "plackett_luce", "data": {"margin": "sure"}}, "data.margin belongs to loss: pairwise"),
        ({"head_init": "ones"}, "head_init"),
    ],
)
def test_contradictions_in_the_config(home, change, words):
    with pytest.raises(ValidationError, match=words):
        settings(home, **change)


def test_overlong_pairs_are_reported(home, tokens, capsys):
    data = settings(home, data={"max_length": 18}).data
    kept = Preferences(data, tokens, "train")
    everything = Preferences(data.model_copy(update={"max_length": 40}), tokens, "train")
    assert kept.skipped == {"longer than max_length": len(everything) - len(kept)} and len(kept) < len(everything)
    assert f"{len(kept)} examples used; skipped: {kept.skipped['longer than max_length']} longer" in kept.report()
    with pytest.raises(InputError, match="12 are needed; skipped: .* longer than max_length"):
        Preferences(data.model_copy(update={"max_length": 8}), tokens, "train", at_least=12)


# ------------------------------------------------------------------------------------------------ ensembles and sums


def test_an_ensemble_is_a_folder_of_ordinary_reward_models(home, trained):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    parents = {f"member_{n}": str(member.path) for n, member in enumerate(trained, 1)}
    settings_ = {"data": settings(home).data.model_dump(), "device": "cpu", "out": str(home / "runs")}
    config = ensemble.Config.model_validate(
        {"parents": parents, "name": "both", "track": {"wandb": "off"}, **settings_}
    )
    made = ensemble.main(config)
    assert made.kind == "reward-ensemble" and set(made.parents) == set(parents)
    assert made.scores[0]["baseline_name"] == "the mean member" and made.metrics["disagreement"]["pairs"] > 0
    for n, member in enumerate(trained, 1):
        folder = made.path / "members" / f"member_{n}"
        loaded = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], x) for name, x in member.tensors().items())
        assert AutoTokenizer.from_pretrained(folder).eos_token
    with pytest.raises(InputError, match=r"parents.member_2 is the model of parents.member_1 once more"):
        twice = {**parents, "member_2": parents["member_1"]}
        ensemble.main(config.model_copy(update={"parents": ensemble.Parents(**twice), "name": "twice"}))


def test_generate_scores_answers(home, trained, tokens, capsys):
    """Calibrated and raw, sorted; of an ensemble the mean and the deviation; each by the plain loader's forward."""
    from transformers import AutoModelForSequenceClassification

    from fledge import cli

    answers = ["be", "aa", "zeta"]
    asked = [{"role": "user", "content": "alpha beta?"}]
    texts = [tokens.apply_chat_template([*asked, {"role": "assistant", "content": a}])["input_ids"] for a in answers]
    plain = [AutoModelForSequenceClassification.from_pretrained(member.path).eval() for member in trained]
    raw = [raw_of(model, texts) for model in plain]
    ours = torch.stack([reward_model.calibrated(m, x) for m, x in zip(plain, raw, strict=True)])
    command = ["alpha beta?", *(part for answer in answers for part in ("--answer", answer))]
    for folder, score, beside in (
        (trained[0].path, ours[0], raw[0]),
        (home / "runs/both", ours.mean(0), ours.std(0, correction=0)),
    ):
        assert cli.main(["generate", str(folder), *command]) == 0
        _, *lines = capsys.readouterr().out.strip().splitlines()
        expected = sorted(zip(score.tolist(), beside.tolist(), answers, strict=True), reverse=True)
        for line, (mean, other, answer) in zip(lines, expected, strict=True):
            found = line.split()
            assert found[2] == answer and [float(x) for x in found[:2]] == pytest.approx([mean, other], abs=6e-4)
    assert cli.main(["generate", str(trained[0].path), "alpha?"]) == 2
    assert "give --answer" in capsys.readouterr().err
    assert cli.main(["generate", str(home / "chat"), "alpha?", "--answer", "a"]) == 2
    assert "scores no answers" in capsys.readouterr().err


def fixed(**scores):
    return [scorers.FunctionScorer(lambda records, texts, x=x: x, name) for name, x in scores.items()]


def test_what_members_make_of_an_answer():
    members = fixed(a=[1.0, 0.0], b=[2.0, 0.0], c=[6.0, 0.0])
    expected = {"mean": 3.0, "worst_case": 1.0, "uncertainty_weighted": 3.0 - 0.25 * 14 / 3}
    for name, score in expected.items():
        scorer = scorers.EnsembleScorer(members, scorers.Ensemble(objective=name, coef=0.25))
        found = scorer.figures([{}, {}], ["x", "y"], {})
        assert found["score"].tolist() == pytest.approx([score, 0.0])
        assert found["disagreement"].tolist() == pytest.approx([math.sqrt(14 / 3), 0.0])


def test_a_weighted_sum_says_what_its_parts_gave():
    a, b = fixed(a=[1.0, 4.0], b=[10.0, -2.0])
    found = scorers.WeightedSum({"a": (a, 2.0), "b": (b, -0.5)}).figures([{}, {}], ["x", "y"], {})
    assert {name: x.tolist() for name, x in found.items()} == {
        "score": [-3.0, 9.0], "reward_a": [1.0, 4.0], "reward_b": [10.0, -2.0]
    }  # fmt: skip


def policy(home, **more):
    return ppo.Config.model_validate(
        {
            "out": str(home / "runs"),
            "data": {"source": "files", "path": str(home / "pairs.jsonl"), "max_length": 24, "test_fraction": 0.3},
            "rollout": {"batch": 8, "max_new_tokens": 4},
            "ppo": {"num_ppo_epochs": 1},
            "train": {"batch": 8, "steps": 2, "precision": "fp32", "device": "cpu"},
            "evaluation": {"prompts": 4},
            "track": {"wandb": "off"},
            **more,
        }
    )


def test_ppo_from_an_ensemble_and_a_function(home, monkeypatch):
    monkeypatch.chdir(home)
    assert (home / "runs/both/artifact").is_dir()
    parents = {"policy": str(home / "chat"), "reward": str(home / "runs/both/artifact")}
    rewards = [{"model": "reward", "name": "liked"}, {"function": "liked:short", "weight": 0.5}]
    made = ppo.main(policy(home, name="sum", parents=parents, rewards=rewards, ensemble={"objective": "worst_case"}))
    assert set(made.parents) == {"policy", "reward"}
    for line in map(json.loads, (home / "runs/sum/metrics.jsonl").read_text().splitlines()):
        parts = line["train/objective/reward_liked"] + 0.5 * line["train/objective/reward_short"]
        assert line["train/objective/score"] == pytest.approx(parts, abs=1e-5)
        assert line["train/objective/disagreement_liked"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": [{"model": "reward_2"}]}, "parents.reward_2, which is not given"),
        ({"rewards": [{"function": "liked:nothing"}]}, "liked:nothing"),
    ],
)
def test_parts_that_are_not_there(home, monkeypatch, change, words):
    monkeypatch.chdir(home)
    parents, value = {"policy": str(home / "chat")}, {"init": "policy", "head": "zero"}
    with pytest.raises(InputError, match=words):
        ppo.main(policy(home, name="refused", parents=parents, value=value, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": "a:b", "rewards": [{"function": "a:b"}]}, "reward and rewards are both given"),
        ({"rewards": [{"function": "a:b"}, {"function": "c:b"}]}, "two parts of rewards are called b, b"),
        ({"rewards": [{"weight": 2.0}]}, "either function"),
        ({"rewards": [{"function": "a:b", "model": "reward"}]}, "either function"),
    ],
)
def test_contradictions_among_parts(home, change, words):
    with pytest.raises(ValidationError, match=words):
        policy(home, value={"init": "policy", "head": "zero"}, **change)

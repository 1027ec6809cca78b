"""PPO as a stage: folder in, folder out, with a function and with a reward model; and the inputs that it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from align import ppo, reward
from fledge import artifact
from fledge.errors import InputError, RunError
from fledge.models import adapters

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prompts, a reward function in a file, a tiny chat model and a tiny reward model that share a tokenizer."""
    from fledge.data import tokenizer
    from fledge.models import language

    folder = tmp_path_factory.mktemp("ppo")
    lines = [f'{{"prompt": "{a} {b}?", "liked": "{a}"}}' for a in NAMES for b in NAMES]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "likes.py").write_text(
        "def first_letter(records, responses):\n"
        "    return [float(text.startswith(record['liked'][0])) for record, text in zip(records, responses)]\n"
    )
    settings = tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1)
    tokens = tokenizer.train(settings, [f"{a} {b}?" for a in NAMES for b in NAMES])
    torch.manual_seed(0)
    sizes = language.CausalConfig(arch="llama", embed_dim=16, depth=2, num_heads=2, context_length=48)
    chat = artifact.write(
        folder / "chat",
        kind="chat-model",
        save=lambda at: language.save(language.build_causal(sizes, tokens), tokens, at),
        config="stage: finetune.sft\n",
        architecture={},
        preprocessing={"tokenizer": tokenizer.digest(tokens)},
    )
    model = reward.build(chat, tokens, 0)
    model.config.reward_offset, model.config.reward_scale = 0.1, 2.0
    artifact.write(
        folder / "reward",
        kind="reward-model",
        save=lambda at: language.save(model, tokens, at),
        config="stage: align.reward\n",
        architecture={},
        preprocessing={"tokenizer": tokenizer.digest(tokens)},
    )
    return folder


def settings(home, **kw):
    return ppo.Config.model_validate(
        {
            "out": str(home / "runs"),
            "parents": {"policy": str(home / "chat")},
            "data": {"source": "files", "path": str(home / "prompts.jsonl"), "max_length": 24, "test_fraction": 0.3},
            "rollout": {"batch": 16, "max_new_tokens": 6},
            "ppo": {"num_ppo_epochs": 2},
            "train": {"batch": 8, "steps": 8, "precision": "fp32", "device": "cpu"},
            "evaluation": {"prompts": 6},
            "track": {"wandb": "off"},
            **kw,
        }
    )


def test_a_function_as_reward(home, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(home)
    value = {"init": "policy", "head": "zero"}
    made = ppo.main(settings(home, name="function", reward="likes:first_letter", value=value))
    assert made.kind == "chat-model" and set(made.parents) == {"policy"}
    scores = {score["metric"]: score for score in made.scores}
    assert set(scores) == {"reward", "gain in reward"} and scores["reward"]["before"] is not None
    gain = scores["reward"]["after"] - scores["reward"]["before"]
    assert scores["gain in reward"]["after"] == pytest.approx(gain, abs=1e-6)
    assert "trained on this reward" in scores["reward"]["note"] and made.metrics["kl"] >= 0
    before = artifact.open(home / "chat").tensors()
    after = AutoModelForCausalLM.from_pretrained(made.path).state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert len(moved) > len(before) / 2 and not any(name.startswith("value") for name in after)
    assert AutoTokenizer.from_pretrained(made.path).chat_template


def test_a_reward_model_and_a_judge(home, monkeypatch):
    monkeypatch.chdir(home)
    parents = {"policy": str(home / "chat"), "reward": str(home / "reward")}
    made = ppo.main(settings(home, name="model", parents=parents, judge="likes:first_letter"))
    assert set(made.parents) == {"policy", "reward"}
    assert [score["metric"] for score in made.scores] == ["first_letter", "gain in first_letter"]
    assert "trained on" not in made.scores[0]["note"]
    lines = (home / "runs" / "model" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8 and '"train/objective/kl"' in lines[0]


def test_a_parent_judges_that_reads_other_tokens(home):
    """Its head says nothing, so that by its calibration every answer is worth (0 - 0.1) * 2."""
    from fledge.data import tokenizer
    from fledge.models import language

    letters = tokenizer.TokenizerConfig(kind="char", vocab_size=48, min_frequency=1)
    tokens = tokenizer.train(letters, ["abcdefghijklmnopqrstuvwxyz? and others"])
    sizes = language.CausalConfig(arch="llama", embed_dim=16, depth=1, num_heads=2, context_length=16)
    parts = {"config": "", "architecture": {}, "preprocessing": {"tokenizer": tokenizer.digest(tokens)}}
    untaught = language.build_causal(sizes, tokens)
    base = artifact.write(home / "base", kind="causal-lm", save=lambda at: language.save(untaught, tokens, at), **parts)
    model = reward.build(base, tokens, 0, head_init="zero")
    model.config.reward_offset, model.config.reward_scale = 0.1, 2.0
    artifact.write(home / "judge", kind="reward-model", save=lambda at: language.save(model, tokens, at), **parts)

    parents = {"policy": str(home / "chat"), "reward": str(home / "reward"), "judge": str(home / "judge")}
    made = ppo.main(settings(home, name="judged", parents=parents))
    assert set(made.parents) == {"policy", "reward", "judge"}
    assert [score["metric"] for score in made.scores] == ["judge's reward", "gain in judge's reward"]
    assert made.scores[0]["before"] == made.scores[0]["after"] == pytest.approx(-0.2)
    assert "trained on" not in made.scores[0]["note"]
    assert '"train/objective/score"' in (home / "runs" / "judged" / "metrics.jsonl").read_text()

    with pytest.raises(InputError, match="parents.judge is parents.reward, which PPO is trained on"):
        ppo.main(settings(home, name="same", parents={**parents, "judge": parents["reward"]}))
    with pytest.raises(ValidationError, match="judge and parents.judge are both given"):
        settings(home, name="both", parents=parents, judge="likes:first_letter")


def test_the_frontier_is_watched(home, monkeypatch):
    """Judge and reward are asked of the same answers; at the first look the policy is still its reference."""
    (home / "both.py").write_text(
        "heard = {'judge': [], 'reward': []}\n"
        "def judge(records, texts):\n"
        "    heard['judge'].append(texts)\n"
        "    return [float(len(text)) for text in texts]\n"
        "def reward(records, texts):\n"
        "    heard['reward'].append(texts)\n"
        "    return [float(text.count('a')) for text in texts]\n"
    )
    monkeypatch.chdir(home)
    data = {"source": "files", "path": str(home / "prompts.jsonl"), "max_length": 24, "test_fraction": 0.3}
    made = settings(
        home, name="watched", reward="both:reward", judge="both:judge", optim={"lr": 0.1, "decay": "constant"},
        data={**data, "validation_fraction": 0.3}, value={"init": "policy", "head": "zero", "warmup": 4},
        train={"batch": 8, "steps": 8, "precision": "fp32", "device": "cpu", "eval_every": 4},
    )  # fmt: skip
    ppo.main(made)
    heard = __import__("both").heard
    lines = [json.loads(line) for line in (home / "runs" / "watched" / "metrics.jsonl").read_text().splitlines()]
    points = [line for line in lines if "eval/kl" in line]
    assert [line["step"] for line in points] == [3, 7]
    assert points[0]["eval/kl"] == pytest.approx(0, abs=1e-6) and points[1]["eval/kl"] > 1e-4
    for line, texts in zip(points, heard["judge"][1:], strict=False):  # the first: does it work?
        assert texts in heard["reward"]
        assert line["eval/score"] == pytest.approx(sum(map(len, texts)) / len(texts), rel=1e-6)
        assert line["eval/reward"] == pytest.approx(sum(t.count("a") for t in texts) / len(texts), rel=1e-6)


VALUE = {"init": "policy", "head": "zero"}


def rank(home: str, name: str, reward: str) -> None:
    """The stage on one of several ranks."""
    os.chdir(home)
    ppo.main(settings(Path(home), name=name, reward=reward, judge="counts:letters", value=VALUE, optim={"lr": 1e-3}))


def test_two_ranks_answer_learn_and_judge_as_one_does(home, forks, tmp_path, monkeypatch):
    """The same answers, figures and weights; and each held-out prompt is judged by one of them, not by each."""
    (home / "counts.py").write_text(
        "import os, pathlib\n"
        "def letters(records, responses):\n"
        "    with pathlib.Path(f\"judged-{os.environ.get('RANK', 'alone')}\").open('a') as file:\n"
        "        file.writelines(record['prompt'][-1]['content'] + '\\n' for record in records)\n"
        "    return [float(len(text)) for text in responses]\n"
    )
    monkeypatch.chdir(home)
    rank(str(home), "one_rank", "likes:first_letter")
    args = {"home": str(home), "name": "two_ranks", "reward": "likes:first_letter"}
    forks.start("tests.align.test_ppo_stage:rank", args, world=2, folder=tmp_path).wait(timeout=120)
    one, two = (artifact.open(home / "runs" / name / "artifact") for name in ("one_rank", "two_ranks"))
    for mine, theirs in zip(two.scores, one.scores, strict=True):
        assert mine == {k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in theirs.items()}
    assert two.metrics["kl"] == pytest.approx(one.metrics["kl"], rel=1e-3) and one.metrics["kl"] > 1e-4
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(two.tensors()[name], tensor, rtol=1e-3, atol=1e-5)
    curves = [
        [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one_rank", "two_ranks")
    ]
    for mine, theirs in zip(*curves, strict=True):
        for name in [name for name in mine if "objective/" in name or name.startswith("train/value")]:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)
    judged = {who: (home / f"judged-{who}").read_text().splitlines() for who in ("alone", "0", "1")}
    assert len(judged["0"]) == len(judged["1"]) == len(judged["alone"]) / 2
    assert sorted(judged["0"] + judged["1"]) == sorted(judged["alone"])


def test_a_reward_that_fails_on_one_rank_ends_all_with_its_error(home, forks, tmp_path):
    (home / "partly.py").write_text(
        "import os\n"
        "def fails(records, responses):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('liked')\n"
        "    return [0.0] * len(responses)\n"
    )
    args = {"home": str(home), "name": "fails", "reward": "partly:fails"}
    job = forks.start("tests.align.test_ppo_stage:rank", args, world=2, folder=tmp_path).wait(timeout=60, check=False)
    assert all(job.codes)
    for log in ("rank0.log", "rank1.log"):
        assert "the reward partly:fails" in (tmp_path / log).read_text()


def moved_by(home, made):
    before, after = artifact.open(home / "chat").tensors(), made.tensors()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_only_what_is_trainable_moves(home, monkeypatch):
    monkeypatch.chdir(home)
    value = {"init": "policy", "head": "zero"}
    made = ppo.main(settings(home, name="norms", reward="likes:first_letter", value=value, trainable="norm"))
    assert moved_by(home, made) == {name for name in made.tensors() if "norm" in name}
    curve = [json.loads(line) for line in (home / "runs" / "norms" / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["train/value_loss"] != curve[0]["train/value_loss"]  # freezing the policy leaves the value free


def test_the_value_learns_alone_while_it_warms_up(home, monkeypatch):
    """The policy has only the last update, at which the rate is not yet 0; its optimiser has counted one step."""
    monkeypatch.chdir(home)
    value = {"init": "policy", "head": "zero", "warmup": 7}
    steps = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kw):
        found = original(self, *args, **kw)
        steps.append([int(self.state[group["params"][0]].get("step", 0)) for group in self.param_groups])
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    made = ppo.main(settings(home, name="warm", reward="likes:first_letter", value=value))
    assert steps == [[0, n] for n in range(1, 8)] + [[1, 8]] and moved_by(home, made)
    curve = [json.loads(line) for line in (home / "runs" / "warm" / "metrics.jsonl").read_text().splitlines()]
    assert {line["train/objective/kl"] for line in curve} == {0.0}  # all rollouts are the reference's


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_average_of_the_weights_is_what_is_handed_over(home, monkeypatch, lora):
    """The recursion over what each update left, of the policy alone; training goes on without it."""
    monkeypatch.chdir(home)
    after: list[dict[str, torch.Tensor]] = []
    policy: list[torch.nn.Module] = []
    plain_step, plain_init = torch.optim.AdamW.step, ppo.PPO.__init__

    def init(self, model, *args, **kw):
        plain_init(self, model, *args, **kw)
        policy[:] = [model]

    def step(self, *args, **kw):
        if not after:
            after.append({name: p.detach().clone() for name, p in policy[0].named_parameters()})
        found = plain_step(self, *args, **kw)
        after.append({name: p.detach().clone() for name, p in policy[0].named_parameters()})
        return found

    monkeypatch.setattr(ppo.PPO, "__init__", init)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    value = {"init": "policy", "head": "zero"}
    given = {"reward": "likes:first_letter", "value": value, "optim": {"lr": 1e-2}, "lora": lora}
    made = ppo.main(settings(home, name=f"average_{bool(lora)}", ppo={"num_ppo_epochs": 2, "ema": 0.7}, **given))
    assert len(after) == 9
    average = after[0]
    for weights in after[1:]:
        average = {name: 0.7 * average[name] + 0.3 * weights[name] for name in average}
    found = made.tensors()
    if lora:
        average = {name.replace(".policy.", "."): x for name, x in average.items() if ".policy." in name}
        adapter = load_file(made.path / adapters.FOLDER / "adapter_model.safetensors")
        found = {name.removeprefix("base_model.model."): x for name, x in adapter.items()}
        after[-1] = {name.replace(".policy.", "."): x for name, x in after[-1].items()}
        assert set(found) == set(average)
    for name, tensor in average.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, after[-1][name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": {"init": "policy", "head": "zero"}}, "needs a reward"),
        ({"reward": "likes:first_letter", "value": {"init": "policy", "head": "zero", "warmup": 8}}, "none of the 8"),
        ({"reward": "likes:first_letter", "value": {"init": "policy", "head": "zero"}, "trainable": "nrom"}, "nrom"),
        ({"reward": "likes:first_letter"}, "value.init is reward"),
        ({"reward": "likes:nothing", "value": {"init": "policy", "head": "zero"}}, "likes:nothing"),
        ({"rollout": {"batch": 16, "max_new_tokens": 40}}, "48 positions"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(home, monkeypatch, change, words):
    monkeypatch.chdir(home)
    with pytest.raises(InputError, match=words):
        ppo.main(settings(home, name="refused", **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"judge": "broken:judge"}, "broken:judge"),
        ({"judge": "likes:nothing"}, "likes:nothing"),
        ({"evaluation": {"split": "validation"}}, "the validation data has 0 usable examples"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_training(home, monkeypatch, change, words):
    (home / "broken.py").write_text("def judge(records, texts):\n    return [float('nan')] * len(texts)\n")
    monkeypatch.chdir(home)
    data = {"source": "files", "path": str(home / "prompts.jsonl"), "max_length": 24, "test_fraction": 0.3}
    given = settings(
        home, name="ends", reward="likes:first_letter", value=VALUE, data={**data, "validation_fraction": 0.0}, **change
    )
    with pytest.raises((InputError, RunError), match=words):
        ppo.main(given)
    assert not (home / "runs/ends/metrics.jsonl").read_text()


def test_parents_of_another_template_are_refused(home, monkeypatch):
    monkeypatch.chdir(home)
    data = {"source": "files", "path": str(home / "prompts.jsonl"), "max_length": 24, "template": "plain"}
    chat = artifact.open(home / "chat")
    told = artifact.write(
        home / "told",
        kind="chat-model",
        save=lambda at: [shutil.copy(file, at) for file in chat.path.iterdir() if file.name != "manifest.json"],
        config="stage: finetune.sft\n",
        architecture={},
        preprocessing={**chat.preprocessing, "template": "chat"},
    )
    given = {"reward": "likes:first_letter", "value": VALUE, "parents": {"policy": str(told.path)}}
    with pytest.raises(InputError, match="told .chat-model. was trained with chat; set data.template: chat"):
        ppo.main(settings(home, name="other", data=data, **given))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kl": {"coef": 0.0, "target": 6.0}}, "kl.coef is 0"),
        (
            {"parents": {"policy": "a", "reward": "b"}, "reward": "likes:it", "value": VALUE},
            "parents.reward is given",
        ),
        ({"parents": {"policy": "a", "reward": "b", "reward_2": "c"}}, "parents.reward_2 is given"),
        ({"rollout": {"batch": 12}}, "not a multiple of train.batch"),
        ({"value": {"init": "policy"}}, "value.head is reward"),
        ({"rollout": {"temperature": 0.0}}, "greater than 0"),
        ({"trainable": "norm("}, "no regular expression"),
    ],
)
def test_contradictions_in_the_config(home, change, words):
    with pytest.raises(ValidationError, match=words):
        settings(home, **change)


def test_defaults_are_the_published_recipe():
    """Huang et al. 2024, TL;DR: https://arxiv.org/abs/2403.17031, and the table of its code's arguments."""
    c = ppo.Config()
    assert (c.rollout.batch, c.train.batch, c.ppo.num_ppo_epochs) == (512, 512, 4)
    assert (c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.missing_eos_penalty) == (53, 0.7, 1.0)
    assert (c.rollout.missing_eos, c.kl.coef, c.kl.estimator, c.kl.target) == ("replace", 0.05, "k1", None)
    assert (c.ppo.cliprange, c.ppo.cliprange_value, c.ppo.vf_coef, c.ppo.gamma, c.ppo.gae_lambda) == (
        0.2,
        0.2,
        0.1,
        1,
        0.95,
    )
    assert (c.ppo.whiten_rewards, c.ppo.unbiased_whitening, c.value.init, c.value.head) == (
        False,
        False,
        "reward",
        "reward",
    )
    assert (c.optim.lr, c.optim.eps, c.optim.clip, c.optim.decay, c.optim.min_lr) == (3e-6, 1e-5, None, "linear", 0.0)
    assert c.train.steps * c.train.batch // c.ppo.num_ppo_epochs == pytest.approx(1_000_000, rel=1e-3)


ONE_TRUNK = {"lora": {"rank": 2}, "value": {"init": "policy", "head": "zero"}}


def test_the_stage_hands_over_merged_weights_and_the_adapter(home, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(home)
    given = settings(home, name="lora", reward="likes:first_letter", optim={"lr": 1e-2}, **ONE_TRUNK)
    made = ppo.main(given)
    curve = [json.loads(line) for line in (home / "runs" / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert curve[0]["train/objective/kl"] == 0 and curve[-1]["train/objective/kl"] > 0
    chat = artifact.open(home / "chat")
    assert set(made.tensors()) == set(chat.tensors())
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = AutoModelForCausalLM.from_pretrained(made.path)
    beside = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(chat.path), str(made.path / adapters.FOLDER)
    )
    torch.testing.assert_close(merged(ids).logits, beside(ids).logits)
    assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained(chat.path)(ids).logits)
    assert made.architecture["parameters"] == sum(p.numel() for p in merged.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainable": "norm"}, "use one of the two"),
        ({"value": {}}, "value.init is reward"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout is 0.1"),
    ],
)
def test_what_adapters_exclude(home, change, words):
    with pytest.raises(ValidationError, match=words):
        settings(home, **{**ONE_TRUNK, **change})

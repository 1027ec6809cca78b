"""Two models side by side: the report against counting its own rows, judges of both forms, and what is refused."""

import json

import numpy as np
import pytest
import torch

from align import compare as module
from align import reward
from align.compare import compare
from fledge import artifact, cli
from fledge.errors import InputError, RunError
from fledge.report import comparison

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
JUDGES = """
import math

def count(records, answers):
    return [float(a.count("a")) for a in answers]

def longer(records, first, second):
    return [(len(b) > len(a)) - (len(b) < len(a)) for a, b in zip(first, second)]

def likes_the_second(records, first, second):
    return [1.0] * len(first)

def leans(records, first, second):
    return [0.25 if len(a) == len(b) else (0.75 if len(b) > len(a) else -0.25) for a, b in zip(first, second)]

def nan(records, first, second):
    return [math.nan] * len(first)

def far(records, first, second):
    return [2.0] * len(first)

def short(records, first, second):
    return [0.0]

def words(records, first, second):
    return ["b"] * len(first)

def nothing(records, first, second):
    return None

def raises(records, answers):
    return records[0]["no such field"]

def nan_scores(records, answers):
    return [math.nan] * len(answers)
"""


def chat(folder, tokens, seed, positions=48):
    from fledge.data import tokenizer
    from fledge.models import language

    torch.manual_seed(seed)
    sizes = language.CausalConfig(arch="llama", embed_dim=16, depth=2, num_heads=2, context_length=positions)
    return artifact.write(
        folder, kind="chat-model", config="stage: finetune.sft\n", architecture={},
        save=lambda at: language.save(language.build_causal(sizes, tokens), tokens, at),
        preprocessing={"tokenizer": tokenizer.digest(tokens), "template": "chat"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two tiny chat models and a reward model of one tokenizer, a third of another, prompts, and judges."""
    from fledge.data import tokenizer
    from fledge.models import language

    folder = tmp_path_factory.mktemp("compare")
    prompts = [f"{a} {b}?" for a in NAMES for b in NAMES]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts) + "\n")
    (folder / "judges.py").write_text(JUDGES)
    settings = tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1)
    tokens = tokenizer.train(settings, prompts)
    first = chat(folder / "a", tokens, 0)
    chat(folder / "b", tokens, 1)
    chat(folder / "other", tokenizer.train(settings, [*prompts, "0123456789"]), 2, positions=32)
    model = reward.build(first, tokens, 0)
    artifact.write(
        folder / "reward", kind="reward-model", config="stage: align.reward\n", architecture={},
        save=lambda at: language.save(model, tokens, at), preprocessing={"tokenizer": tokenizer.digest(tokens)},
    )  # fmt: skip
    return folder


@pytest.fixture
def ask(home, monkeypatch):
    monkeypatch.chdir(home)

    def asked(a="a", b="b", judge="judges:count", **changes):
        return compare(a, b, judge=judge, data="prompts.jsonl", max_new_tokens=8, **changes)

    return asked


def test_the_report_is_what_its_rows_say(ask):
    found = ask()
    rows = found["rows"]
    assert found["n"] == len(rows) == 36 and found["unit"] == "prompts"
    assert all(row["score a"] == row["a"].count("a") and row["score b"] == row["b"].count("a") for row in rows)
    wins = sum(row["score b"] > row["score a"] for row in rows)
    ties = sum(row["score b"] == row["score a"] for row in rows)
    assert wins and ties and (found["win"]["wins"], found["win"]["ties"]) == (wins, ties)
    assert found["win"]["rate"] == pytest.approx((wins + ties / 2) / 36)
    assert found["score"]["difference"] == pytest.approx(np.mean([row["score b"] - row["score a"] for row in rows]))
    assert found["length"]["a"] == np.mean([len(row["a"]) for row in rows])
    assert found["kl"] > 0 and json.loads(json.dumps(found)) == found
    differ = [row["a"] != row["b"] for row in rows]
    assert differ == sorted(differ, reverse=True)


def test_a_model_against_itself_ties(ask):
    found = ask("a", "a")
    assert found["win"]["rate"] == 0.5 and found["win"]["ties"] == 36 and found["win"]["p"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["score"]["difference"] == 0


def test_the_other_way_round(ask):
    there, back = ask(), ask("b", "a")
    assert back["win"]["rate"] == pytest.approx(1 - there["win"]["rate"])
    said = {row["prompt"]: row["a"] for row in there["rows"]}
    assert {row["prompt"]: row["b"] for row in back["rows"]} == said  # a's answers depend on a and the seed alone
    assert {row["prompt"]: row["a"] for row in ask(seed=1)["rows"]} != said


def test_a_judge_that_compares_is_asked_in_either_order(ask):
    found = ask(judge="judges:longer")
    assert found["consistent"] == 1 and found["score"] is None
    expected = {r["prompt"]: float(np.sign(len(r["b"]) - len(r["a"]))) for r in found["rows"]}
    assert {r["prompt"]: r["preference"] for r in found["rows"]} == expected
    biased = ask(judge="judges:likes_the_second")
    assert biased["win"]["rate"] == 0.5 and biased["win"]["ties"] == 36 and biased["consistent"] == 0
    leaning = ask(judge="judges:leans")  # a liking of .25 for the second place, beside one of .5 for length
    values = {r["prompt"]: r["preference"] for r in leaning["rows"]}
    assert values == {prompt: value / 2 for prompt, value in expected.items()}


def test_a_reward_model_judges(ask, monkeypatch):
    """Its scores are its head's on the last token, row by row, without any padding (a sampled pad token is a token)."""
    from transformers import AutoModelForSequenceClassification

    seen, decode = [], module.decode
    monkeypatch.setattr(module, "decode", lambda tokens, batch: seen.append(batch) or decode(tokens, batch))
    found = ask(judge=None, reward="reward")
    model, expected = AutoModelForSequenceClassification.from_pretrained("reward"), []
    for batch in seen:
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        last = [model.base_model(ids[real][None]).last_hidden_state[0, -1] for ids, real in rows]
        expected += [model.score(hidden).item() for hidden in last]
    said = [row[f"score {side}"] for side in "ab" for row in found["rows"]]
    assert sorted(said) == pytest.approx(sorted(expected), abs=1e-4) and len(set(expected)) > 12


def test_models_of_other_tokens(ask):
    found = ask("a", "other")
    assert found["kl"] is None and found["n"] == 36
    with pytest.raises(InputError, match="do not share a tokenizer"):
        ask("a", "other", judge=None, reward="reward")


def test_a_yaml_of_prompts(ask, home):
    (home / "data.yaml").write_text("source: files\npath: prompts.jsonl\nmax_length: 40\ntest_fraction: 0.5\n")
    (home / "stage.yaml").write_text("data:\n  source: files\n  path: prompts.jsonl\n  test_fraction: 0.5\n")
    one = compare("a", "b", judge="judges:count", data="data.yaml", max_new_tokens=8)
    assert 0 < one["n"] < 36 and one["split"] == "test"
    assert compare("a", "b", judge="judges:count", data="stage.yaml", max_new_tokens=8)["rows"] == one["rows"]
    assert compare("a", "b", judge="judges:count", data="data.yaml", prompts=3, max_new_tokens=8)["n"] == 3


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("judges:nan", "gave nan for prompt 0"),
        ("judges:far", "gave 2 for prompt 0"),
        ("judges:short", r"shape \(1,\) for \d+ prompts"),
        ("judges:words", "expected 36 numbers"),
        ("judges:nothing", "shape|expected 36 numbers"),
        ("judges:raises", "raised KeyError: 'no such field'"),
        ("judges:nan_scores", "is nan"),
    ],
)
def test_what_a_judge_must_not_say(ask, judge, words):
    with pytest.raises(RunError, match=words):
        ask(judge=judge)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": "judges:count", "reward": "reward"}, "give one"),
        ({"judge": None}, "nobody judges"),
        ({"judge": "judges:absent"}, "cannot be imported"),
        ({"data": "prompts.txt"}, "expected world, a YAML"),
        ({"max_new_tokens": 47}, "no room for a prompt"),
        ({"max_new_tokens": 40}, "36 longer than max_length"),
        ({"b": "reward"}, "reward-model"),
        ({"b": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_compared(home, monkeypatch, changes, words):
    monkeypatch.chdir(home)
    given = {"a": "a", "b": "b", "judge": "judges:count", "data": "prompts.jsonl", "max_new_tokens": 8, **changes}
    with pytest.raises(InputError, match=words):
        compare(given.pop("a"), given.pop("b"), **given)


def test_the_judge_is_looked_for_before_the_models_are_read(ask, monkeypatch):
    monkeypatch.setattr(module.language, "read", lambda *_: pytest.fail("a model was read"))
    with pytest.raises(InputError, match="cannot be imported"):
        ask(judge="nowhere:judge")


def test_the_command(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    given = ["compare", "a", "b", "--judge", "judges:count", "--data", "prompts.jsonl", "--max-new-tokens", "8"]
    assert cli.main([*given, "--out", "c.html", "--out", "c.json"]) == 0
    said, found = capsys.readouterr().out, json.loads((home / "c.json").read_text())
    assert f"{found['win']['wins']} wins" in said and "KL of b to a" in said and "* " in said
    assert (home / "c.html").read_text() == comparison.page(found)
    assert cli.main([*given, "--out", "c.txt"]) == 2 and "ends in .html or .json" in capsys.readouterr().err
    assert cli.main([*given, "--temperature", "0"]) == 2


def test_nothing_from_outside_is_taken_for_markup_or_for_the_terminal(ask):
    found = ask() | {"judge": "<i>judge</i>"}
    found["rows"] = [row | {"a": "<script>alert(1)</script>", "b": "\x1b[2Jgone"} for row in found["rows"]]
    page = comparison.page(found)
    assert (
        "<script>" not in page and "<i>judge" not in page and "&lt;script&gt;" in page and "script-src 'none'" in page
    )
    assert "\x1b" not in comparison.text(found)

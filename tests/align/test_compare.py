"""Two models side by side: the report against counting its own rows, judges of both forms, and what is refused."""

import json
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from align import compare as module
from align import reward, rlhf
from align.compare import compare
from fledge import artifact, cli, importer
from fledge.errors import InputError, RunError
from fledge.models import language
from fledge.report import comparison
from tests.align.test_ppo_pictures import home as seeing  # noqa: F401

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


def chat(folder, tokens, seed, positions=48, arch: Literal["gpt2", "llama"] = "llama"):
    from fledge.data import tokenizer

    torch.manual_seed(seed)
    sizes = language.CausalConfig(arch=arch, embed_dim=16, depth=2, num_heads=2, context_length=positions)
    return artifact.write(
        folder, kind="chat-model", config="stage: finetune.sft\n", architecture={},
        save=lambda at: language.save(language.build_causal(sizes, tokens), tokens, at),
        preprocessing={"tokenizer": tokenizer.digest(tokens), "template": "chat"},
    )  # fmt: skip


def rewards(folder, parent, tokens, **seeds):
    """A reward model, or an ensemble of several by their names; heads large enough for answers to differ."""
    from fledge.data import tokenizer

    models = {name: reward.build(parent, tokens, seed, "zero") for name, seed in seeds.items()}
    for name, model in models.items():
        torch.manual_seed(seeds[name])
        torch.nn.init.normal_(model.score.weight)

    def save(at):
        for name, model in models.items():
            language.save(model, tokens, at / "members" / name if len(models) > 1 else at)

    return artifact.write(
        folder, kind="reward-model" if len(models) == 1 else "reward-ensemble", config="stage: align.reward\n",
        architecture={}, save=save, preprocessing={"tokenizer": tokenizer.digest(tokens)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Chat models and reward models of one tokenizer, chat models of others, prompts, and judges."""
    from fledge.data import tokenizer

    folder = tmp_path_factory.mktemp("compare")
    prompts = [f"{a} {b}?" for a in NAMES for b in NAMES]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts) + "\n")
    (folder / "judges.py").write_text(JUDGES)
    settings = tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1)
    tokens = tokenizer.train(settings, prompts)
    first = chat(folder / "a", tokens, 0)
    chat(folder / "b", tokens, 1)
    others = tokenizer.train(settings, [*prompts, "0123456789"])
    chat(folder / "other", others, 2, positions=32)
    others.chat_template = str(others.chat_template).replace("message['content'] }}", "message['content'] + '!' }}")
    chat(folder / "loud", others, 2)
    rewards(folder / "reward", first, tokens, one=0)
    rewards(folder / "both", first, tokens, one=0, two=1)
    rewards(folder / "short", chat(folder / "brief", tokens, 3, positions=16, arch="gpt2"), tokens, one=0)
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


def texts_of(found, side):
    """(question, answer) of the rows, as messages."""
    for row in found["rows"]:
        yield [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]


@torch.no_grad()
def plain_scores(folder, conversations, positions=None):
    """transformers alone: the template's own ids without padding, the head at the last of them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokens, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    scores = []
    for messages in conversations:
        ids = tokens.apply_chat_template(messages)["input_ids"]
        if positions is not None and len(ids) > positions:
            ids = [ids[0], *ids[-(positions - 1) :]]  # which begins with the token that begins every conversation
        scores.append(model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]).item())
    return scores


def test_a_reward_model_judges_texts_in_its_own_template_and_tokens(ask):
    """The sides have other tokens and another template than the reward model, and than each other."""
    found = ask("a", "loud", judge=None, reward="reward")
    for side in "ab":
        expected = plain_scores("reward", texts_of(found, side))
        assert [row[f"score {side}"] for row in found["rows"]] == pytest.approx(expected, abs=1e-4)
        assert len({round(x, 4) for x in expected}) > 12
    assert found["kl"] is None


def test_what_is_longer_than_a_reward_model_is_cut_at_the_left_of_the_prompt(ask):
    found = ask(judge=None, reward="short")
    expected = plain_scores("short", texts_of(found, "b"), positions=16)
    assert [row["score b"] for row in found["rows"]] == pytest.approx(expected, abs=1e-4)


def test_an_ensemble_judges_by_the_mean_of_its_members(ask):
    found = ask(judge=None, reward="both")
    one, two = (plain_scores(f"both/members/{name}", texts_of(found, "a")) for name in ("one", "two"))
    expected = [(x + y) / 2 for x, y in zip(one, two, strict=True)]
    assert [row["score a"] for row in found["rows"]] == pytest.approx(expected, abs=1e-4) and one != two


def test_models_of_other_tokens(ask):
    found = ask("a", "other")
    assert found["kl"] is None and found["n"] == 36


@pytest.mark.parametrize("rows", [128, 5, 1])
def test_the_kl_is_that_of_plain_forwards_however_many_rows_its_logits_may_fill(ask, monkeypatch, rows):
    from transformers import AutoModelForCausalLM

    seen, decode, sizes, exact = [], module.decode, [], rlhf.exact_kl
    monkeypatch.setattr(module, "decode", lambda tokens, batch: seen.append(batch) or decode(tokens, batch))
    monkeypatch.setattr(rlhf, "exact_kl", lambda x, *more: sizes.append(x.numel()) or exact(x, *more))
    before, after = (AutoModelForCausalLM.from_pretrained(side) for side in "ab")
    monkeypatch.setattr(module, "LOGITS", rows * 8 * before.config.vocab_size)
    found, total = ask(), 0.0
    for ids, mask, said in zip(*(seen[1][k] for k in ("input_ids", "attention_mask", "response_mask")), strict=True):
        row, n = ids[mask.bool()][None], int(said.sum())
        with torch.no_grad():
            new, old = (m(row).logits[0, -n - 1 : -1].double().log_softmax(-1) for m in (after, before))
        total += (new.exp() * (new - old)).sum().item()
    assert found["kl"] == pytest.approx(total / 36, rel=1e-5) and found["kl"] > 0
    assert max(sizes) <= module.LOGITS and len(sizes) == -(-36 // rows)


@pytest.fixture(scope="module")
def two_that_see(seeing):  # noqa: F811  (the fixture)
    """The tiny LLaVA and a copy with other weights, and prompts with pictures as a YAML."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(seeing / "chat")
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(seeing / "other_foreign")
    language.read_processor(seeing / "chat").save_pretrained(seeing / "other_foreign")
    importer.bring_in("chat-model", str(seeing / "other_foreign"), seeing / "other")
    (seeing / "shown.yaml").write_text(
        f"source: files\npath: {seeing / 'prompts.jsonl'}\nimage: picture\nmax_length: 24\n"
        "validation_fraction: 0.0\ntest_fraction: 0.5\n"
    )
    return seeing


@torch.no_grad()
def greedy(model, processor, record, folder, T):
    """Text, ids, and log-probabilities of T greedy tokens of plain forwards on what the processor makes."""
    shown = Image.open(folder / record["picture"])
    given = processor(
        text=[f"[user]<image>\n{record['prompt']}[says]"], images=[shown], return_tensors="pt", add_special_tokens=False
    )
    ids, said = given["input_ids"], []
    while len(said) < T and said[-1:] != [1]:
        logits = model(input_ids=ids, pixel_values=given["pixel_values"]).logits[0, -1]
        said.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([said[-1:]])], dim=1)
    return processor.tokenizer.decode(said, skip_special_tokens=True), ids, given["pixel_values"], len(said)


def test_models_that_see_are_shown_the_pictures(two_that_see, monkeypatch):
    """Answers and KL beside plain forwards on what transformers' own processor makes of words and picture."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    home = two_that_see
    monkeypatch.chdir(home)
    found = compare("chat", "other", judge="sees:right", data="shown.yaml", greedy=True, max_new_tokens=3)
    records = {r["prompt"]: r for r in map(json.loads, (home / "prompts.jsonl").read_text().splitlines())}
    processor = AutoProcessor.from_pretrained(home / "chat")
    models = [AutoModelForImageTextToText.from_pretrained(home / name).eval() for name in ("chat", "other")]
    total = 0.0
    for row in found["rows"]:
        record = records[row["prompt"]]
        assert row["a"] == greedy(models[0], processor, record, home, 3)[0]
        text, ids, pixels, n = greedy(models[1], processor, record, home, 3)
        assert row["b"] == text and row["score b"] == float(text.split()[:1] == [record["colour"]])
        with torch.no_grad():
            old, new = (
                m(input_ids=ids, pixel_values=pixels).logits[0, -n - 1 : -1].double().log_softmax(-1) for m in models
            )
        total += (new.exp() * (new - old)).sum().item()
    assert found["n"] > 6 and found["kl"] == pytest.approx(total / found["n"], rel=1e-4) and found["kl"] > 0


def test_what_cannot_see_is_refused(two_that_see, home, monkeypatch):
    monkeypatch.chdir(two_that_see)
    with pytest.raises(InputError, match="a has no processor: it reads text alone"):
        compare("chat", home / "a", judge="sees:right", data="shown.yaml")
    with pytest.raises(InputError, match="reward reads text alone; give --judge"):
        compare("chat", "other", reward=home / "reward", data="shown.yaml")


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

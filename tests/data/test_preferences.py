"""Rankings and margins: what is read, what is left out and counted, and what is refused. Pairs: test_chats.py."""

import json

import pytest

from fledge.data import preferences, tokenizer
from fledge.data.chats import EMPTY, EQUAL
from fledge.data.preferences import ALONE, TIED, Preferences, PreferencesConfig
from fledge.errors import InputError


@pytest.fixture(scope="module")
def tokens():
    return tokenizer.train(
        tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1), ["a quick brown fox"]
    )


@pytest.fixture
def read(tmp_path, tokens):
    def read(*rows, ties=False, **config):
        (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
        held = {"source": "files", "path": str(tmp_path / "r.jsonl"), "validation_fraction": 0.0, "test_fraction": 0.0}
        return Preferences(PreferencesConfig.model_validate(held | config), tokens, "train", ties=ties)

    return read


RANKED = {"responses": "said", "ranks": "ranks"}
SCORED = {"responses": "said", "scores": "ranks"}


def test_rows_of_rankings_of_several_lengths(read, tokens):
    rows = [{"prompt": "fox", "said": ["a", "quick", "b"], "ranks": [7, 2.5, 7]},
            {"prompt": "a quick", "said": ["brown", "fox"], "ranks": [1, 2]}]  # fmt: skip
    batch = read(*rows, **RANKED).rows([0, 1])
    assert batch["ranks"].tolist() == [[1, 0, 1], [0, 1, -1]] and batch["input_ids"].shape[:2] == (2, 3)
    for row, record in enumerate(rows):
        for k, answer in enumerate(record["said"]):
            talk = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": answer}]
            real = batch["attention_mask"][row, k].bool()
            assert batch["input_ids"][row, k][real].tolist() == tokens.apply_chat_template(talk)["input_ids"]
    assert not batch["attention_mask"][1, 2].any()
    assert read(*rows, **SCORED).ranks == [[0, 1, 0], [1, 0]]  # a score is the other way round


def test_what_teaches_nothing_is_counted(read):
    rows = [{"prompt": "fox", "said": said, "ranks": ranks} for said, ranks in [
        (["a", "b"], [0, 1]), (["a", "b"], [1, 1]), (["a", "a", "b"], [0, 1, 2]), (["a", "a", "b"], [0, 0, 2]),
        (["a"], [0]), (["a", " "], [0, 1]),
    ]]  # fmt: skip
    found = read(*rows, **RANKED)
    assert len(found) == 2 and found.skipped == {TIED: 1, EQUAL: 1, ALONE: 1, EMPTY: 1}
    assert f"2 examples used; skipped: 1 {TIED}" in found.report()
    assert len(read(*rows, ties=True, **RANKED)) == 3


def test_margins_stand_beside_their_pairs(read):
    rows = [{"prompt": "fox", "chosen": "a", "rejected": "b", "sure": n} for n in (0, 1.5)]
    assert read(*rows, margin="sure").rows([1, 0])["margin"].tolist() == [1.5, 0]
    assert "margin" not in read(*rows).rows([0])


@pytest.mark.parametrize(
    ("record", "config", "words"),
    [
        ({"said": ["a", "b"], "ranks": [1]}, RANKED, "r.jsonl:1: said and ranks should be lists of one length"),
        ({"said": "a", "ranks": [1]}, RANKED, "found str and 1 of them"),
        ({"said": ["a", "b"], "ranks": [1, "best"]}, RANKED, "ranks should be a finite number, found 'best'"),
        ({"said": ["a", "b"], "ranks": [1, float("nan")]}, RANKED, "finite number, found 'nan'"),
        ({"said": ["a", "b"]}, RANKED, "no field 'ranks'"),
        ({"chosen": "a", "rejected": "b", "sure": True}, {"margin": "sure"}, "sure should be a finite number"),
        ({"said": ["a", "b"]}, {"responses": "said"}, "give data.ranks or data.scores"),
        ({"said": ["a", "b"]}, {**RANKED, "scores": "ranks"}, "one of them"),
        ({"said": ["a", "b"]}, {"ranks": "ranks"}, "give data.responses"),
        ({"said": ["a", "b"]}, {**RANKED, "margin": "sure"}, "data.margin belongs to pairs"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_place(read, record, config, words):
    with pytest.raises(InputError, match=words):
        read({"prompt": "fox", **record}, **config)


def test_prompts_of_rankings(read, tmp_path, tokens):
    found = read({"prompt": "fox", "said": ["a", "b"], "ranks": [0, 1]}, **RANKED)
    asked = preferences.prompts(found.config, tokens, "train")
    assert [record["prompt"][0]["content"] for record in asked.records] == ["fox"]


# ---- whole conversations as answers


def turns(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


SCORED_BY = {"responses": "said", "scores": "scores"}
SYSTEM = {"role": "system", "content": "quick"}


@pytest.mark.parametrize("asked", [["fox"], ["fox", "a", "quick"]], ids=["one turn", "two turns"])
def test_answers_that_repeat_their_prompt_are_cut_where_trl_cuts_them(read, tokens, asked):
    """UltraFeedback's layout: a prompt, and two whole conversations that begin with it."""
    from trl import extract_prompt

    chosen, rejected = turns(*asked, "a fox"), turns(*asked, "brown")
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    prompt = asked[0] if len(asked) == 1 else turns(*asked)
    found = read({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert {name: found.records[0][name] for name in theirs} == theirs
    for said, whole in zip(found.answers[0], (chosen, rejected), strict=True):
        assert found.prompts[0] + said == tokens.apply_chat_template(whole)["input_ids"]
    ranked = read({"prompt": prompt, "said": [rejected, chosen, turns("", "a")[1:]], "scores": [1, 3, 2]}, **SCORED_BY)
    assert ranked.ranks == [[2, 0, 1]] and ranked.prompts == found.prompts
    assert ranked.answers[0][:2] == found.answers[0][::-1]


@pytest.mark.parametrize(
    ("record", "config"),
    [
        ({"prompt": "fox", "chosen": turns("a fox", "a"), "rejected": turns("fox", "b")}, {}),
        ({"prompt": "fox", "chosen": turns("fox", "a"), "rejected": turns("fox", "b", "", "a")[2:]}, {}),
        ({"prompt": "fox", "said": ["a", turns("a fox", "b")], "scores": [0, 1]}, SCORED_BY),
        ({"chosen": [SYSTEM, *turns("fox", "a")], "rejected": [SYSTEM, *turns("a fox", "b")]}, {}),
    ],
)
def test_answers_to_something_else_are_refused_by_their_place(read, record, config):
    with pytest.raises(InputError, match=r"r.jsonl:1: an answer begins with a turn of the user; expected"):
        read(record, **config)


def test_a_margin_is_not_the_worlds():
    with pytest.raises(InputError, match=r"data\.margin"):
        PreferencesConfig(margin="sure").check()
    PreferencesConfig().check()


def test_raw_strings_without_a_prompt_are_refused(read):
    """HH-RLHF's layout."""
    with pytest.raises(InputError, match=r"r.jsonl:1: no field 'prompt'; the record has: chosen, rejected"):
        read({"chosen": "\n\nHuman: fox?\n\nAssistant: a", "rejected": "\n\nHuman: fox?\n\nAssistant: b"})

import copy
import json
import pickle
import random

import pytest
import torch

from fledge.data import chats, preferences, world
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import Chats, ChatsConfig
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.data.prompts import PromptsConfig, read_prompts
from fledge.data.text import IGNORE
from fledge.data.tokenizer import TokenizerConfig
from fledge.errors import InputError

TEXTS = ["what is the capital form of a letter?", "latin capital letter e with acute", "two plus two is four."] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(TokenizerConfig(vocab_size=320), TEXTS)


@pytest.fixture
def write(tmp_path):
    def write(rows: list[dict], name: str = "data.jsonl") -> dict:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"source": "files", "path": str(tmp_path / name), "validation_fraction": 0.0, "test_fraction": 0.0}

    return write


def turns(*contents: str, first: str = "user") -> list[dict]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


LONG_TALK = [{"role": "system", "content": "be kind"}, *turns("hi there", " hello\n", "two plus two?", "four.")]


# ---- what is scored


def test_ids_and_loss_mask_by_hand(tokenizer, write):
    data = Chats(ChatsConfig(**write([{"messages": LONG_TALK}])), tokenizer, "train")
    expected = [
        ("[BOS]<|system|>be kind<|user|>hi there<|assistant|>", False),
        (" hello\n[EOS]", True),
        ("<|user|>two plus two?<|assistant|>", False),
        ("four.[EOS]", True),
    ]
    tokens = [(i, scored) for text, scored in expected for i in ids(tokenizer, text)]
    batch = data.rows([0])
    assert batch["input_ids"][0].tolist() == [i for i, _ in tokens]
    assert batch["labels"][0].tolist() == [i if scored else IGNORE for i, scored in tokens[1:]] + [IGNORE]
    assert batch["attention_mask"].all()
    assert int((batch["labels"] == tokenizer.eos_token_id).sum()) == 2  # both ends are learned


def test_ids_equal_the_chat_template_of_the_library(tokenizer, write):
    talks = [LONG_TALK, turns("a", "b"), turns("  x\n", "y "), turns("é", "日本", "?", "!")]
    data = Chats(ChatsConfig(**write([{"messages": talk} for talk in talks])), tokenizer, "train")
    for n, talk in enumerate(talks):
        mask = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        row = data.rows([n])
        assert row["input_ids"][0].tolist() == mask["input_ids"]
        assert (row["labels"][0, :-1] >= 0).long().tolist() == mask["assistant_masks"][1:]
        prompt = chats.ids_of(tokenizer, [chats.prompt_text(tokenizer, talk[:-1])])[0]
        assert prompt == tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]


FOREIGN = (  # a template whose end of turn is followed by more text, as ChatML's is
    "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


def test_a_foreign_template_is_scored_through_its_end_token_only(tokenizer, write):
    foreign = pickle.loads(pickle.dumps(tokenizer))
    foreign.chat_template = FOREIGN
    data = Chats(ChatsConfig(**write([{"messages": turns("a", "b", "c", "d")}])), foreign, "train")
    labels = data.rows([0])["labels"][0]
    assert foreign.decode(labels[labels >= 0]) == "b[EOS]d[EOS]"
    assert foreign.decode(data.tokens) == "<user>\na[EOS]\n<assistant>\nb[EOS]\n<user>\nc[EOS]\n<assistant>\nd[EOS]"
    foreign.chat_template = "{{ messages|length }}" + FOREIGN  # rewrites what was said before
    with pytest.raises(InputError, match="chat template"):
        Chats(ChatsConfig(**write([{"messages": turns("a", "b", "c", "d")}])), foreign, "train")
    foreign.chat_template = FOREIGN.replace(" + eos_token", "")
    with pytest.raises(InputError, match="end token"):
        Chats(ChatsConfig(**write([{"messages": turns("a", "b")}])), foreign, "train")


def test_formats_agree(tokenizer, write):
    question, answer = "what is it?", "four."
    forms = [
        ({"messages": turns(question, answer)}, {}),
        ({"prompt": question, "completion": answer}, {}),
        ({"prompt": turns(question), "completion": turns(answer, first="assistant")}, {}),
        ({"task": "what", "input": "is it?", "output": answer}, {"prompt": ["task", "input"], "completion": "output"}),
        ({"q": {"text": question}, "a": [{"text": answer}]}, {"prompt": ["q.text"], "completion": "a.0.text"}),
    ]  # fmt: skip
    rows = [Chats(ChatsConfig(**write([row]), **how), tokenizer, "train").rows([0]) for row, how in forms]
    joined = rows.pop(3)  # the fields of a prompt stand one below the other
    assert all(torch.equal(rows[0][k], row[k]) for row in rows for k in row)
    assert tokenizer.decode(joined["input_ids"][0]) == "[BOS]<|user|>what\nis it?<|assistant|>four.[EOS]"


def test_plain_template_has_no_markers(tokenizer, write):
    data = Chats(ChatsConfig(**write([{"prompt": "two ", "completion": "four"}]), template="plain"), tokenizer, "train")
    expected = [ids(tokenizer, "[BOS]"), ids(tokenizer, "two "), ids(tokenizer, "four[EOS]")]
    assert data.tokens.tolist() == sum(expected, [])
    assert int((data.rows([0])["labels"] >= 0).sum()) == len(expected[2])


def test_plain_turns_are_asked_as_they_were_learned(tokenizer, write):
    talk = turns("two ", "four", "plus ", "six")
    rows = write([{"messages": talk}])
    asked = ids(tokenizer, "[BOS]two ") + ids(tokenizer, "four[EOS]") + ids(tokenizer, "plus ")
    assert asked != ids(tokenizer, "[BOS]two four[EOS]plus ")  # a token would reach over both
    learned = Chats(ChatsConfig(**rows, template="plain"), tokenizer, "train").tokens.tolist()
    assert learned == asked + ids(tokenizer, "six[EOS]")
    assert preferences.prompts(ChatsConfig(**rows, template="plain"), tokenizer, "train").ids == [asked]
    pair = write([{"prompt": talk[:-1], "chosen": "six", "rejected": "four"}])
    data = Preferences(PreferencesConfig(**pair, template="plain"), tokenizer, "train")
    assert data.prompts == [asked] and data.answers[0][0] == ids(tokenizer, "six[EOS]")


def test_plain_prompts_are_cut_at_the_left(tokenizer, write):
    row = {"prompt": "".join(map(str, range(30))), "completion": "four"}
    config = ChatsConfig(**write([row]), template="plain", max_length=20, overlong="truncate")
    data = Chats(config, tokenizer, "train")
    whole = ids(tokenizer, f"[BOS]{row['prompt']}four[EOS]")
    assert data.truncated == 1 and data.tokens.tolist() == [tokenizer.bos_token_id, *whole[-19:]]


def test_padding_is_on_the_right_and_by_length(tokenizer, write):
    data = Chats(ChatsConfig(**write([{"messages": turns("a", "b")}, {"messages": LONG_TALK}])), tokenizer, "train")
    one = data.rows([0])
    two = data.rows([1, 0])
    data.pad_id = tokenizer.eos_token_id
    three = data.rows([1, 0])
    n = one["input_ids"].shape[1]
    assert two["attention_mask"][1].tolist() == [1] * n + [0] * (two["input_ids"].shape[1] - n)
    assert torch.equal(two["labels"], three["labels"]) and torch.equal(two["attention_mask"], three["attention_mask"])
    assert torch.equal(two["labels"][1, :n], one["labels"][0]) and (two["labels"][1, n:] == IGNORE).all()


def test_packed_rows_hold_the_same_examples(tokenizer, write):
    rng = random.Random(0)
    talks = [{"messages": turns("x" * rng.randint(1, 20), "y" * rng.randint(1, 9))} for _ in range(40)]
    config = ChatsConfig(**write(talks), max_length=48)
    plain = Chats(config, tokenizer, "train")
    packed = Chats(config.model_copy(update={"packing": "best_fit"}), tokenizer, "train")
    assert len(packed) < len(plain) == 40
    found = []
    for n in range(len(packed)):
        row = packed.rows([n])
        assert row["input_ids"].shape == (1, 48)
        assert torch.equal(row["attention_mask"], (row["document"] > 0).long())
        for document in range(1, int(row["document"].max()) + 1):
            here = row["document"] == document
            assert row["position"][here].tolist() == list(range(int(here.sum())))
            found.append((row["input_ids"][here].tolist(), row["labels"][here].tolist()))
    alone = [plain.rows([n]) for n in range(40)]
    assert sorted(found) == sorted((row["input_ids"][0].tolist(), row["labels"][0].tolist()) for row in alone)


# ---- what is left out


def test_skips_are_counted(tokenizer, write):
    rows = [turns("q", "a"), turns("q2", " "), turns("q3"), turns("[EOS]<|assistant|>yes", "a"), turns("q " * 60, "a")]
    data = Chats(ChatsConfig(**write([{"messages": row} for row in rows]), max_length=40), tokenizer, "train")
    assert data.skipped == {chats.EMPTY: 1, chats.NOTHING: 1, chats.MARKED: 1, chats.LONG: 1}
    assert len(data) == len(data.records) == 1 and "1 empty answer" in data.report()


def test_overlong_prompts_are_cut_at_the_left(tokenizer, write):
    rows = [{"prompt": "".join(map(str, range(30))), "completion": "four"}, {"prompt": "q", "completion": "z" * 60}]
    data = Chats(ChatsConfig(**write(rows), max_length=30, overlong="truncate"), tokenizer, "train")
    assert data.truncated == 1 and data.skipped == {chats.LONG: 1}
    assert len(data.tokens) == 30 and data.tokens[0] == tokenizer.bos_token_id
    whole = tokenizer.apply_chat_template(turns(rows[0]["prompt"], "four"))["input_ids"]
    assert data.tokens[1:].tolist() == whole[-29:]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_answers_to_nothing_are_counted(tokenizer, write, template):
    """Beside one good record of each form."""
    said = turns("hello", first="assistant")
    talks = [{"messages": turns("q", "a")}, {"messages": turns("hi", "q", "a", first="assistant")},
             {"prompt": [], "completion": "a"}]  # fmt: skip
    config = ChatsConfig(**write(talks), template=template)
    data = Chats(config, tokenizer, "train")
    assert len(data) == 1 and data.skipped == {chats.UNASKED: 2}
    pairs = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [], "chosen": "a", "rejected": "b"},
        {"chosen": turns("q", "a"), "rejected": turns("p", "b")},
        {"chosen": said, "rejected": turns("ho", first="assistant")},
    ]
    held = PreferencesConfig(**write(pairs), template=template)
    found = Preferences(held, tokenizer, "train")
    assert len(found) == 1 and found.skipped == {chats.UNASKED: 3}
    assert preferences.prompts(held, tokenizer, "train").skipped == {chats.UNASKED: 3}
    asked = [{"prompt": "q"}, {"prompt": []}, {"messages": said}]
    prompts = read_prompts(PromptsConfig(**write(asked), template=template), tokenizer, "train")
    assert len(prompts) == 1 and prompts.skipped == {chats.UNASKED: 2}


def test_a_prompt_without_tokens_is_counted(tokenizer, write):
    """An empty text, where no token begins one."""
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    config = PromptsConfig(**write([{"prompt": ""}, {"prompt": "q"}]), template="plain")
    prompts = read_prompts(config, bare, "train")
    assert len(prompts) == 1 and prompts.skipped == {chats.UNASKED: 1}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "x"}, ["data.jsonl:2", "'prompt'", "question"]),
        ({"prompt": "x"}, ["data.jsonl:2", "'completion'", "prompt"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["data.jsonl:2", "robot", "assistant"]),
        ({"messages": {"role": "user"}}, ["data.jsonl:2", "content"]),
        ({"prompt": 3, "completion": "x"}, ["data.jsonl:2", "int"]),
    ],
)
def test_wrong_records_are_named(tokenizer, write, row, words):
    config = ChatsConfig(**write([{"messages": turns("q", "a"), "prompt": "q"}, row]))
    with pytest.raises(InputError) as error:
        Chats(config, tokenizer, "train")
    assert all(word in str(error.value) for word in words), error.value


def test_too_few_examples(tokenizer, write):
    with pytest.raises(InputError, match=r"1 usable examples of 2, but 8 are needed; skipped: 1 empty answer"):
        Chats(ChatsConfig(**write([{"messages": turns("q", a)} for a in ("a", "")])), tokenizer, "train", at_least=8)


# ---- splits


def test_one_prompt_is_in_one_split_whatever_the_format(write):
    questions = [f"question {n}?" for n in range(300)]
    shares = {"validation_fraction": 0.2, "test_fraction": 0.1}
    one = ChatsConfig(**{**write([{"messages": turns(q, "a")} for q in questions], "a.jsonl"), **shares})
    two = PreferencesConfig(
        **{**write([{"prompt": q, "chosen": "a", "rejected": "b"} for q in questions], "b.jsonl"), **shares}
    )
    three = {"chosen": turns("q", "a"), "rejected": turns("q", "b")}
    rows = [{k: [{**v[0], "content": q}, v[1]] for k, v in three.items()} for q in questions]
    three = PreferencesConfig(**{**write(rows, "c.jsonl"), **shares})
    total = 0
    for split, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        here = [record["messages"][0]["content"] for record in chats.conversations(one, split)]
        assert here == [r["prompt"][0]["content"] for r in preferences.pairs(two, split)]
        assert here == [r["prompt"][0]["content"] for r in preferences.pairs(three, split)]
        assert abs(len(here) - 300 * share) < 4.5 * (300 * share * (1 - share)) ** 0.5
        total += len(here)
    assert total == 300


def test_splits_by_field_and_by_file(write):
    rows = [{"messages": turns(f"{n}", "a"), "part": part} for n, part in enumerate(["train", "val", "test", "train"])]
    config = ChatsConfig(**write(rows), split_field="part")
    assert [len(chats.conversations(config, s)) for s in ("train", "validation", "test")] == [2, 1, 1]
    other = write(rows[:3], "held.jsonl")["path"]
    config = ChatsConfig(**write(rows), validation_path=other)
    assert [len(chats.conversations(config, s)) for s in ("train", "validation", "test")] == [4, 3, 0]
    with pytest.raises(InputError, match="'spare'"):
        chats.conversations(ChatsConfig(**write([{**rows[0], "part": "spare"}]), split_field="part"), "train")


def test_fingerprint_is_of_contents(write):
    rows = [{"messages": turns("q", "a")}]
    one, two = ChatsConfig(**write(rows, "a.jsonl")), ChatsConfig(**write(rows, "b.jsonl"))
    assert one.fingerprint() == two.fingerprint() != ChatsConfig(**write(rows * 2, "c.jsonl")).fingerprint()
    assert ChatsConfig().fingerprint() != PreferencesConfig().fingerprint()


# ---- preferences


def test_pairs_share_their_prompt_and_end_with_eos(tokenizer, write):
    rows = [
        {"prompt": "two plus two?", "chosen": "four.", "rejected": "five, of course."},
        {"chosen": turns("hi", "ho", "two?", "yes"), "rejected": turns("hi", "ho", "two?", "no no")},
        {"prompt": turns("hi"), "chosen": turns("a", first="assistant"), "rejected": turns("b", first="assistant")},
    ]
    data = Preferences(PreferencesConfig(**write(rows)), tokenizer, "train")
    batch = data.rows([0, 1, 2])
    expected = [
        (turns("two plus two?", "four."), turns("two plus two?", "five, of course.")),
        (rows[1]["chosen"], rows[1]["rejected"]),
        (turns("hi", "a"), turns("hi", "b")),
    ]
    for n, pair in enumerate(expected):
        for k, messages in enumerate(pair):
            real, said = batch["attention_mask"][n, k].bool(), batch["input_ids"][n, k]
            whole = tokenizer.apply_chat_template(messages)["input_ids"]
            assert said[real].tolist() == whole and whole[-1] == tokenizer.eos_token_id
            assert real.tolist() == [True] * len(whole) + [False] * (len(real) - len(whole))
            assert (said[~real] == tokenizer.pad_token_id).all()
    assert batch["ranks"].tolist() == [[0, 1]] * 3
    assert data.records[1]["prompt"] == turns("hi", "ho", "two?")


def test_plain_pairs(tokenizer, write):
    config = PreferencesConfig(**write([{"prompt": "two ", "chosen": "four", "rejected": "six"}]), template="plain")
    data = Preferences(config, tokenizer, "train")
    assert data.prompts[0] == ids(tokenizer, "[BOS]two ")
    assert data.answers[0] == [ids(tokenizer, "four[EOS]"), ids(tokenizer, "six[EOS]")]


def test_useless_pairs_are_counted(tokenizer, write):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": None},
        {"prompt": "q", "chosen": "a[EOS]", "rejected": "b"},
        {"prompt": "q " * 50, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "x " * 50},
    ]
    config = PreferencesConfig(**write(rows), max_length=30)
    data = Preferences(config, tokenizer, "train")
    assert len(data) == 1
    assert data.skipped == {chats.EQUAL: 1, chats.EMPTY: 2, chats.MARKED: 1, chats.LONG: 2}
    cut = Preferences(config.model_copy(update={"overlong": "truncate"}), tokenizer, "train")
    assert len(cut) == 2 and cut.truncated == 1 and cut.skipped[chats.LONG] == 1
    assert len(cut.prompts[1]) == 30 - max(map(len, cut.answers[1]))


def test_parquet_with_other_names(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"{n}?", "good": " Yes", "bad": " No"} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    config = PreferencesConfig(
        source="files", path=str(tmp_path), prompt=["question"], chosen="good", rejected="bad",
        validation_fraction=0.0, test_fraction=0.0,
    )  # fmt: skip
    data = Preferences(config, tokenizer, "train")
    assert tokenizer.decode(data.prompts[2] + data.answers[2][0]) == "[BOS]<|user|>2?<|assistant|> Yes[EOS]"
    (tmp_path / "p.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"p\.parquet"):
        Preferences(config, tokenizer, "train")


# ---- prompts


def test_prompts_are_left_padded_unique_and_equal_the_template(tokenizer, write):
    rows = [{"prompt": p, "chosen": "a", "rejected": "b", "n": n} for n, p in enumerate(["hi", "two plus two?", "hi"])]
    data = preferences.prompts(PreferencesConfig(**write(rows)), tokenizer, "train")
    assert len(data) == 2 and data.skipped == {chats.TWICE: 1} and [r["n"] for r in data.records] == [0, 1]
    batch = data.rows([1, 0])
    for row, content in enumerate(["two plus two?", "hi"]):
        whole = tokenizer.apply_chat_template(turns(content), add_generation_prompt=True)["input_ids"]
        assert batch["input_ids"][row, -len(whole) :].tolist() == whole
        assert batch["attention_mask"][row].tolist() == [0] * (data.width - len(whole)) + [1] * len(whole)


def test_prompts_of_conversations_stop_before_the_last_answer(tokenizer, write):
    data = preferences.prompts(ChatsConfig(**write([{"messages": LONG_TALK}])), tokenizer, "train")
    assert data.records[0]["prompt"] == LONG_TALK[:-1]
    short = preferences.prompts(
        ChatsConfig(**write([{"messages": LONG_TALK}]), max_length=10, overlong="truncate"), tokenizer, "train"
    )
    assert short.ids[0] == [tokenizer.bos_token_id, *data.ids[0][-9:]] and short.truncated == 1


# ---- the world


def test_the_world_as_chats_pairs_and_prompts():
    tokenizer = tokenizers.train(TokenizerConfig(kind="char", vocab_size=128), world.documents("statements", "train"))
    talk = Chats(ChatsConfig(), tokenizer, "test")
    questions = world.questions("test")
    assert [r["codepoint"] for r in talk.records] == [q["codepoint"] for q in questions]
    labels = talk.rows([5])["labels"]
    assert tokenizer.decode(labels[labels >= 0], skip_special_tokens=True) == questions[5]["answer"]
    pairs = Preferences(PreferencesConfig(prompt=["other"], chosen="x"), tokenizer, "test")
    assert len(pairs) == len(world.preferences("test")) and not pairs.skipped
    data = preferences.prompts(ChatsConfig(), tokenizer, "test")
    assert len(data) == len({q["prompt"] for q in questions})
    assert world.gold(data.records[0], questions[0]["answer"]) == 1.0


def test_nothing_touches_the_global_generators(tokenizer, write):
    before, state = random.getstate(), torch.get_rng_state()
    data = Chats(ChatsConfig(**write([{"messages": LONG_TALK}])), tokenizer, "train")
    pickle.loads(pickle.dumps(data)).rows([0], [1])
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), state)


def test_fields_of_several_layouts(tmp_path):
    """One folder, two layouts: the first way of a field that a record has is taken."""
    from fledge.data import records

    flat, nested = {"output": "a"}, {"instances": [{"output": "b"}]}
    assert [records.look_up(r, "output|instances.0.output", "x") for r in (flat, nested)] == ["a", "b"]
    with pytest.raises(InputError, match=r"no field 'output\|instances.1.output'; the record has: instances"):
        records.look_up(nested, "output|instances.1.output", "x")


def test_paths_may_be_patterns(tmp_path):
    from fledge.data import records

    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in records.files_of(tmp_path / "*.txt", (".txt",), "data.path")] == ["a.txt", "b.txt"]
    with pytest.raises(InputError, match="no file matches"):
        records.files_of(tmp_path / "z*.txt", (".txt",), "data.path")

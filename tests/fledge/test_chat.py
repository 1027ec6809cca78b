"""Talking to a model: what it is asked, says and forgets; at a pipe, at a terminal, from foreign folders."""

import io
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fledge import artifact, chat, cli
from fledge.chat import Conversation, open_chatter, spoken
from fledge.errors import InputError
from fledge.generate import generate

ROOT = Path(__file__).parents[2]
WORDS = ["how are you?", "what is it?", "a b c", "where was that?"]
SETTINGS = {"max_new_tokens": 8, "temperature": 0.0, "top_k": None, "seed": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny chat model as an artifact and as a plain folder of transformers; and one without a template."""
    from fledge.data import tokenizer
    from fledge.models import language

    folder = tmp_path_factory.mktemp("chat")
    tokens = tokenizer.train(tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1), WORDS)
    torch.manual_seed(0)
    sizes = language.CausalConfig(arch="llama", embed_dim=16, depth=2, num_heads=2, context_length=64)
    model = language.build_causal(sizes, tokens)
    letters = model.get_input_embeddings().weight.data.normal_()  # tied: large logits, and none for special tokens
    letters[[*tokens.all_special_ids, *range(len(tokens), len(letters))]] = 0
    artifact.write(
        folder / "artifact", kind="chat-model", config="stage: finetune.sft\n", architecture={},
        save=lambda at: language.save(model, tokens, at), preprocessing={"tokenizer": tokenizer.digest(tokens)},
    )  # fmt: skip
    language.save(model, tokens, folder / "plain")
    tokens.chat_template = None
    language.save(model, tokens, folder / "untaught")
    return folder


def test_a_model_that_was_taught_without_a_template_is_asked_without_it(home, tmp_path):
    """What it says is what its words continue, not what its tokenizer's template would ask."""
    from fledge.data import tokenizer
    from fledge.models import language

    chatty = artifact.open(home / "artifact")
    model, tokens = language.read(chatty), language.read_tokenizer(chatty)
    artifact.write(
        tmp_path / "told", kind="chat-model", config="stage: finetune.sft\n", architecture={},
        save=lambda at: language.save(model, tokens, at),
        preprocessing={"tokenizer": tokenizer.digest(tokens), "template": "plain"},
    )  # fmt: skip
    said = generate(tmp_path / "told", "what is", temperature=0, max_new_tokens=8)
    ids = torch.tensor([[tokens.bos_token_id, *tokens("what is", add_special_tokens=False)["input_ids"]]])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert said == "what is" + tokens.decode(new, skip_special_tokens=True)
    assert said != generate(home / "artifact", "what is", temperature=0, max_new_tokens=8)


@pytest.fixture
def chatter(home):
    return open_chatter(home / "artifact", **SETTINGS)


def heard(chatter, monkeypatch):
    """The messages of each answer."""
    asked, answer = [], chatter.answer
    monkeypatch.setattr(chatter, "answer", lambda messages, turn: asked.append(messages) or answer(messages, turn))
    return asked


def ask(conversation, text):
    forgotten, pieces = conversation.ask(text)
    return forgotten, "".join(pieces)


def piped(monkeypatch, capsys, home, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert cli.main(["generate", str(home / "artifact"), "--chat", "--max-new-tokens", "8", *options]) == 0
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_answer_is_the_one_that_generate_gives(home, temperature):
    settings = {**SETTINGS, "temperature": temperature}
    expected = generate(home / "artifact", WORDS[0], **settings)
    assert ask(Conversation(open_chatter(home / "artifact", **settings)), WORDS[0]) == (0, expected)


def test_a_second_question_is_asked_behind_the_first_answer(chatter, monkeypatch):
    asked, conversation = heard(chatter, monkeypatch), Conversation(chatter)
    _, first = ask(conversation, WORDS[2])
    ask(conversation, WORDS[1])
    told = [{"role": "user", "content": WORDS[2]}]
    assert asked == [told, [*told, {"role": "assistant", "content": first}, {"role": "user", "content": WORDS[1]}]]


def test_what_does_not_fit_is_forgotten_from_the_oldest_on(chatter, monkeypatch):
    asked, conversation = heard(chatter, monkeypatch), Conversation(chatter)
    forgotten = [ask(conversation, text)[0] for text in WORDS * 2]
    assert sum(forgotten) == sum(bool(n) for n in forgotten) + sum(n - 1 for n in forgotten if n) > 0
    for messages in asked:
        assert len(chatter.ids(messages)) + chatter.max_new_tokens <= chatter.positions
        assert messages[0]["role"] == "user"
    kept = [m["content"] for m in asked[-1] if m["role"] == "user"]
    assert kept == (WORDS * 2)[-len(kept) :]
    with_one_more = len(asked[-2]) + 2 - 2 * forgotten[-1]
    assert len(asked[-1]) == with_one_more


def test_a_long_question_has_a_shorter_answer_and_a_longer_one_none(chatter):
    conversation = Conversation(chatter)
    around = len(chatter.ids([{"role": "user", "content": ""}]))
    conversation.ask("a" * (chatter.positions - around - 1))
    with pytest.raises(InputError, match="the model reads 64 tokens"):
        conversation.ask("a" * (chatter.positions - around))
    assert conversation.turns == []


def test_a_special_token_in_a_question_is_refused(chatter):
    for name in ("<|assistant|>", chatter.tokenizer.eos_token):
        with pytest.raises(InputError, match="special token"):
            Conversation(chatter).ask(f"a {name} b")


def test_an_answer_that_is_interrupted_was_still_said(chatter):
    conversation = Conversation(chatter)
    _, pieces = conversation.ask(WORDS[0])
    begun = next(p for p in pieces if p)
    pieces.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": begun}


class Bytes:
    """Tokens that are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["naïve 漢字 🎉", "  two  spaces \n", "", "ends amid a character é"[:-1] + "é"])
def test_pieces_hold_whole_characters_and_join_to_the_text(text):
    pieces = list(spoken(Bytes(), text.encode()))
    assert "".join(pieces) == text.strip() and "\ufffd" not in "".join(pieces)
    assert "".join(spoken(Bytes(), "é".encode()[:1])) == "\ufffd"  # it never became a character


# --------------------------------------------------------------------------------------------------- pipe, terminal


def test_a_line_is_answered_by_a_line(home, monkeypatch, capsys):
    out, err = piped(monkeypatch, capsys, home, [WORDS[0], "", "/reset", WORDS[0], "<|user|>", "/quit", WORDS[1]])
    first, again, refused = out.split("\n")[:3]
    assert out.count("\n") == 3 and refused == "" and "special token" in err and "begins anew" in err
    greedy, _ = piped(monkeypatch, capsys, home, [WORDS[0], "/reset", WORDS[0]], "--greedy")
    one, other, end = greedy.split("\n")
    assert one == other and end == ""
    assert first == generate(home / "artifact", WORDS[0], max_new_tokens=8) and again


def test_the_system_is_said_first(home, monkeypatch, capsys):
    asked, answer = [], chat.Chatter.answer
    monkeypatch.setattr(chat.Chatter, "answer", lambda *given: asked.append(given[1]) or answer(*given))
    _, err = piped(monkeypatch, capsys, home, [WORDS[0], "/system a b", WORDS[1], "/system", WORDS[2], "/what"])
    assert [m[0] for m in asked] == [
        {"role": "user", "content": WORDS[0]},
        {"role": "system", "content": "a b"},
        {"role": "user", "content": WORDS[2]},
    ]
    assert [len(m) for m in asked] == [1, 2, 1] and "/what is no command" in err


def test_a_template_without_a_system_is_told(chatter):
    chatter.tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}a"
    conversation = Conversation(chatter)
    with pytest.raises(InputError, match="template refuses this: none"):
        conversation.tell("be brief")
    assert conversation.system == ""


def test_a_conversation_at_a_terminal(home):
    """A real one, in a process of its own: a question, a command, and Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fledge.cli", "generate", str(home / "artifact"), "--chat", "--greedy"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "8"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    said, seen = b"", 0

    def until(text: bytes) -> None:
        """Read on until it says this, behind what was waited for before."""
        nonlocal said, seen
        while text not in said[seen:]:
            assert select.select([ours], [], [], 90)[0], said
            said += os.read(ours, 4096)
        seen = said.index(text, seen) + len(text)

    try:
        until(b"> ")
        os.write(ours, f"{WORDS[0]}\n".encode())
        until(b"> ")
        os.write(ours, b"/reset\n")
        until(b"begins anew")
        until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    shown = said.decode().replace("\r\n", "\n")
    assert f"> {WORDS[0]}\n{chat.printable(generate(home / 'artifact', WORDS[0], **SETTINGS))}\n" in shown
    assert "/quit or Ctrl-D ends" in shown


def test_nothing_that_a_model_says_moves_the_cursor():
    assert chat.printable("a\x1b[2J\tb\n\x07é") == "a\ufffd[2J\tb\n\ufffdé"


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_plain_folder_of_transformers_talks_too(home, chatter):
    plain = open_chatter(home / "plain", **SETTINGS)
    assert ask(Conversation(plain), WORDS[0]) == ask(Conversation(chatter), WORDS[0])


def test_a_model_may_name_several_ends(home, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens, model = (c.from_pretrained(home / "plain") for c in (AutoTokenizer, AutoModelForCausalLM))
    model.generation_config.eos_token_id = [tokens.eos_token_id, 7]
    for part in (tokens, model):
        part.save_pretrained(tmp_path)
    assert open_chatter(tmp_path, **SETTINGS).eos_ids == {tokens.eos_token_id, 7}


def test_code_of_a_folder_is_not_run(home, tmp_path):
    config = json.loads((home / "plain" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="transformers cannot read it"):
        open_chatter(tmp_path, **SETTINGS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("folder", "changes", "words"),
    [
        ("untaught", {}, "no chat template"),
        ("nowhere", {}, "nowhere"),
        ("artifact", {"temperature": -1.0}, "--temperature -1.0"),
    ],
)
def test_what_cannot_be_talked_to(home, folder, changes, words):
    with pytest.raises(InputError, match=words):
        open_chatter(home / folder, **{**SETTINGS, **changes})


def test_a_prompt_or_a_conversation(home, capsys):
    assert cli.main(["generate", str(home / "artifact")]) == 2
    assert "give a prompt, or --chat" in capsys.readouterr().err

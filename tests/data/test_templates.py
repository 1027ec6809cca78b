"""Chat templates of well-known shapes: ids as the library makes them, answers found by construction, and refusals."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

from fledge.data import chats
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import ChatsConfig, segments, use_template
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.data.prompts import PromptsConfig, read_prompts
from fledge.data.tokenizer import TokenizerConfig
from fledge.errors import InputError
from fledge.generate import score
from fledge.models import reward_model

TALK = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "what is it?"},
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "it is four."},
]
SYSTEM = [{"role": "system", "content": "be kind"}, *TALK]

ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}\n{% else %}\n"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set said = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set said = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
OF_TRL = {  # its training templates, with their end tokens and the markers that are tokens
    "qwen2_5": ("<|im_end|>", ["<|im_start|>"]),
    "llama3": ("<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("<end_of_turn>", ["<start_of_turn>"]),
}


def of_bytes(end: str, markers: list[str]) -> PreTrainedTokenizerFast:
    made = tokenizers.train(TokenizerConfig(vocab_size=320), [m["content"] for m in SYSTEM] * 3)
    made.add_special_tokens({"eos_token": end, "extra_special_tokens": markers})
    return made


def of_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space becomes ▁, one more is put before every stretch of text, and <s> and </s> are tokens."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece reaches over words
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>", "<pad>"], vocab_size=120, show_progress=False)
    texts = [m["content"] for m in SYSTEM] + ["[INST] hi [/INST] a\n", "<|user|>\n<|assistant|>\n", "<<SYS>> <</SYS>>"]
    backend.train_from_iterator(texts * 3, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def shapes():
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    for name, (end, markers) in OF_TRL.items():
        made = of_bytes(end, markers)
        made.chat_template = (folder / f"{name}_training.jinja").read_text()
        yield name, made
    for name, template in (("zephyr", ZEPHYR), ("llama2", LLAMA2)):
        for kind, made in (("bytes", of_bytes("</s>", [])), ("pieces", of_pieces())):
            made = copy.deepcopy(made)
            made.chat_template = template
            yield f"{name} {kind}", made


@pytest.mark.parametrize("talk", [TALK[:2], TALK, SYSTEM], ids=["one turn", "two turns", "system"])
@pytest.mark.parametrize("name, tokens", list(shapes()), ids=[name for name, _ in shapes()])
def test_answers_are_where_the_librarys_masks_have_them(name, tokens, talk):
    """Up to blank space that a template puts inside of its mask, around what the model really has to say."""
    if name == "gemma" and talk is SYSTEM:
        with pytest.raises(InputError, match="roles system, user"):
            segments(tokens, talk)
        return
    found = chats.ids_of_segments(tokens, [segments(tokens, talk)])[0]
    ids = [i for piece, _ in found for i in piece]
    scored = [answer for piece, answer in found for _ in piece]
    mask = tokens.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == mask["input_ids"][: len(ids)] and not tokens.decode(mask["input_ids"][len(ids) :]).strip()
    theirs = [bool(bit) for bit in mask["assistant_masks"][: len(ids)]]
    assert not any(mine and not bit for mine, bit in zip(scored, theirs, strict=True))
    more = [i for i, mine, bit in zip(ids, scored, theirs, strict=True) if bit and not mine]
    assert not tokens.decode(more).strip()
    ends = [i for i, mine in zip(ids, scored, strict=True) if mine and i == tokens.eos_token_id]
    assert len(ends) == sum(message["role"] == "assistant" for message in talk)
    prompt = tokens.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt and not scored[len(prompt) - 1] and scored[len(prompt)]


@pytest.fixture
def files(tmp_path):
    def files(*rows: dict) -> dict[str, Any]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"source": "files", "path": str(tmp_path), "validation_fraction": 0.0, "test_fraction": 0.0}

    return files


@pytest.mark.parametrize("talk", [TALK[:2], TALK, SYSTEM], ids=["one turn", "two turns", "system"])
@pytest.mark.parametrize("name, tokens", list(shapes()), ids=[name for name, _ in shapes()])
def test_preferences_have_the_librarys_ids_too(name, tokens, talk, files):
    asked, answers = talk[:-1], [talk[-1]["content"], "what is two?"]
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    config = PreferencesConfig(**files({"prompt": asked, "chosen": said[0], "rejected": said[1]}))
    if name == "gemma" and talk is SYSTEM:
        with pytest.raises(InputError, match="roles system, user.*asking 'hi there'"):
            Preferences(config, tokens, "train")
        return
    data = Preferences(config, tokens, "train")
    assert data.prompts[0] == tokens.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    for ids, one in zip(data.answers[0], said, strict=True):
        whole = tokens.apply_chat_template([*asked, *one])["input_ids"]
        ids = data.prompts[0] + ids
        assert ids == whole[: len(ids)] and not tokens.decode(whole[len(ids) :]).strip()
        assert ids[-1] == tokens.eos_token_id


@pytest.mark.parametrize("name, tokens", list(shapes()), ids=[name for name, _ in shapes()])
def test_answers_are_scored_by_the_librarys_ids(name, tokens, monkeypatch):
    read = []

    def raw_rewards(model, ids, mask):
        read.extend(row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True))
        return torch.zeros(len(ids))

    model = SimpleNamespace(config=GPT2Config(), eval=lambda: None)
    monkeypatch.setattr(reward_model, "read_tokenizer", lambda opened: tokens)
    monkeypatch.setattr(reward_model, "read", lambda opened: [model])
    monkeypatch.setattr(reward_model, "raw_rewards", raw_rewards)
    tokens.pad_token = tokens.pad_token or tokens.eos_token
    opened: Any = SimpleNamespace(kind="reward-model", preprocessing={"template": "chat"})
    score(opened, "hi", ["what is it?", "four."])
    for ids, answer in zip(read, ["what is it?", "four."], strict=True):
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        whole = tokens.apply_chat_template(talk)["input_ids"]
        assert ids == whole[: len(ids)] and ids[-1] == tokens.eos_token_id
        assert not tokens.decode(whole[len(ids) :]).strip()


def test_answers_that_a_template_makes_equal_are_no_preference(files):
    rows = [{"prompt": "hi", "chosen": "a", "rejected": rejected} for rejected in ("a ", "is")]
    tokens = of_bytes("</s>", [])
    tokens.chat_template = ZEPHYR
    assert len(Preferences(PreferencesConfig(**files(*rows)), tokens, "train")) == 2
    tokens.chat_template = LLAMA2  # trims
    data = Preferences(PreferencesConfig(**files(*rows)), tokens, "train")
    assert len(data) == 1 and data.skipped == {chats.EQUAL: 1}


# ---- refusals name the conversation


def test_a_template_that_rewrites_earlier_turns_names_the_conversation(files):
    """One question is fine, so that it passes the trial; the first record of two turns is named."""
    rewrites = ZEPHYR.replace(
        "{{ m['content'] + eos_token }}", "{{ m['content'] if loop.last else '' }}{{ eos_token }}"
    )
    assert rewrites != ZEPHYR
    tokens = of_bytes("</s>", [])
    rows = files({"messages": TALK[:2]}, {"messages": [{"role": "user", "content": "two plus"}, *TALK[1:]]})
    config = ChatsConfig(**rows, chat_template=rewrites)
    use_template(config, tokens)
    with pytest.raises(InputError, match="asking 'two plus'.*changes earlier turns"):
        chats.Chats(config, tokens, "train")


def test_one_system_message_that_a_template_refuses_is_named(files):
    tokens = dict(shapes())["gemma"]
    rows = files({"messages": TALK[:2]}, {"messages": [SYSTEM[0], {"role": "user", "content": "me?"}, TALK[1]]})
    for read in (
        lambda: chats.Chats(ChatsConfig(**rows), tokens, "train"),
        lambda: read_prompts(PromptsConfig(**rows), tokens, "train"),
    ):
        with pytest.raises(InputError, match=r"roles system, user.*\(asking 'me\?'\)"):
            read()


def test_an_end_token_that_closes_no_turn_is_refused_until_it_does():
    """Gemma's own tokenizer ends a text with <eos>, and its template a turn with <end_of_turn>."""
    tokens = dict(shapes())["gemma"]
    tokens.add_special_tokens({"eos_token": "<eos>"})
    with pytest.raises(InputError, match="does not close an answer with the tokenizer's end token"):
        use_template(ChatsConfig(), tokens)
    tokens.eos_token = "<end_of_turn>"
    use_template(ChatsConfig(), tokens)


# ---- templates of one's own


def test_an_own_template_takes_the_place_of_the_tokenizers(tmp_path):
    tokens = of_bytes("</s>", [])
    use_template(ChatsConfig(chat_template=LLAMA2), tokens)
    assert tokens.chat_template == LLAMA2
    (tmp_path / "zephyr.jinja").write_text(ZEPHYR)
    config = ChatsConfig(chat_template_path=str(tmp_path / "zephyr.jinja"))
    use_template(config, tokens)
    assert tokens.chat_template == ZEPHYR
    plain = ChatsConfig().fingerprint()
    first = config.fingerprint()
    (tmp_path / "zephyr.jinja").write_text(ZEPHYR + "{# #}")
    assert len({plain, first, config.fingerprint()}) == 3 and ChatsConfig(chat_template=ZEPHYR).fingerprint() == plain


@pytest.mark.parametrize(
    "more, says",
    [
        ({"chat_template": "{% for m in messages %}"}, "template fails.*(end of template|endfor)"),
        ({"chat_template": "{{ messages[7].content.strip() }}"}, "template fails at messages of the roles user"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "template fails.*no"),
        ({"chat_template": "{{ 'x' + nothing }}"}, "template fails"),
        ({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}, "end token"),
        ({"chat_template": "{{ messages|length }}" + ZEPHYR}, "changes earlier turns"),
        ({"chat_template": ZEPHYR, "chat_template_path": "x"}, "both set"),
        ({"chat_template_path": "nowhere.jinja"}, "nowhere.jinja is no file"),
        ({"chat_template": ZEPHYR, "template": "plain"}, "writes no markers"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused_at_once(more, says):
    with pytest.raises(InputError, match=says):
        use_template(ChatsConfig(**more), of_bytes("</s>", []))


def test_a_tokenizer_without_a_template_is_refused():
    tokens = of_bytes("</s>", [])
    tokens.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        use_template(ChatsConfig(), tokens)
    use_template(ChatsConfig(template="plain"), tokens)

"""Chat templates of well-known shapes: ids as the library makes them, answers found by construction, and refusals."""

import copy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fledge.data import chats
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import ChatsConfig, segments, use_template
from fledge.data.tokenizer import TokenizerConfig
from fledge.errors import InputError

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

"""Tokenizers: byte-level BPE or characters, trained as part of a run, saved so that ``AutoTokenizer`` loads them.

Every vocabulary begins with the same special tokens, those of chats among them, so that no later stage has to resize
an embedding. Padding is never the end of a text: a model that pads with its end token never learns to stop.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fledge.config import DataConfig, data_path, hardware
from fledge.data.records import digest as json_digest
from fledge.data.records import sha256
from fledge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

Style = Literal["causal", "encoder"]
SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>' }}
{%- generation %}
{{- message['content'] + eos_token }}
{%- endgeneration %}
{%- elif message['role'] in ['system', 'user'] %}
{{- '<|' + message['role'] + '|>' + message['content'] }}
{%- else %}
{{- raise_exception('roles are system, user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""
"""``[BOS]<|user|>question<|assistant|>answer[EOS]<|user|>…``: a marker opens every turn, the end closes an answer.
What the model says stands within ``{% generation %}``."""


class TokenizerConfig(DataConfig):
    """Where the tokenizer comes from: trained on the run's own training documents, or taken from a folder."""

    kind: Literal["byte_bpe", "char"] = "byte_bpe"
    """byte_bpe: byte-level byte pair encoding, lossless. char: one token a character; unseen ones become [UNK]."""
    vocab_size: int = 8192
    """The most tokens, special ones included. Little text gives fewer."""
    style: Style = "causal"
    """What ``tokenizer(text)`` puts around a text: causal [BOS] text; encoder [CLS] text [SEP]."""
    min_frequency: int = 2
    """byte_bpe: a pair rarer than this is not merged. (char keeps every character that there is room for.)"""
    path: str | None = hardware(None)
    """A folder saved with save_pretrained: its tokenizer is used and nothing is trained."""

    def fingerprint(self) -> str:
        """Of the tokenizer that a folder holds; a trained one follows from the documents and this section."""
        if self.path is None:
            return ""
        files = sorted(f for f in _tokenizer_folder(self.path).glob("*") if f.name in _FILES)
        return json_digest([[f.name, sha256(f)] for f in files])

    def check(self) -> None:
        if self.path is not None:
            _tokenizer_folder(self.path)
        elif self.vocab_size < (smallest := len(SPECIALS) + len(ROLES) + (256 if self.kind == "byte_bpe" else 1)):
            raise InputError(
                f"tokenizer.vocab_size is {self.vocab_size}, but {self.kind} needs at least {smallest} "
                f"({len(SPECIALS) + len(ROLES)} special tokens and its alphabet)"
            )


_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.txt")


def build(config: TokenizerConfig, documents: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
    """The tokenizer of a run: from its folder, else trained on ``documents()``, which is called only then."""
    return load(config.path) if config.path is not None else train(config, documents())


def train(config: TokenizerConfig, documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train on the documents in their order; the same documents give the same tokenizer.

    Raises:
        InputError: no text, or a vocabulary too small for the alphabet.
    """
    from transformers import PreTrainedTokenizerFast

    config.check()
    documents = [text for text in documents if text]
    if not documents:
        raise InputError("there is no text to train the tokenizer on; every document is empty")
    backend = (_train_bytes if config.kind == "byte_bpe" else _train_characters)(config, documents)
    backend.post_processor = _framing(backend, config.style)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=list(ROLES.values()),
        clean_up_tokenization_spaces=False,  # decoding gives the text back as it was
        **SPECIALS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    _quiet_after_use()
    return tokenizer


def _train_bytes(config: TokenizerConfig, documents: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*SPECIALS.values(), *ROLES.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer, length=len(documents))
    return backend


def _train_characters(config: TokenizerConfig, documents: list[str]):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    specials = [*SPECIALS.values(), *ROLES.values()]
    counts = Counter[str]()
    for text in documents:
        counts.update(text)
    ranked = sorted(counts, key=_rank(counts))
    tokens = specials + ranked[: config.vocab_size - len(specials)]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=SPECIALS["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return backend


def _rank(counts: Counter[str]) -> Callable[[str], tuple[int, str]]:
    return lambda character: (-counts[character], character)


def _framing(backend, style: Style):
    from tokenizers.processors import TemplateProcessing

    single, pair = {
        "causal": ("[BOS] $A", "[BOS] $A $B"),
        "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    }[style]
    used = [(token, backend.token_to_id(token)) for token in ("[BOS]", "[CLS]", "[SEP]")]
    return TemplateProcessing(single=single, pair=pair, special_tokens=used)


def _quiet_after_use() -> None:
    """The tokenizers library warns in every worker forked after its threads ran, unless this is decided."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _tokenizer_folder(path: str | Path) -> Path:
    folder = data_path(str(path))
    if not folder.is_dir() or not any((folder / name).is_file() for name in _FILES):
        raise InputError(
            f"tokenizer: {folder} is no folder with a saved tokenizer (tokenizer.json, tokenizer_config.json)"
        )
    return folder


def load(path: str | Path) -> PreTrainedTokenizerFast:
    """A saved tokenizer from a local folder, with padding of its own.

    A foreign one without a pad token, or whose pad is its end, gets [PAD]: then ``len(tokenizer)`` may exceed a
    model's embedding, and the stage resizes it.
    """
    from transformers import AutoTokenizer

    folder = _tokenizer_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"tokenizer: {folder} cannot be loaded ({error})") from error
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer: {folder} holds a slow tokenizer; save its fast form (tokenizer.json) first")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": SPECIALS["pad_token"]})
    return tokenizer


def add_chat(tokenizer: PreTrainedTokenizerFast) -> int:
    """Give a tokenizer without a chat template ours; returns how many tokens that added (0 for tokenizers of ours)."""
    if tokenizer.chat_template is not None:
        return 0
    before = len(tokenizer)
    missing = {k: SPECIALS[k] for k in ("bos_token", "eos_token") if getattr(tokenizer, k) is None}
    tokenizer.add_special_tokens({**missing, "extra_special_tokens": list(ROLES.values())})
    tokenizer.chat_template = CHAT_TEMPLATE
    return len(tokenizer) - before


def digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of everything that decides its output; the padding and truncation last asked for do not count."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    return json_digest([content, {k: getattr(tokenizer, k) for k in SPECIALS}, tokenizer.chat_template])


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts: nothing is added, and a special token's name within a text is read as ordinary text."""
    if not texts:
        return []
    ids = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    _quiet_after_use()
    return ids


def style_of(tokenizer: PreTrainedTokenizerFast) -> Style:
    """encoder if the tokenizer itself closes a text with its separator, else causal."""
    added = tokenizer("", verbose=False)["input_ids"]
    return "encoder" if tokenizer.sep_token_id is not None and tokenizer.sep_token_id in added else "causal"


def frame(tokenizer: PreTrainedTokenizerFast, style: Style) -> tuple[list[int], list[int]]:
    """What stands before and after a document: [CLS] … [SEP], or [BOS] … [EOS] ([BOS] where there is one)."""
    names = ("cls_token", "sep_token") if style == "encoder" else ("bos_token", "eos_token")
    before, after = (getattr(tokenizer, name + "_id") for name in names)
    if after is None:
        raise InputError(f"this tokenizer has no {names[1]}, which a document of the style {style!r} ends with")
    return ([] if before is None else [before]), [after]


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What padding is filled with; which positions are padding is known from lengths, never from this id."""
    return int(str(tokenizer.pad_token_id or 0))


def bos_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    return None if tokenizer.bos_token_id is None else int(str(tokenizer.bos_token_id))


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of all special tokens, those of chats included, in order."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return sorted({i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids))


def ordinary_ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(V - specials,) ids of all tokens that stand for text."""
    import torch

    special = set(special_ids(tokenizer))
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special], dtype=torch.long)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(V,) bytes of text that each token stands for, 0 for special ones: bits per byte = nats / (ln 2 · bytes)."""
    import torch

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    stages = json.dumps([content["decoder"], content["pre_tokenizer"]])
    length = _byte_level_length if '"ByteLevel"' in stages else _text_length
    plain = {i: t.content for i, t in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}
    count = torch.zeros(len(tokenizer), dtype=torch.long)
    for token, i in tokenizer.get_vocab().items():
        count[i] = len(plain[i].encode()) if i in plain else length(token)
    count[special_ids(tokenizer)] = 0
    return count


def _byte_level_length(token: str) -> int:
    return len(token)  # its alphabet writes every byte as one character


def _text_length(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece's fallback for one byte
        return 1
    return len(token.removeprefix("##").replace("\u2581", " ").encode())


def tokenize(tokens: PreTrainedTokenizerFast, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask"}, (n, T) each: [CLS] text [SEP]; a long text is cut, [SEP] never.

    T is the longest of these texts, at most ``max_length``; padding follows, and the mask is 0 there.
    """
    import torch

    before, after = frame(tokens, "encoder")
    room = max_length - len(before) - len(after)
    rows = [before + ids[:room] + after for ids in encode(tokens, texts)]
    input_ids = torch.full((len(rows), max(map(len, rows))), pad_id(tokens))
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}

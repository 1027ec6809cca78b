"""Running text: documents, tokenised once into memory-mapped shards, packed so that no document sees another.

    documents --tokenizer--> shards in the cache --packing--> rows: input_ids, document, position, labels

Legend: B rows, T tokens of a row, N documents, P pieces of documents.

The document index of a row is 0 at padding and 1, 2, … within the row; positions restart at 0 with every document.
Attention may go only where the index is equal. Masks come from lengths, never from the id of the padding.
"""

import bisect
import heapq
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fledge import files
from fledge.config import DataConfig, hardware
from fledge.data import records
from fledge.data import tokenizer as tokenizers
from fledge.data.records import Split
from fledge.data.tokenizer import Style
from fledge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE = -100  # label of a position that is not scored
FORMAT = 1  # of the shards
SHARD = 1 << 26  # tokens of a shard at most, but for a single longer document
SUFFIXES = (".txt", *records.RECORD_SUFFIXES)
Packing = Literal["concat", "best_fit"]


# ---- documents -------------------------------------------------------------------------------------------------------


class TextConfig(DataConfig):
    """Running text and how it is cut into rows."""

    source: Literal["world", "files"] = "world"
    """world: what ships with fledge. files: text of your own, in ``path``."""
    kinds: list[Literal["statements", "prose"]] = Field(default=["statements", "prose"], min_length=1)
    """The world's documents that are read: statements about characters, prose from Python's documentation."""
    path: str | None = hardware(None)
    """A .txt, .jsonl or .parquet file, or a folder of them."""
    validation_path: str | None = hardware(None)
    """Held-out text of its own; without it, a share of the documents of ``path``."""
    test_path: str | None = hardware(None)
    """As ``validation_path``, for the final figures."""
    split_on: Literal["blank", "line", "file"] = "blank"
    """What divides a .txt file into documents: blank lines, every line end, or nothing."""
    field: str = "text"
    """The field of a .jsonl or .parquet record that holds the document."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of documents held out, by a hash of the document."""
    test_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of documents held out for the final figures, by the same hash."""
    seq_len: int = Field(default=128, ge=2)
    """T, tokens of a row."""
    packing: Packing = "concat"
    """concat: documents one behind the other, cut at the ends of rows. best_fit: kept whole where they fit."""

    def fingerprint(self) -> str:
        if self.source == "world":
            from fledge.data import world

            return world.fingerprint(*self.kinds)
        return records.digest([[records.sha256(f) for f in group] for group in records.inputs(self, SUFFIXES).values()])

    def check(self) -> None:
        if self.source == "files" and self.path is None:
            raise InputError("data.source is files, but data.path is not set; give such a file or a folder")
        if self.source == "world" and self.path is not None:
            raise InputError(f"data.path is {self.path}, but data.source is world; set data.source: files to read it")
        if self.validation_fraction + self.test_fraction >= 1:
            raise InputError("data.validation_fraction and data.test_fraction leave nothing to train on")
        records.inputs(self, SUFFIXES)


def documents(config: TextConfig, split: Split) -> list[str]:
    """The documents of a split, in the order of the source."""
    return list(iterate(config, split))


def iterate(config: TextConfig, split: Split) -> Iterator[str]:
    """As ``documents``, one file in memory at a time."""
    if config.source == "world":
        from fledge.data import world

        for kind in config.kinds:
            yield from world.documents(kind, split)
        return
    config.check()
    inputs = records.inputs(config, SUFFIXES)
    if split != "train" and split in inputs:
        yield from _read(config, inputs[split])
        return
    shares = [0.0 if s in inputs else f for s, f in _fractions(config).items()]  # a share that has its own file is none
    for text in _read(config, inputs["train"]):
        if records.split_of(text, *shares) == split:
            yield text


def _fractions(config: TextConfig) -> dict[str, float]:
    return {"validation": config.validation_fraction, "test": config.test_fraction}


def _read(config: TextConfig, paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.suffix == ".txt":
            yield from split_text(records.read_text(path), config.split_on)
            continue
        for where, record in records.read_records(path):
            if text := records.join_fields(record, [config.field], where):
                yield text


def split_text(text: str, split_on: Literal["blank", "line", "file"]) -> list[str]:
    """Documents of a text; empty ones are none."""
    if split_on == "file":
        return [text] if text.strip() else []
    parts = re.split(r"\n(?:[ \t]*\n)+", text) if split_on == "blank" else text.split("\n")
    return [part.strip("\n") for part in parts if part.strip()]


# ---- shards ----------------------------------------------------------------------------------------------------------


class Tokens:
    """Tokenised documents on disk, read through memory maps. ``offsets`` (N + 1,): document n is offsets[n : n + 2]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.offsets: np.ndarray = np.load(folder / "offsets.npy")
        self.starts: np.ndarray = np.load(folder / "starts.npy")  # (shards,) position of each shard's first token
        self.shards = [np.load(f, mmap_mode="r") for f in sorted(folder.glob("tokens-*.npy"))]

    def __reduce__(self):
        return Tokens, (self.folder,)  # a worker maps the files itself instead of receiving a copy

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def take(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 tokens, across shards where need be."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            shard, base = self.shards[first], int(self.starts[first])
            end = min(stop, base + len(shard))
            parts.append(shard[start - base : end - base])
            start, first = end, first + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def tokenise(config: TextConfig, tokenizer: "PreTrainedTokenizerFast", split: Split, style: Style) -> Tokens:
    """The split's tokens, from the cache if they are there and whole, else made once. Keyed by content only."""
    skip = {"path", "validation_path", "test_path", "seq_len", "packing"}  # the tokens do not depend on these
    paths = sorted(s for s, p in {"validation": config.validation_path, "test": config.test_path}.items() if p)
    key = [FORMAT, tokenizers.digest(tokenizer), config.fingerprint(), config.model_dump(exclude=skip), paths]
    folder = records.cache_folder("tokens") / records.digest([*key, split, style])[:32]
    if _whole(folder):
        return Tokens(folder)
    aside = files.aside(folder, "tmp")
    aside.mkdir()
    try:
        _write(aside, iterate(config, split), tokenizer, style)
        files.write_manifest(aside, {"format": FORMAT, "split": split, "style": style, "vocabulary": len(tokenizer)})
        files.move(aside, folder)
    except OSError as error:
        if not _whole(folder):  # unless another process was faster
            raise InputError(
                f"cannot write tokens into {folder} ({error}); set FLEDGE_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Tokens(folder)


def _whole(folder: Path) -> bool:
    """Is the cached folder there and unchanged? A broken one is removed with a warning: it can be made again."""
    if not folder.exists():
        return False
    try:
        faults = files.faults(folder, files.read_manifest(folder, FORMAT, "cached tokens"))
    except files.Broken as error:
        faults = [str(error)]
    if faults:
        warnings.warn(f"cached tokens {folder}: {'; '.join(faults)}; they are made again", stacklevel=3)
        files.remove(folder)
    return not faults


def _write(folder: Path, texts: Iterator[str], tokenizer: "PreTrainedTokenizerFast", style: Style) -> None:
    before, after = tokenizers.frame(tokenizer, style)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    lengths: list[int] = []
    starts: list[int] = []
    held: list[np.ndarray] = []

    def flush() -> None:
        if held:
            np.save(folder / f"tokens-{len(starts):05d}.npy", np.concatenate(held))
            starts.append(sum(lengths) - sum(map(len, held)))
            held.clear()

    size = 0
    for some in _batches(texts, 1000):
        for ids in tokenizers.encode(tokenizer, some):
            document = np.array([*before, *ids, *after], dtype)
            if size + len(document) > SHARD:
                flush()
                size = 0
            size += len(document)
            held.append(document)
            lengths.append(len(document))
    flush()
    np.save(folder / "starts.npy", np.array(starts, np.int64))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- packing ---------------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """Which pieces of the running tokens make each row: row r holds the pieces rows[r] to rows[r + 1]."""

    rows: np.ndarray  # (R + 1,)
    start: np.ndarray  # (P,)
    length: np.ndarray  # (P,)


def pack(offsets: np.ndarray, seq_len: int, packing: Packing) -> Index:
    """Pieces of documents for rows of ``seq_len``; every token stands in exactly one row."""
    return (_pack_concat if packing == "concat" else _pack_best_fit)(np.asarray(offsets, np.int64), seq_len)


def _pack_concat(offsets: np.ndarray, seq_len: int) -> Index:
    """Documents one behind the other, cut every ``seq_len`` tokens; two pieces of a cut do not see each other."""
    total = int(offsets[-1])
    bounds = np.union1d(offsets, np.append(np.arange(0, total, seq_len), total))
    start, length = bounds[:-1], np.diff(bounds)
    rows = np.searchsorted(start, np.arange(0, total, seq_len))
    return Index(np.append(rows, len(start)), start, length)


def _pack_best_fit(offsets: np.ndarray, seq_len: int) -> Index:
    """Best fit decreasing: the longest piece first, into the fullest row with room for it, the earliest of equals."""
    pieces = [
        (start, min(seq_len, int(stop) - start))
        for begin, stop in zip(offsets[:-1], offsets[1:], strict=True)
        for start in range(int(begin), int(stop), seq_len)
    ]
    rows: list[list[tuple[int, int]]] = []
    room: dict[int, list[int]] = {}  # free tokens -> heap of the rows that have so many
    sizes: list[int] = []  # the keys of room, in order
    for piece in sorted(pieces, key=lambda p: -p[1]):
        at = bisect.bisect_left(sizes, piece[1])
        if at < len(sizes):
            free = sizes[at]
            row = heapq.heappop(room[free])
            if not room[free]:
                del room[free], sizes[at]
        else:
            free, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left := free - piece[1]:
            if left not in room:
                room[left] = []
                bisect.insort(sizes, left)
            heapq.heappush(room[left], row)
    flat = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 2)
    return Index(np.cumsum([0, *map(len, rows)]), flat[:, 0], flat[:, 1])


def assemble(
    index: Index, ids: Sequence[int], take: Callable[[int, int], np.ndarray], seq_len: int, pad_id: int
) -> dict[str, Tensor]:
    """The rows ``ids``: input_ids, document, position, each (B, T) int64; document and position are 0 at padding."""
    tokens = np.full((len(ids), seq_len), pad_id, np.int64)
    document = np.zeros((len(ids), seq_len), np.int64)
    position = np.zeros((len(ids), seq_len), np.int64)
    for row, i in enumerate(ids):
        at = 0
        for number, piece in enumerate(range(index.rows[i], index.rows[i + 1]), start=1):
            start, length = int(index.start[piece]), int(index.length[piece])
            tokens[row, at : at + length] = take(start, start + length)
            document[row, at : at + length] = number
            position[row, at : at + length] = np.arange(length)
            at += length
    return {n: torch.from_numpy(a) for n, a in (("input_ids", tokens), ("document", document), ("position", position))}


def next_labels(input_ids: Tensor, document: Tensor) -> Tensor:
    """(B, T) labels, ALREADY SHIFTED: labels[t] is the target of position t, the token at t + 1 of the same document.

    -100 at the last token of each piece and at padding: no target crosses a boundary.
    """
    labels = torch.full_like(input_ids, IGNORE)
    same = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] > 0)  # (B, T-1)
    labels[:, :-1][same] = input_ids[:, 1:][same]
    return labels


class Packed:
    """A split as rows of ``seq_len`` tokens. The last row is padded, so that an evaluation leaves nothing out.

    Args:
        style: what stands around a document; by default as the tokenizer itself does.
        at_least: rows that are needed, such as train.batch; 0 also takes less than one full row.

    Raises:
        InputError: too little text, with the numbers.
    """

    def __init__(
        self,
        config: TextConfig,
        tokenizer: "PreTrainedTokenizerFast",
        split: Split,
        *,
        style: Style | None = None,
        at_least: int = 1,
    ) -> None:
        self.config, self.split = config, split
        self.pad_id = tokenizers.pad_id(tokenizer)
        self.tokens = tokenise(config, tokenizer, split, style or tokenizers.style_of(tokenizer))
        self.index = pack(self.tokens.offsets, config.seq_len, config.packing)
        self.skipped: dict[str, int] = {}  # every document is used
        self.documents = len(self.tokens.offsets) - 1
        enough = len(self) if len(self.tokens) >= config.seq_len else 0
        if len(self.tokens) == 0 or enough < at_least:
            raise InputError(
                f"{config.path or 'the world'}: the {split} text is too short: {self.documents} documents with "
                f"{len(self.tokens)} tokens give {enough} rows of data.seq_len {config.seq_len}, but "
                f"{max(at_least, 1)} are needed; use more text, a smaller data.seq_len or a smaller train.batch"
            )

    def __len__(self) -> int:
        return len(self.index.rows) - 1

    def rows(self, ids: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """input_ids, document, position and shifted next-token labels, each (B, T) int64. Draws nothing."""
        batch = assemble(self.index, ids, self.tokens.take, self.config.seq_len, self.pad_id)
        return batch | {"labels": next_labels(batch["input_ids"], batch["document"])}


# ---- masks for masked language models --------------------------------------------------------------------------------


def maskable(input_ids: Tensor, document: Tensor, special_ids: Sequence[int]) -> Tensor:
    """(B, T) bool: 1 = a real token that may be selected; padding and special tokens may not."""
    return (document > 0) & ~torch.isin(input_ids, torch.tensor(list(special_ids), dtype=input_ids.dtype))


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    *,
    mlm_probability: float,
    mask_id: int,
    ordinary_ids: Tensor,
    seeds: Sequence[int],
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Select and corrupt tokens as BERT does; a pure function of each row and its seed.

    Exactly max(1, round(mlm_probability · n)) of a row's n maskable tokens are selected (none if n = 0). Each selected
    one becomes [MASK] with mask_replace_prob, a uniformly drawn ordinary token with random_replace_prob, or stays.

    Args:
        input_ids, maskable: (B, T); maskable 1 = may be selected.
        ordinary_ids: (V',) the ids that a random replacement is drawn from.
        seeds: (B,) one seed a row.

    Returns:
        corrupted (B, T), labels (B, T): the original id at the selected positions (not shifted), -100 elsewhere.
    """
    corrupted, labels = input_ids.clone(), torch.full_like(input_ids, IGNORE)
    for row, seed in enumerate(seeds):
        candidates = maskable[row].nonzero().squeeze(1)  # (n,)
        if len(candidates) == 0:
            continue
        generator = torch.Generator().manual_seed(seed)
        quota = max(1, round(mlm_probability * len(candidates)))
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[:quota]]  # (quota,)
        draw = torch.rand(quota, generator=generator)
        other = ordinary_ids[torch.randint(len(ordinary_ids), (quota,), generator=generator)]
        original = input_ids[row, chosen]
        replaced = torch.where(draw < mask_replace_prob + random_replace_prob, other, original)
        corrupted[row, chosen] = torch.where(draw < mask_replace_prob, mask_id, replaced)
        labels[row, chosen] = original
    return corrupted, labels

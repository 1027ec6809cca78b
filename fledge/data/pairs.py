"""Pictures with captions: JSON lines that name picture files, or the glyphs of the embedded world and their names.

The unit is the concept: one caption and all its pictures. A batch of distinct concepts holds no caption twice, so no
picture is counted as a wrong answer to its own caption. Which of its pictures a concept shows is drawn by the sample's
own generator. Tokenising the captions is the stage's work.

Axes: B concepts, T tokens, C channels, H and W height and width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from PIL import Image
from pydantic import Field, model_validator

from fledge.config import data_path, hardware
from fledge.data.augment import AugmentConfig
from fledge.data.images import (
    FolderImages,
    Images,
    Listing,
    PictureConfig,
    Skipped,
    WorldImages,
    augment_batch,
    check_split,
    index_files,
    refuse,
    report,
    unusable,
    world_fingerprint,
)
from fledge.data.records import digest, split_of
from fledge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    Batch = dict[str, Tensor]

Fields = str | tuple[str, ...]


class PairsConfig(PictureConfig):
    """Pictures with captions."""

    source: Literal["jsonl", "world"] = "jsonl"
    """jsonl: one object a line, naming picture files. world: glyphs with their Unicode names."""
    path: str | None = hardware(None)
    """The JSON lines file; picture paths in it are relative to its folder."""
    image_field: Fields = "image"
    """Field with the picture's path (dots go inside: images.noto); several are several pictures of one caption."""
    caption_field: Fields = "caption"
    """Field with the caption; several fields, and lists of words, are joined by `join`."""
    join: str = ", "
    """What stands between the joined parts of a caption."""
    where: dict[str, str | int | bool] = {}
    """Only rows whose fields have these values, for example {split: train}."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """Part of the captions; the world's splits are by character."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of the captions, chosen by their text, that split train leaves to split validation."""
    fonts: Literal["seen", "unseen", "all"] = "seen"
    """The world's fonts: those to train on, the family kept out, or all."""

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.source == "world":
            refuse(self, "world", "path", "image_field", "caption_field", "join", "where", "holdout", "resize_to")
            return self
        refuse(self, "jsonl", "fonts")
        if not self.path:
            raise ValueError("source jsonl needs `path`, a file with one JSON object a line")
        if not self.image_field or not self.caption_field:
            raise ValueError("image_field and caption_field need at least one field each")
        check_split(self.split, self.holdout, "pick rows by a field with where")
        return self

    def fingerprint(self) -> str:
        return world_fingerprint() if self.source == "world" else listing(self).fingerprint

    def check(self) -> None:
        if self.source == "jsonl":
            listing(self)

    def open(self) -> Pairs:
        if self.source == "world":
            return _world_pairs(WorldImages(self.split, self.fonts, "character", self.mode))
        listed = listing(self)
        return paired(listed.classes, FolderImages(listed, self))


# -- the dataset -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Concepts by number: `captions[i]` and the pictures `members[i]` (numbers into `images`).

    `images` holds every picture once, labelled with its concept, so that evaluation can read it like any labelled set.
    """

    captions: tuple[str, ...]
    images: Images
    members: tuple[tuple[int, ...], ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        return self.images.skipped

    def report(self) -> str:
        """One sentence on the rows and pictures that were left out; empty where none was."""
        return report(self.skipped, len(self.images) + len(self.skipped), "captioned pictures")

    def draw(self, i: int, rng: Random) -> Image.Image:
        """One of the pictures of concept i."""
        members = self.members[i]
        return self.images.pil(members[rng.randrange(len(members))])


def paired(captions: Sequence[str], images: Images) -> Pairs:
    """Pairs from pictures whose label is the number of their caption."""
    members: list[list[int]] = [[] for _ in captions]
    for picture, concept in enumerate(images.labels or ()):
        members[concept].append(picture)
    return Pairs(tuple(captions), images, tuple(map(tuple, members)))


def _world_pairs(images: WorldImages) -> Pairs:
    """Captions are the names of the characters that are in this split, in the order of their first picture."""
    names = [images.classes[label] for label in images.labels or ()]
    concepts = {name: i for i, name in enumerate(dict.fromkeys(names))}
    images.classes, images.labels = tuple(concepts), [concepts[name] for name in names]
    return paired(images.classes, images)


# -- JSON lines ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One usable line: where it stands, its caption, and the paths of its pictures."""

    where: str
    caption: str
    pictures: tuple[str, ...]


def listing(config: PairsConfig) -> Listing:
    """The pictures that the file names; their classes are the distinct captions, in the order of the file."""
    path = data_path(config.path or "")
    rows, skipped = read_rows(path, config)
    rows = [row for row in rows if config.split in ("all", split_of(row.caption, config.holdout, test=0.0))]
    found = look_at(path.parent, [name for row in rows for name in row.pictures], config.max_pixels)
    concepts: dict[str, int] = {}
    names, labels = [], []
    for row in rows:
        for name in row.pictures:
            if why := found[name].why:
                skipped.append(Skipped(f"{row.where}: {name}", why))
            else:
                names.append(name)
                labels.append(concepts.setdefault(row.caption, len(concepts)))
    if not names:
        raise InputError(f"{path}: no picture with a caption is left; {report(skipped, len(skipped), 'rows')}")
    captions = tuple(concepts)
    fingerprint = digest([[captions[label], found[n].sha256] for n, label in zip(names, labels, strict=True)])
    return Listing(path.parent, tuple(names), fingerprint, tuple(skipped), captions, tuple(labels))


class Found(NamedTuple):
    sha256: str
    why: str | None


def look_at(root: Path, names: Sequence[str], max_pixels: int) -> dict[str, Found]:
    """Digest of each named picture, and why it cannot be used if so."""
    names = list(dict.fromkeys(names))
    entries = index_files(root, [name for name in names if (root / name).is_file()])
    found = {name: Found(entry.sha256, unusable(entry, max_pixels)) for name, entry in entries.items()}
    return {name: found.get(name, Found("", f"no such file below {root}")) for name in names}


def read_rows(path: Path, config: PairsConfig) -> tuple[list[Row], list[Skipped]]:
    """The usable rows that pass `where`, and what was left out, by file:line."""
    rows: list[Row] = []
    skipped: list[Skipped] = []
    image_fields, caption_fields = _fields(config.image_field), _fields(config.caption_field)
    seen: dict[str, None] = {}  # every field that any row has, for the message about one that none has
    missing = set(image_fields + caption_fields) | set(config.where)
    for where, row in read_lines(path):
        if isinstance(row, str):
            skipped.append(Skipped(where, row))
            continue
        seen |= dict.fromkeys(row)
        missing -= {name for name in missing if lookup(row, name) is not None}
        if any(lookup(row, name) != value for name, value in config.where.items()):
            continue
        usable = _row(where, row, image_fields, caption_fields, config.join)
        if isinstance(usable, Row):
            rows.append(usable)
        else:
            skipped.append(usable)
    if not seen and not skipped:
        raise InputError(f"{path} is empty; expected one JSON object a line")
    if missing and seen:
        raise InputError(
            f"{path}: no row has a value in {', '.join(sorted(missing))}; the rows have {', '.join(seen)}. "
            "Set image_field, caption_field and where to fields that exist (dots go inside: images.noto)"
        )
    if not rows and not skipped:
        raise InputError(f"{path}: no row passes where {config.where}; check the values")
    return rows, skipped


def _row(
    where: str, row: Mapping, image_fields: Sequence[str], caption_fields: Sequence[str], join: str
) -> Row | Skipped:
    caption = join.join(part for name in caption_fields for part in _texts(lookup(row, name)))
    pictures = tuple(value for name in image_fields if isinstance(value := lookup(row, name), str) and value)
    if not caption:
        return Skipped(where, f"empty caption ({', '.join(caption_fields)})")
    if any("\ud800" <= char <= "\udfff" for char in caption + "".join(pictures)):
        return Skipped(where, "half a surrogate pair, which is no text")
    if not pictures:
        return Skipped(where, f"no picture ({', '.join(image_fields)})")
    return Row(where, caption, pictures)


def read_lines(path: Path) -> Iterator[tuple[str, dict | str]]:
    """(file:line, object) of each line that is not blank; a broken line gives the reason in place of the object."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; `path` must be a file with one JSON object a line")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", _parse(line)


def _parse(line: bytes) -> dict | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as problem:
        return f"not JSON: {problem.msg} at column {problem.colno}"
    except UnicodeDecodeError as problem:
        return f"not UTF-8 at byte {problem.start + 1}"
    except RecursionError:
        return "nested too deeply"
    return row if isinstance(row, dict) else f"expected a JSON object, found {type(row).__name__}"


def _fields(names: Fields) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def lookup(row: Any, name: str) -> Any:
    """The value of a field, dots going inside ("images.noto"); None where there is none."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def _texts(value: Any) -> list[str]:
    """The words of a field: a text, or a list of texts, without outer and doubled white space."""
    values = value if isinstance(value, list) else [value]
    texts = (" ".join(one.split()) for one in values if isinstance(one, str))
    return [text for text in texts if text]


# -- rows for streams ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captioned:
    """`rows(ids, seeds)` of a stream over concepts: {"image": (B, C, H, W), "caption_id": (B,), and the rows `ids` of
    every tensor in `text`}, for example the stage's token ids and masks, (concepts, T) each."""

    pairs: Pairs
    augment: AugmentConfig
    text: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, ids: Sequence[int], seeds: Sequence[int]) -> Batch:
        import torch

        rngs = [Random(seed) for seed in seeds]
        pictures = [self.pairs.draw(i, rng) for i, rng in zip(ids, rngs, strict=True)]
        batch = augment_batch(pictures, rngs, self.augment)
        index = torch.tensor(ids)
        return {**batch, "caption_id": index, **{name: table[index] for name, table in self.text.items()}}


def captioned(pairs: Pairs, augment: AugmentConfig, text: Mapping[str, Tensor] | None = None) -> Captioned:
    for name, table in (text or {}).items():
        if len(table) != len(pairs):
            raise ValueError(f"text {name!r} has {len(table)} rows for {len(pairs)} captions")
    return Captioned(pairs, augment, dict(text or {}))

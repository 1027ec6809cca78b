"""Pictures by number: a folder of image files, or the glyphs of the embedded world.

A folder is indexed once. Every file is hashed and decoded, and what was found is cached by path, size and time of
change, so that the next start only lists the folder. Files that cannot be decoded are left out, counted and named in
`Images.skipped`. Identity is content: `fingerprint` does not change when the folder moves.

Axes: B pictures, V views of a picture, C channels, H and W height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, Self

from PIL import Image, ImageOps
from pydantic import Field, model_validator

from fledge.config import DataConfig, data_path, hardware
from fledge.data import augment as views
from fledge.data.augment import AugmentConfig, EvalConfig, MultiCropConfig
from fledge.data.records import cache_folder, digest, split_of
from fledge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    Batch = dict[str, Tensor]

MAX_PIXELS = 89_478_485  # where Pillow itself begins to warn of a decompression bomb
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # only these decoders ever see a user's bytes
INDEX_FORMAT = 1


# -- what was left out -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skipped:
    """One thing that the data left out: where it stands and why."""

    where: str
    why: str


def report(skipped: Sequence[Skipped], of: int, what: str = "pictures", names: int = 3) -> str:
    """One sentence on what was left out, naming the first few; empty where nothing was."""
    if not skipped:
        return ""
    listed = "; ".join(f"{one.where} ({one.why})" for one in skipped[:names])
    more = f"; and {len(skipped) - names} more" if len(skipped) > names else ""
    return f"left out {len(skipped)} of {of} {what}: {listed}{more}"


# -- configs ---------------------------------------------------------------------------------------------------------


class PictureConfig(DataConfig):
    """How picture files are decoded, whatever lists them."""

    channels: Literal[1, 3] = 3
    """3: colour. 1: grey."""
    resize_to: int | None = Field(None, ge=1)
    """Shrink every picture on loading until its short side has so many pixels; smaller ones stay as they are."""
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=MAX_PIXELS)
    """Pictures with more pixels are left out undecoded (decompression bombs)."""
    cache: bool = hardware(False)
    """Keep the decoded (and shrunk) pictures in memory: for sets that fit, decoding then costs nothing."""

    @property
    def mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def held_out(self) -> Self:
        """The validation split of what is trained on.

        Raises:
            InputError: training has it all.
        """
        source, split, holdout = (getattr(self, name) for name in ("source", "split", "holdout"))
        if split != "train" or source != "world" and holdout == 0:
            raise InputError(
                f"data: split {split} with holdout {holdout} leaves nothing to evaluate on while training; use split: "
                "train with a holdout, such as 0.05 (the world has its own), or train.eval_every: 0"
            )
        return self.model_copy(update={"split": "validation"})


class ImagesConfig(PictureConfig):
    """Pictures, with labels where the source has them."""

    source: Literal["folder", "world"] = "folder"
    """folder: image files below `path`. world: the glyphs that ship with fledge."""
    path: str | None = hardware(None)
    """Folder of jpg, png, webp or bmp files, searched recursively."""
    labels: Literal["auto", "folders", "script", "character", "none"] = "auto"
    """folders: the first subfolder is the class. script, character: of the world's glyphs. auto: the script, or the
    folders where every picture lies in one of two or more."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """Part of the pictures; the world's splits are by character."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of a folder's pictures, chosen by their content, that split train leaves to split validation."""
    fonts: Literal["seen", "unseen", "all"] = "seen"
    """The world's fonts: those to train on, the family kept out, or all."""

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.source == "world":
            refuse(self, "world", "path", "holdout", "resize_to")
        else:
            refuse(self, "folder", "fonts")
            if not self.path:
                raise ValueError("source folder needs `path`, a folder of pictures")
            check_split(self.split, self.holdout, "let path be the folder of that split")
        if self.labels in (("folders",) if self.source == "world" else ("script", "character")):
            raise ValueError(f"source {self.source} has no labels {self.labels!r}")
        return self

    def fingerprint(self) -> str:
        return world_fingerprint() if self.source == "world" else listing(self).fingerprint

    def check(self) -> None:
        if self.source == "folder":
            listing(self)

    def open(self) -> Images:
        if self.source == "folder":
            return FolderImages(listing(self), self)
        label = "script" if self.labels == "auto" else self.labels
        return WorldImages(self.split, self.fonts, label, self.mode)


def refuse(config: DataConfig, source: str, *names: str) -> None:
    """Fields that say nothing about this source must be left as they are."""
    set_ = [name for name in names if getattr(config, name) != type(config).model_fields[name].get_default()]
    if set_:
        raise ValueError(f"source {source} has no use for {', '.join(set_)}; remove it, or choose another source")


def check_split(split: str, holdout: float, instead: str) -> None:
    """A user's data has no test split, and a validation split only where something is held out."""
    if split == "test":
        raise ValueError(f"split test exists in the world only; {instead}")
    if split == "validation" and holdout == 0:
        raise ValueError(f"split validation is empty while holdout is 0; set holdout, or {instead}")


# -- the dataset -----------------------------------------------------------------------------------------------------


class Images:
    """Pictures by number, all of one mode ("RGB" or "L"); sizes may differ."""

    mode: str
    classes: tuple[str, ...] = ()
    """Names of the classes, sorted; empty where there are no labels."""
    labels: Sequence[int] | None = None
    """Index into `classes` per picture."""
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def pil(self, i: int) -> Image.Image:
        raise NotImplementedError

    def label(self, i: int) -> int | None:
        return None if self.labels is None else self.labels[i]

    def report(self) -> str:
        """One sentence on the pictures that were left out; empty where none was."""
        return report(self.skipped, len(self) + len(self.skipped))


class FolderImages(Images):
    """Picture files below a folder."""

    def __init__(self, listing: Listing, config: PictureConfig):
        self.root, self.names = listing.root, listing.names
        self.mode, self.resize_to, self.max_pixels = config.mode, config.resize_to, config.max_pixels
        self.classes, self.labels = listing.classes, listing.labels
        self.fingerprint, self.skipped = listing.fingerprint, listing.skipped
        self.pixels: list[tuple[tuple[int, int], bytes]] | None = None  # (size, raw pixels) of each picture
        if config.cache:
            self.pixels = _threaded(self._raw, range(len(self)))

    def __len__(self) -> int:
        return len(self.names)

    def pil(self, i: int) -> Image.Image:
        if self.pixels is not None:
            return Image.frombytes(self.mode, *self.pixels[i])
        path = self.root / self.names[i]
        try:
            return decode(path, self.mode, self.resize_to, self.max_pixels)
        except Undecodable as problem:
            raise InputError(
                f"{path}: {problem}; it could be read when the folder was indexed, so it was changed or removed since. "
                "Put it back, or start the run anew on the folder as it is"
            ) from problem

    def _raw(self, i: int) -> tuple[tuple[int, int], bytes]:
        image = self.pil(i)
        return image.size, image.tobytes()


class WorldImages(Images):
    """Glyphs of the embedded world, 32 x 32, white on black. Labels mean the same in every split: classes are all
    scripts, or all characters, of the world."""

    def __init__(self, split: str, fonts: str, label: str, mode: str):
        from fledge.data import world

        self.glyphs = world.glyphs(None if split == "all" else split, fonts)
        self.mode = mode
        self.fingerprint = world_fingerprint()
        if label != "none":
            everyone = world.characters()
            of = [one.script if label == "script" else one.name for one in everyone]
            self.classes = tuple(sorted(set(of)))
            number = {name: i for i, name in enumerate(self.classes)}
            by_codepoint = {one.codepoint: number[name] for one, name in zip(everyone, of, strict=True)}
            self.labels = [by_codepoint[codepoint] for codepoint in self.glyphs.codepoint.tolist()]

    def __len__(self) -> int:
        return len(self.glyphs)

    def pil(self, i: int) -> Image.Image:
        image = Image.fromarray(self.glyphs.image(i))
        return image if self.mode == "L" else image.convert(self.mode)


def world_fingerprint() -> str:
    """Of the drawn pictures and of what is known about their characters."""
    from fledge.data import world

    return world.fingerprint("glyphs")


# -- decoding --------------------------------------------------------------------------------------------------------


class Undecodable(Exception):
    """Why a file is not a usable picture, in a few words."""


def decode(path: Path, mode: str, resize_to: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file: upright by its EXIF orientation, transparency on white, in `mode`, shrunk if asked."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Undecodable(f"{image.width}x{image.height} pixels, the limit max_pixels is {max_pixels}")
            if resize_to is not None:
                image.draft(mode, (2 * resize_to, 2 * resize_to))  # JPEG decodes at 1/2, 1/4, 1/8 for little
            image.load()
            image = _to_mode(ImageOps.exif_transpose(image), mode)
    except Undecodable:
        raise
    except Image.DecompressionBombError as problem:
        raise Undecodable("too many pixels") from problem
    except Exception as problem:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken bytes
        raise Undecodable(_words(problem)) from problem
    if resize_to is not None and min(image.size) > resize_to:
        image = views.resize_short_side(image, resize_to)
    return image


def _words(problem: Exception) -> str:
    if isinstance(problem, Image.UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(problem, FileNotFoundError):
        return "no such file"
    return str(problem).partition("\n")[0] or type(problem).__name__


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL clips 16-bit grey at 255 instead of scaling it
        image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    if image.has_transparency_data:  # what a transparent pixel would show is chance: put the picture on white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _threaded(function: Callable, items: Sequence) -> list:
    """Decoding and hashing release the interpreter's lock, so threads are enough."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


# -- the index -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What is known about one file: its content's digest, and why it cannot be used if so."""

    size: int
    mtime_ns: int
    sha256: str
    width: int = 0
    height: int = 0
    problem: str | None = None


def inspect(path: Path) -> Entry:
    """Hashes and fully decodes a file."""
    try:
        stat = path.stat()
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        return Entry(-1, -1, "", problem=f"cannot be read: {problem.strerror}")
    try:
        image = decode(path, "RGB")  # a run's own max_pixels is applied when its pictures are listed
    except Undecodable as problem:
        return Entry(stat.st_size, stat.st_mtime_ns, sha256, problem=str(problem))
    return Entry(stat.st_size, stat.st_mtime_ns, sha256, *image.size)


def index_files(root: Path, names: Sequence[str]) -> dict[str, Entry]:
    """Entries of the named files below `root` (which must exist); only what changed since the last time is read."""
    memory = _index_path(root)
    known = _read_index(memory)
    entries = {name: entry for name in names if (entry := known.get(name)) and _unchanged(root / name, entry)}
    new = [name for name in names if name not in entries]
    entries.update(zip(new, _threaded(lambda name: inspect(root / name), new), strict=True))
    if new:
        _write_index(memory, {**known, **entries})
    return {name: entries[name] for name in names}


def _unchanged(path: Path, entry: Entry) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (entry.size, entry.mtime_ns)


def _index_path(root: Path) -> Path:
    return cache_folder("images") / (hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32] + ".json")


def _read_index(path: Path) -> dict[str, Entry]:
    try:
        saved = json.loads(path.read_text())
        if saved["format"] != INDEX_FORMAT:
            return {}
        return {name: Entry(*values) for name, values in saved["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a cache: whatever is wrong with it, the files themselves are the truth


def _write_index(path: Path, entries: dict[str, Entry]) -> None:
    files = {name: [e.size, e.mtime_ns, e.sha256, e.width, e.height, e.problem] for name, e in entries.items()}
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        with open(handle, "w") as file:
            json.dump({"format": INDEX_FORMAT, "files": files}, file)
        os.replace(temporary, path)
    except OSError:
        pass  # nowhere to keep it: the next start indexes again


# -- listing a folder ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The usable pictures of a folder, in the order of their sorted relative paths."""

    root: Path
    names: tuple[str, ...]
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = field(default=None)


def listing(config: ImagesConfig) -> Listing:
    root = data_path(config.path or "")
    entries = index_files(root, find_pictures(root))
    problems = {name: unusable(entry, config.max_pixels) for name, entry in entries.items()}
    skipped = tuple(Skipped(_utf8(name), why) for name, why in problems.items() if why)
    good = [name for name, why in problems.items() if not why]
    if not good:
        raise InputError(
            f"{root}: none of its {len(entries)} pictures can be used; {report(skipped, len(entries))}. "
            "Give a folder with pictures that open"
        )
    classes = class_names(root, good, config.labels)
    names = [name for name in good if in_split(entries[name].sha256, config.split, config.holdout)]
    if not names:
        raise InputError(
            f"{root}: split {config.split} has no pictures (holdout {config.holdout} of {len(good)}); "
            "choose another holdout, or add pictures"
        )
    labels = tuple(classes.index(_first_folder(name)) for name in names) if classes else None
    fingerprint = digest([[_utf8(name), entries[name].sha256] for name in names])
    return Listing(root, tuple(names), fingerprint, skipped, classes, labels)


def find_pictures(root: Path) -> list[str]:
    """Relative paths ("a/b.png") of the picture files below `root`, sorted; hidden ones are not looked at."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}; `path` must be a folder of pictures ({', '.join(SUFFIXES)})")
    found: list[str] = []
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        found += [(Path(folder).relative_to(root) / name).as_posix() for name in pictures]
    if not found:
        raise InputError(f"{root}: no pictures in it or below; expected files ending in {', '.join(SUFFIXES)}")
    return sorted(found)


def unusable(entry: Entry, max_pixels: int) -> str | None:
    """Why a file cannot be used, or None."""
    if entry.problem is None and entry.width * entry.height > max_pixels:
        return f"{entry.width}x{entry.height} pixels, the limit max_pixels is {max_pixels}"
    return entry.problem


def class_names(root: Path, names: Sequence[str], labels: str) -> tuple[str, ...]:
    """The classes of a labelled folder, sorted; () for a flat one."""
    if labels == "none":
        return ()
    loose = [name for name in names if "/" not in name]
    classes = sorted({_first_folder(name) for name in names if "/" in name})
    if not loose and len(classes) >= 2:
        return tuple(classes)
    if labels == "auto":
        return ()
    where = f"{loose[0]} lies in no subfolder" if loose else f"there is only the subfolder {classes[0]}"
    raise InputError(f"{root}: labels folders needs a subfolder for each of two or more classes, but {where}")


def _utf8(name: str) -> str:
    """A file name that is no text in the system's encoding gets escapes, so that it can be hashed and printed."""
    return name.encode(errors="backslashreplace").decode()


def _first_folder(name: str) -> str:
    return name.partition("/")[0]


def in_split(sha256: str, split: str, holdout: float) -> bool:
    """Whether a picture belongs to a split: by its content alone, so copies of a picture fall on the same side."""
    return split in ("all", split_of(sha256, validation=holdout, test=0.0))


# -- rows for streams ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmented:
    """`rows(ids, seeds)` of a stream: random views of the pictures `ids`, each drawn from its own seed.

    One view: {"image": (B, C, H, W)}. Multi-crop: {"global_crops": (B, 2, C, H, W), "local_crops": (B, V, C, h, w)}.
    With `labelled`, "label": (B,) as well.
    """

    images: Images
    augment: AugmentConfig | MultiCropConfig
    labelled: bool = False

    def __call__(self, ids: Sequence[int], seeds: Sequence[int]) -> Batch:
        import torch

        pictures = [self.images.pil(i) for i in ids]
        batch = augment_batch(pictures, [Random(seed) for seed in seeds], self.augment)
        if self.labelled:
            batch["label"] = torch.tensor([self.images.label(i) for i in ids])
        return batch


def augmented(images: Images, augment: AugmentConfig | MultiCropConfig, labelled: bool = False) -> Augmented:
    if labelled and images.labels is None:
        raise InputError("these pictures have no labels; give a folder with one subfolder a class")
    return Augmented(images, augment, labelled)


def augment_batch(
    pictures: Sequence[Image.Image], rngs: Sequence[Random], augment: AugmentConfig | MultiCropConfig
) -> Batch:
    """Random views of pictures, picture i from generator i."""
    pairs = list(zip(pictures, rngs, strict=True))
    if isinstance(augment, MultiCropConfig):
        return _multi_crop(pairs, augment)
    view = augment.view()
    return {"image": views.to_tensor([view(picture, rng) for picture, rng in pairs], augment.mean, augment.std)}


def _multi_crop(pairs: Sequence[tuple[Image.Image, Random]], augment: MultiCropConfig) -> Batch:
    globals_, local = augment.global_views(), augment.local_view()
    large, small = [], []
    for picture, rng in pairs:
        large += [view(picture, rng) for view in globals_]
        small += [local(picture, rng) for _ in range(augment.local_crops)]
    batch = {"global_crops": _views(large, len(pairs), augment)}
    if small:
        batch["local_crops"] = _views(small, len(pairs), augment)
    return batch


def _views(pictures: Sequence[Image.Image], rows: int, augment: MultiCropConfig) -> Tensor:
    """B*V pictures, the views of a picture together -> (B, V, C, H, W)."""
    return views.to_tensor(pictures, augment.mean, augment.std).unflatten(0, (rows, -1))


def eval_batch(images: Images, ids: Sequence[int], config: EvalConfig) -> Tensor:
    """The fixed views of the pictures `ids`: (B, C, H, W)."""
    return views.to_tensor([views.eval_view(images.pil(i), config) for i in ids], config.mean, config.std)

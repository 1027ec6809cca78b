"""The pictures of the embedded world: every character of the world in every font that has it.

Drawn once (a few seconds), then kept in a cache folder and read by memory map. FLEDGE_CACHE names the folder,
~/.cache/fledge otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fledge.data.world.database import Split, character, codepoints
from fledge.errors import InputError

FORMAT = 1  # another number wherever the same fonts would be drawn differently
SIZE = 32  # pixels a side
Fonts = Literal["seen", "unseen", "all"]


@dataclass(frozen=True)
class Font:
    file: str
    """File name in matplotlib's folder of TrueType fonts."""
    family: str
    style: str
    seen: bool = True
    """False: a family kept out of training, to see whether shapes were learned or fonts."""
    ascii_only: bool = False
    """TeX fonts hold other glyphs at most code points; their letters and digits are where they should be."""


def _family(family: str, stem: str, styles: dict[str, str], **flags) -> list[Font]:
    return [Font(f"{stem}{suffix}.ttf", family, style, **flags) for suffix, style in styles.items()]


_SANS = {"": "regular", "-Bold": "bold", "-Oblique": "oblique", "-BoldOblique": "bold oblique"}
_SERIF = {"": "regular", "-Bold": "bold", "-Italic": "italic", "-BoldItalic": "bold italic"}
_STIX = {"": "regular", "Bol": "bold", "Italic": "italic", "BolIta": "bold italic"}

# Not here: LastResort (boxes for everything); cmsy, cmex, cmmi, STIXNonUni, STIXSiz (other glyphs at ASCII points).
FONTS: tuple[Font, ...] = (
    *_family("dejavu sans", "DejaVuSans", _SANS),
    *_family("dejavu sans mono", "DejaVuSansMono", _SANS),
    *_family("dejavu serif", "DejaVuSerif", _SERIF),
    Font("DejaVuSansDisplay.ttf", "dejavu sans display", "regular"),
    Font("DejaVuSerifDisplay.ttf", "dejavu serif display", "regular"),
    Font("cmr10.ttf", "computer modern roman", "regular", ascii_only=True),
    Font("cmb10.ttf", "computer modern roman", "bold", ascii_only=True),
    Font("cmti10.ttf", "computer modern roman", "italic", ascii_only=True),
    Font("cmss10.ttf", "computer modern sans", "regular", ascii_only=True),
    Font("cmtt10.ttf", "computer modern typewriter", "regular", ascii_only=True),
    *_family("stix general", "STIXGeneral", _STIX, seen=False),
)


class Glyphs:
    """A selection of the pictures. Ink is 255, paper 0. Reads from the memory map; pickles as its arguments, so that
    a worker process opens the file itself."""

    def __init__(self, split: Split | None = None, fonts: Fonts = "all", size: int = SIZE):
        self.split, self.fonts, self.size = split, fonts, size
        self._images, codepoint, font = _open(size)
        self._rows = np.flatnonzero(_selected(codepoint, font, split, fonts))
        self.codepoint: np.ndarray = codepoint[self._rows]  # (N,) int32
        self.font: np.ndarray = font[self._rows]  # (N,) int16, an index into FONTS

    def __reduce__(self):
        return Glyphs, (self.split, self.fonts, self.size)

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, i: int) -> np.ndarray:
        """(size, size) uint8"""
        return np.array(self._images[self._rows[i]])

    def images(self, ids: Sequence[int] | np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n, size, size) uint8, a copy"""
        return np.array(self._images[self._rows[ids]])

    @functools.cached_property
    def script(self) -> np.ndarray:
        """(N,) str: the script or class of each picture's character."""
        return np.array([character(c).script for c in self.codepoint.tolist()])


@functools.lru_cache(maxsize=16)
def glyphs(split: Split | None = None, fonts: Fonts = "all", size: int = SIZE) -> Glyphs:
    """The pictures of one split's characters (None: all) in the seen fonts, the unseen family, or all of them."""
    return Glyphs(split, fonts, size)


def _selected(codepoint: np.ndarray, font: np.ndarray, split: Split | None, fonts: Fonts) -> np.ndarray:
    """(N,) bool"""
    wanted = {"seen": (True,), "unseen": (False,), "all": (True, False)}
    if fonts not in wanted:
        raise InputError(f"world.glyphs: fonts={fonts!r}; expected 'seen', 'unseen' or 'all'.")
    keep = np.array([f.seen in wanted[fonts] for f in FONTS])[font]
    if split is not None:
        keep = keep & np.array([character(c).split == split for c in codepoint.tolist()])
    return keep


# --- drawing ---


def font_folder() -> Path:
    import matplotlib  # here and below: only drawing needs it

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def covered(font: Font) -> list[int]:
    """The code points of the world that a font has a glyph for, by its own character map."""
    from matplotlib import ft2font

    charmap = ft2font.FT2Font(str(font_folder() / font.file)).get_charmap()
    allowed = [c for c in codepoints() if not font.ascii_only or chr(c).isascii() and chr(c).isalnum()]
    return [c for c in allowed if charmap.get(c)]  # index 0 is .notdef, the box for a missing glyph


def draw(font: Font, codepoint_list: Sequence[int], size: int = SIZE) -> np.ndarray:
    """(n, size, size) uint8: ink centred across, standing on a common baseline so that a comma is no apostrophe; moved
    up or down, and made smaller, only as far as the margin of a sixteenth demands. A blank glyph gives zeros."""
    from PIL import ImageFont

    path, box = font_folder() / font.file, size - 2 * _margin(size)

    @functools.cache
    def face(points: int):
        # BASIC: no shaping library, whose presence and version would change pictures
        return ImageFont.truetype(str(path), points, layout_engine=ImageFont.Layout.BASIC)

    def ink(char: str) -> tuple[np.ndarray, int]:
        """The cropped ink and its top, in pixels above the baseline."""
        points = size * 3 // 4
        while True:
            mask, (_, top) = face(points).getmask2(char, mode="L", anchor="ls")
            width, height = mask.size
            if max(width, height) <= box or points == 1:
                return np.array(mask, dtype=np.uint8).reshape(height, width), -top
            points = max(1, min(points - 1, points * box // max(width, height)))

    pictures = np.zeros((len(codepoint_list), size, size), np.uint8)
    for picture, c in zip(pictures, codepoint_list, strict=True):
        _place(picture, *ink(chr(c)))
    return pictures


def _margin(size: int) -> int:
    return max(1, size // 16)


def _place(picture: np.ndarray, ink: np.ndarray, top: int) -> None:
    size, margin, (height, width) = len(picture), _margin(len(picture)), ink.shape
    row = min(max(size * 3 // 4 - top, margin), size - margin - height)
    column = (size - width) // 2
    picture[row : row + height, column : column + width] = ink


def draw_all(size: int = SIZE, fonts: Sequence[Font] = FONTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (N, size, size) uint8, code points (N,) int32, fonts (N,) int16; font after font, by code point."""
    images, points, index = [], [], []
    for font in fonts:
        have = np.array(covered(font), np.int32)
        pictures = draw(font, have.tolist(), size)
        inked = pictures.any(axis=(1, 2))
        images.append(pictures[inked])
        points.append(have[inked])
        index.append(np.full(inked.sum(), FONTS.index(font), np.int16))
    return np.concatenate(images), np.concatenate(points), np.concatenate(index)


# --- cache ---


def cache_folder() -> Path:
    return Path(os.environ.get("FLEDGE_CACHE") or Path.home() / ".cache" / "fledge")


@functools.lru_cache(maxsize=1)
def font_digests() -> dict[str, str]:
    """sha256 of every font file that is drawn."""
    missing = [f.file for f in FONTS if not (font_folder() / f.file).is_file()]
    if missing:
        raise InputError(
            f"The fonts of the embedded world are not all in {font_folder()}: no {', '.join(missing)}. They ship with "
            "matplotlib; install it from PyPI (`pip install --force-reinstall matplotlib`)."
        )
    return {f.file: hashlib.sha256((font_folder() / f.file).read_bytes()).hexdigest() for f in FONTS}


def recipe(size: int = SIZE) -> dict:
    """Everything that the pictures are a function of."""
    from PIL import features

    return {
        "format": FORMAT,
        "size": size,
        "characters": hashlib.sha256(repr(codepoints()).encode()).hexdigest(),
        "fonts": font_digests(),
        "freetype": features.version("freetype2"),  # the rasteriser that Pillow brings
    }


def fingerprint(size: int = SIZE) -> str:
    return hashlib.sha256(json.dumps(recipe(size), sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _open(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not 8 <= size <= 256:
        raise InputError(f"world.glyphs: size={size}; expected 8 to 256 pixels a side.")
    folder = cache_folder() / "world" / f"glyphs-{size}-{fingerprint(size)[:16]}"
    return _read(folder) or _write(folder, size)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.data).hexdigest()


_PARTS = ("images", "codepoint", "font")


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """None where there is no cache or it is damaged: then it is drawn again."""
    try:
        table = json.loads((folder / "table.json").read_text())
        images, codepoint, font = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS)
    except (OSError, ValueError, EOFError):
        return None
    whole = [_sha256(a) for a in (images, codepoint, font)] == [table.get(p) for p in _PARTS]
    return (images, np.array(codepoint), np.array(font)) if whole else None


def _write(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw, write aside, rename: another process sees all of it or nothing."""
    arrays = draw_all(size)
    table = dict(zip(_PARTS, map(_sha256, arrays), strict=True)) | {"recipe": recipe(size)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        for part, array in zip(_PARTS, arrays, strict=True):
            np.save(aside / f"{part}.npy", array)
        (aside / "table.json").write_text(json.dumps(table))
        put_in_place(aside, folder)
    except OSError as e:
        raise InputError(
            f"The embedded world cannot be cached in {folder.parent}: {e}. Set FLEDGE_CACHE to a folder that can be "
            "written (it takes about 60 MB)."
        ) from e
    return _read(folder) or arrays


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`; what stands there is either damaged or another process's equal copy."""
    try:
        aside.rename(folder)
    except OSError:
        if folder.is_dir() and _read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)

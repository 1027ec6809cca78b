"""The characters of the embedded world: what the Unicode database says about each, and which split it is in.

Standard library only, and the same answers on every Python from 3.11 on. A newer Python knows a newer Unicode, so the
characters are a closed list (`RANGES`), all assigned in Unicode 14.0, the version of Python 3.11, and every fact about
a character mentions only characters of that list: a capital letter invented after 14.0 is not in the world. Names and
decompositions never change once assigned (Unicode's stability policy); the few other properties that did change since
are kept out of the list. The test of `facts()` pins the outcome.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

UNICODE = "14.0.0"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Code points, hexadecimal, that the DejaVu or STIXGeneral fonts draw and that Unicode 14.0 assigns; no controls, spaces
# or private use; without those whose picture is blank (U+034F, U+2800, U+FFFC, variation selectors) and without U+0295,
# which later versions of Unicode moved from lowercase to caseless.
RANGES = """
21-7e a1-ac ae-294 296-2e9 2ec-2f0 2f3 2f7 300-34e 351-353 357-35a 35c-362 370-377 37a-37e 384-38a 38c 38e-3a1
3a3-525 531-556 559-55f 561-587 589-58a 5b0-5c3 5c6-5c7 5d0-5ea 5f0-5f4 606-607 609-60a 60c 615 61b 61f 621-63a
640-655 657 65a 660-670 674 679-6bf 6c6-6c8 6cb-6cc 6ce 6d0 6d5 6f0-6f9 7c0-7e7 7eb-7f5 7f8-7fa e3f e81-e82 e84
e87-e88 e8a e8d e94-e97 e99-e9f ea1-ea3 ea5 ea7 eaa-eab ead-eb9 ebb-ebd ec0-ec4 ec6 ec8-ecd ed0-ed9 edc-edd
10a0-10c5 10d0-10fc 1401-1407 1409-141b 141d-1435 1437-144a 144c-1452 1454-14bd 14c0-14ea 14ec-1507 1510-153e
1540-1550 1552-156a 1574-1585 158a-1596 15a0-15af 15de 15e1 1646-1647 166e-1676 1681-169c 1d00-1d6b 1d77-1d78
1d7b-1d7f 1d81 1d84-1d85 1d8a 1d8d-1d8e 1d9b-1dbf 1dc4-1dc9 1e00-1efb 1f00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d
1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fc4 1fc6-1fd3 1fd6-1fdb 1fdd-1fef 1ff2-1ff4 1ff6-1ffe 2010-2027
2030-205e 2070-2071 2074-208e 2090-209c 20a0-20b5 20b8-20ba 20bd 20d0-20d2 20d6-20d7 20db-20df 20e1 20e4-20f0
2100-214b 214e 2150-2185 2189 2190-231a 231c-232e 2332 2335-237a 237c-237d 2380-2383 2387-238b 2393-2395 239b-23af
23b4-23b7 23ce-23d0 23dc-23e8 2422-2423 2460-2469 24b6-24ea 2500-269c 269e-26b8 26c0-26c3 26e2 2701-2704 2706-2709
270c-2727 2729-274b 274d 274f-2752 2756 2758-275e 2761-2794 2798-27af 27b1-27c9 27cc 27d0-27ff 2801-2afb 2afd-2afe
2b00-2b4c 2b50-2b54 2c60-2c77 2c79-2c7f 2d00-2d25 2d30-2d65 2d6f 2e18 2e1f 2e22-2e25 2e2e 3012 3030 306e 4dc0-4dff
a4d0-a4ff a644-a647 a64c-a64d a650-a651 a654-a657 a662-a66e a68a-a68d a694-a695 a708-a716 a71b-a71f a722-a741
a746-a74b a74e-a753 a756-a757 a764-a769 a77b-a77c a780-a787 a789-a78e a790-a791 a7a0-a7aa a7f8-a7ff fb00-fb06
fb13-fb17 fb1d-fb36 fb38-fb3c fb3e fb40-fb41 fb43-fb44 fb46-fb4f fb52-fba3 fbaa-fbad fbd3-fbdc fbde-fbdf fbe4-fbe9
fbfc-fbff fe20-fe23 fe70-fe74 fe76-fefc fffd 10300-1031e 10320-10323 1d300-1d356 1d400-1d454 1d456-1d49c 1d49e-1d49f
1d4a2 1d4a5-1d4a6 1d4a9-1d4ac 1d4ae-1d4b9 1d4bb 1d4bd-1d4c3 1d4c5-1d505 1d507-1d50a 1d50d-1d514 1d516-1d51c
1d51e-1d539 1d53b-1d53e 1d540-1d544 1d546 1d54a-1d550 1d552-1d6a5 1d6a8-1d7cb 1d7ce-1d7ff 1ee00-1ee03 1ee05-1ee1f
1ee21-1ee22 1ee24 1ee27 1ee29-1ee32 1ee34-1ee37 1ee39 1ee3b 1ee61-1ee62 1ee64 1ee67-1ee6a 1ee6c-1ee72 1ee74-1ee77
1ee79-1ee7c 1ee7e 1f030-1f093 1f0a0-1f0ae 1f0b1-1f0be 1f0c1-1f0cf 1f0d1-1f0df 1f42d-1f42e 1f431 1f435 1f600-1f623
1f625-1f62b 1f62d-1f640
"""

CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lt": "titlecase letter",
    "Lm": "modifier letter",
    "Lo": "caseless letter",
    "Mn": "nonspacing mark",
    "Me": "enclosing mark",
    "Mc": "spacing mark",
    "Nd": "decimal digit",
    "Nl": "letter number",
    "No": "other number",
    "Pc": "connecting punctuation",
    "Pd": "dash",
    "Ps": "opening punctuation",
    "Pe": "closing punctuation",
    "Pi": "initial quotation mark",
    "Pf": "final quotation mark",
    "Po": "other punctuation",
    "Sm": "mathematical symbol",
    "Sc": "currency symbol",
    "Sk": "modifier symbol",
    "So": "other symbol",
}

# `unicodedata` has no script property: the script is the first word of the name, from this closed list ...
SCRIPTS = {word: word for word in (
    "latin", "greek", "cyrillic", "arabic", "hebrew", "armenian", "georgian", "canadian",
    "tifinagh", "nko", "lisu", "ogham", "lao", "coptic", "braille",
)} | {"old": "old italic"}  # fmt: skip
# ... and everything else belongs to no script but to one of these classes.
CLASSES = ("mathematical", "arrow", "operator", "number", "punctuation", "mark", "modifier", "letterlike", "symbol")

# Greek and a few other names call a combining mark by another word than the mark's own name.
MARK_ALIASES = {
    "acute": "acute accent",
    "grave": "grave accent",
    "circumflex": "circumflex accent",
    "circumflex below": "circumflex accent below",
    "double acute": "double acute accent",
    "double grave": "double grave accent",
    "oxia": "acute accent",
    "tonos": "acute accent",
    "varia": "grave accent",
    "dasia": "reversed comma above",
    "psili": "comma above",
    "prosgegrammeni": "ypogegrammeni",
    "dialytika": "diaeresis",
    "vrachy": "breve",
    "line below": "macron below",
    "stroke": "long solidus overlay",
    "madda above": "maddah above",
    "dagesh": "dagesh or mapiq",
    "mapiq": "dagesh or mapiq",
}
PLAIN_TAGS = ("<font>", "<isolated>", "<final>", "<initial>", "<medial>", "<super>", "<sub>", "<circle>")
# What the name of a plain form may say beyond the name it comes from ("superscript two" is a "digit two").
PLAIN_WORDS = frozenset({"latin", "greek", "arabic", "letter", "digit"})


@dataclass(frozen=True)
class Character:
    """One character and its facts. Relations are code points of other characters of the world, or None."""

    codepoint: int
    name: str
    """The Unicode name in lower case."""
    category: str
    """General category in words: "lowercase letter"."""
    script: str
    """A value of SCRIPTS, or one of CLASSES."""
    split: Split
    capital: int | None
    """The capital of a small letter."""
    small: int | None
    """The small form of a capital letter."""
    base: int | None
    """The letter that is left when all marks are taken off; only where the name says so ("... with acute")."""
    marks: tuple[str, ...]
    """Those marks, in the order and in the words of the name."""
    plain: int | None
    """The ordinary character of which this is a font, position or circled variant; only where the name tells."""
    value: str | None
    """Numeric value: "7" or "3/4"."""

    @property
    def char(self) -> str:
        return chr(self.codepoint)

    @property
    def case(self) -> str | None:
        """small, capital or none for letters whose name tells, None for everything else."""
        words = self.name.split()
        if self.category == "caseless letter":
            cased = {"small", "capital"} & set(words) or self.char.islower()  # the ordinal indicators do
            return None if cased else "none"
        case = {"lowercase letter": "small", "uppercase letter": "capital"}.get(self.category)
        return case if case and {"small", "capital"} & set(words) == {case} else None


@lru_cache(maxsize=1)
def codepoints() -> tuple[int, ...]:
    """All code points of the world, ascending."""
    ends = (part.split("-") for part in RANGES.split())
    return tuple(c for end in ends for c in range(int(end[0], 16), int(end[-1], 16) + 1))


@lru_cache(maxsize=1)
def _members() -> frozenset[int]:
    return frozenset(codepoints())


def name(codepoint: int) -> str:
    return unicodedata.name(chr(codepoint)).lower()


def hashed(*key: str) -> int:
    """A 64-bit hash of strings that no interpreter, platform or PYTHONHASHSEED changes."""
    return int.from_bytes(hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest(), "little")


def split_of(*key: str) -> Split:
    """80 % train, 10 % validation, 10 % test, by the hash of a key."""
    draw = hashed("split", *key) % 10
    return "train" if draw < 8 else "validation" if draw == 8 else "test"


def family(codepoint: int) -> str:
    """What is hashed to choose the split: the case-folded, decomposed character, so that case pairs (and the ohm sign
    and omega) are always in the same split. See docs/world.md for what counts as a leak."""
    return unicodedata.normalize("NFD", chr(codepoint).casefold())


def script(codepoint: int) -> str:
    words, category = name(codepoint).split(), unicodedata.category(chr(codepoint))
    if words[0] in SCRIPTS:
        return SCRIPTS[words[0]]
    if words[0] == "mathematical":
        return "mathematical"
    if category[0] != "M" and ("arrow" in words or "arrows" in words):
        return "arrow"
    by_category = {"Sm": "operator", "Lm": "modifier", "Sk": "modifier"}
    by_major = {"N": "number", "P": "punctuation", "M": "mark", "L": "letterlike"}
    return by_category.get(category) or by_major.get(category[0], "symbol")


def _swapped_case(codepoint: int, old: str, new: str, other: str) -> int | None:
    """`other` if it is one character of the world and its name differs by the word for the case alone."""
    if len(other) != 1 or ord(other) == codepoint or ord(other) not in _members():
        return None
    words = name(codepoint).split()
    swapped = [new if word == old else word for word in words]
    return ord(other) if swapped != words and name(ord(other)).split() == swapped else None


def capital(codepoint: int) -> int | None:
    return _swapped_case(codepoint, "small", "capital", chr(codepoint).upper())


def small(codepoint: int) -> int | None:
    return _swapped_case(codepoint, "capital", "small", chr(codepoint).lower())


def _mark(word: str) -> str:
    return MARK_ALIASES.get(word, word)


def _mark_name(char: str) -> str:
    """combining greek perispomeni -> perispomeni"""
    words = unicodedata.name(char).lower().split()
    while words[0] in ("combining", "greek", "hebrew", "arabic", "point"):
        words = words[1:]
    return " ".join(words)


def base_and_marks(codepoint: int) -> tuple[int | None, tuple[str, ...]]:
    """The base letter and its marks by canonical decomposition, where the name spells out the same marks."""
    base, *combining = unicodedata.normalize("NFD", chr(codepoint))
    head, _, tail = name(codepoint).partition(" with ")
    marks = tuple(tail.split(" and ")) if tail else ()
    if not combining or ord(base) not in _members() or unicodedata.category(base)[0] != "L" or head != name(ord(base)):
        return None, ()
    if sorted(map(_mark, marks)) != sorted(map(_mark_name, combining)):
        return None, ()
    return ord(base), marks


def plain(codepoint: int) -> int | None:
    tag, *parts = unicodedata.decomposition(chr(codepoint)).split() or [""]
    if tag not in PLAIN_TAGS or len(parts) != 1 or int(parts[0], 16) not in _members():
        return None
    target = int(parts[0], 16)
    return target if set(name(target).split()) <= set(name(codepoint).split()) | PLAIN_WORDS else None


def value(codepoint: int) -> str | None:
    number = unicodedata.numeric(chr(codepoint), None)
    return None if number is None else str(Fraction(number).limit_denominator(1000))


@lru_cache(maxsize=1)
def _table() -> dict[int, Character]:
    return {c: _character(c) for c in codepoints()}


def _character(c: int) -> Character:
    base, marks = base_and_marks(c)
    return Character(
        codepoint=c,
        name=name(c),
        category=CATEGORIES[unicodedata.category(chr(c))],
        script=script(c),
        split=split_of("character", family(c)),
        capital=capital(c),
        small=small(c),
        base=base,
        marks=marks,
        plain=plain(c),
        value=value(c),
    )


def character(codepoint: int) -> Character:
    """KeyError where the code point is not in the world."""
    return _table()[codepoint]


def characters(split: Split | None = None) -> tuple[Character, ...]:
    """The characters of one split, or of the whole world, by ascending code point."""
    return tuple(c for c in _table().values() if split in (None, c.split))


def facts() -> str:
    """Digest of every fact about every character; the same on every supported Python."""
    return hashlib.sha256("\n".join(repr((c, c.case)) for c in characters()).encode()).hexdigest()

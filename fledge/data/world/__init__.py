"""The world that ships with fledge: characters, their pictures, names and properties, and Python's own prose.

No download; deterministic; every answer can be checked against the Unicode database. `docs/world.md` shows it.

    from fledge.data import world
    world.glyphs("train", fonts="seen").images([0, 1, 2])       # (3, 32, 32) uint8, ink 255
    world.documents("statements", "train"), world.documents("prose", "test")
    world.pairs("train", fonts="seen").captions(0)
    world.questions("test"), world.preferences("train"), world.gold(question, "latin small letter e")
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from typing import Any

from fledge.data.world.database import (
    CLASSES,
    SCRIPTS,
    SPLITS,
    UNICODE,
    Character,
    Split,
    character,
    characters,
    facts,
    family,
)
from fledge.data.world.drawing import FONTS, SIZE, Font, Fonts, Glyphs, cache_folder, font_digests, glyphs
from fledge.data.world.drawing import fingerprint as _glyphs_fingerprint
from fledge.data.world.tasks import (
    KINDS,
    Pairs,
    Preference,
    Question,
    answer,
    gold,
    pairs,
    preferences,
    questions,
    script_prompts,
)
from fledge.data.world.text import Kind, documents

__all__ = [
    "CLASSES",
    "FONTS",
    "KINDS",
    "PARTS",
    "SCRIPTS",
    "SIZE",
    "SPLITS",
    "UNICODE",
    "Character",
    "Font",
    "Fonts",
    "Glyphs",
    "Kind",
    "Pairs",
    "Preference",
    "Question",
    "Split",
    "answer",
    "cache_folder",
    "character",
    "characters",
    "digest",
    "documents",
    "facts",
    "family",
    "fingerprint",
    "glyphs",
    "gold",
    "pairs",
    "preferences",
    "questions",
    "script_prompts",
]


def _content(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _captions() -> str:
    from fledge.data.world.tasks import CAPTIONS, SCRIPT_PROMPTS

    return _content([facts(), CAPTIONS, SCRIPT_PROMPTS])


# What each part of the world is known by: its content, with the splits; for pictures, all that they are drawn from.
PARTS: dict[str, Callable[[], str]] = {
    "glyphs": lambda: _content([_glyphs_fingerprint(), facts()]),
    "captions": _captions,
    "statements": lambda: _content([documents("statements", split) for split in SPLITS]),
    "prose": lambda: _content([documents("prose", split) for split in SPLITS]),
    "questions": lambda: _content([questions(split) for split in SPLITS]),
    "preferences": lambda: _content([preferences(split) for split in SPLITS]),
}


def fingerprint(*parts: str) -> str:
    """sha256 of the named PARTS (none: all), for the identity of a run that reads them. Draws no picture."""
    return _content([[part, PARTS[part]()] for part in (parts or PARTS)])


def digest(*parts: str) -> dict[str, Any]:
    """For manifests: the versions, fonts and counts behind the named PARTS (none: all)."""
    parts = parts or tuple(PARTS)
    about: dict[str, Any] = {
        "source": "world",
        "unicode": UNICODE,
        "characters": {split: len(characters(split)) for split in SPLITS},
        "parts": {part: PARTS[part]() for part in parts},
    }
    if "glyphs" in parts:
        from fledge.data.world.drawing import recipe

        about["fonts"], about["freetype"] = font_digests(), recipe()["freetype"]
        about["pictures"] = {kind: len(glyphs(fonts=kind)) for kind in ("seen", "unseen")}
    if "prose" in parts:
        about["python"] = platform.python_version()
    for kind in ("statements", "prose"):
        if kind in parts:
            about[kind] = {split: len(documents(kind, split)) for split in SPLITS}
    for name, rows in (("questions", questions), ("preferences", preferences)):
        if name in parts:
            about[name] = {split: len(rows(split)) for split in SPLITS}
    return about

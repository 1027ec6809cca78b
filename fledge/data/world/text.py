"""The texts of the embedded world: statements about characters, and prose from Python's own documentation.

Standard library only. A statement document is about one character and lives in that character's split; a prose
document is one topic of `pydoc_data.topics` or the docstrings of one standard-library module, and its split is the hash
of its name. A paragraph that several documents share is kept in one of them only, so no test paragraph was trained on.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fledge.data.world.database import Character, Split, characters, hashed, name, split_of
from fledge.errors import InputError

Kind = Literal["statements", "prose"]
PROSE_FORMAT = 1  # another number wherever the same Python would give other prose

# Tests, graphical programs, generated code pages and jokes; nothing is imported either way, sources are only parsed.
_SKIP = frozenset((
    "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__",
    "encodings", "pydoc_data", "ensurepip", "lib-dynload", "this.py", "antigravity.py",
))  # fmt: skip
_SHORTEST_PARAGRAPH = 40  # characters; a shorter one ("Examples:") may stand in many documents
_SHORTEST_DOCUMENT = 200


def documents(kind: Kind, split: Split | None = None) -> list[str]:
    """All documents of one kind and split (None: of the whole world)."""
    if kind == "statements":
        return [statement(c) for c in characters(split)]
    if kind == "prose":
        return [text for title, text in prose() if split in (None, split_of("prose", title))]
    raise InputError(f"world.documents: kind={kind!r}; expected 'statements' or 'prose'.")


# --- statements ---


def relations(c: Character) -> list[str]:
    """The facts that lead from a character to others; each reads like the question about it, with its answer."""
    said = []
    if c.capital is not None:
        said.append(f"its capital form is {name(c.capital)}.")
    if c.small is not None:
        said.append(f"its small form is {name(c.small)}.")
    if c.base is not None:
        said.append(f"its base letter is {name(c.base)}.")
        said.append(f"its marks are {' and '.join(c.marks)}.")
    if c.plain is not None:
        said.append(f"its plain form is {name(c.plain)}.")
    return said


def properties(c: Character) -> list[str]:
    said = [f"its category is {c.category}.", f"its code point is u+{c.codepoint:04x}.", f"its script is {c.script}."]
    if c.case is not None:
        said.append(f"its case is {c.case}.")
    if c.value is not None:
        said.append(f"its value is {c.value}.")
    return said


def statement(c: Character) -> str:
    """One document: the name, then the facts in an order of the character's own, so that none is known by its place."""
    facts = relations(c) + properties(c)
    random.Random(hashed("statement", c.name)).shuffle(facts)
    return f"this is {c.name}. " + " ".join(facts)


# --- prose ---


@functools.lru_cache(maxsize=1)
def prose() -> tuple[tuple[str, str], ...]:
    """(title, text) of every prose document of this Python, from the cache once it was read."""
    from fledge.data.world.drawing import cache_folder

    path = cache_folder() / "world" / f"prose-{_prose_key()[:16]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if _digest(kept["documents"]) == kept["sha256"]:
            return tuple((title, text) for title, text in kept["documents"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = read_prose()
    _keep(path, {"documents": found, "sha256": _digest(found)})
    return tuple(found)


def read_prose() -> list[tuple[str, str]]:
    """Topics and docstrings, shortest document first; a paragraph stays in the first document that has it."""
    raw = sorted([*_topics(), *_docstrings()], key=lambda item: (len(item[1]), item[0]))
    seen: set[str] = set()
    cleaned = ((title, _unseen_paragraphs(text, seen)) for title, text in raw)
    return sorted((title, text) for title, text in cleaned if len(text) >= _SHORTEST_DOCUMENT)


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split()).lower()
        if len(key) >= _SHORTEST_PARAGRAPH and key in seen:
            continue
        seen.add(key)
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept).strip("\n")


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the docstrings remain
        return
    for title, text in topics.items():
        yield f"topic {title}", "\n".join(line.rstrip() for line in text.strip().splitlines())


def _sources() -> list[tuple[str, Path]]:
    """(path relative to the standard library, file), sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    kept = ((r, p) for r, p in files if not _SKIP & set(r.parts) and not r.parts[0].startswith("config-"))
    return sorted((r.as_posix(), p) for r, p in kept)


def _docstrings() -> Iterator[tuple[str, str]]:
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for title, path in _sources():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # a template, or a file only root may read
            continue
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, definitions)]
        if any(found):
            yield f"module {title}", "\n\n".join(d for d in found if d)


def _prose_key() -> str:
    listing = [(title, path.stat().st_size) for title, path in _sources()]
    return hashlib.sha256(repr((PROSE_FORMAT, sys.version, listing)).encode()).hexdigest()


def _digest(found: list) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _keep(path: Path, content: dict) -> None:
    """Written aside, then renamed. A cache that cannot be written costs seconds the next time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            json.dump(content, f)
        os.replace(aside, path)
    except OSError:
        pass

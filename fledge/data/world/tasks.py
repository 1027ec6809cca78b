"""Tasks whose answers the Unicode database settles: questions (SFT), preferences (reward model), a gold score (PPO),
and names for pictures (CLIP). Standard library only, but for the pictures themselves."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from typing import TypedDict

from fledge.data.world.database import SCRIPTS, Character, Split, character, characters, hashed, name
from fledge.data.world.drawing import FONTS, SIZE, Fonts, Glyphs, glyphs

# --- questions ---


class Question(TypedDict):
    prompt: str
    answer: str
    codepoint: int
    kind: str


def _named(codepoint: int | None) -> str | None:
    return None if codepoint is None else name(codepoint)


# kind: how the prompt ends, and the answer or None where the question makes no sense. Every answer follows from the
# name in the prompt by a rule that can be learned on other characters.
KINDS: dict[str, tuple[str, Callable[[Character], str | None]]] = {
    "capital": ("its capital form?", lambda c: _named(c.capital)),
    "small": ("its small form?", lambda c: _named(c.small)),
    "base": ("its base letter?", lambda c: _named(c.base)),
    "marks": ("its marks?", lambda c: " and ".join(c.marks) or None),
    "plain": ("its plain form?", lambda c: _named(c.plain)),
    "case": ("its case?", lambda c: c.case),
    "script": ("its script?", lambda c: c.script if c.script in SCRIPTS.values() and c.case is not None else None),
    "value": ("its value?", lambda c: c.value),
}
MOST_OF_A_KIND = 800  # of the whole world: case and script could be asked of thousands and would drown the others


def answer(kind: str, codepoint: int) -> str | None:
    """The right answer by the Unicode database, None where the question does not apply."""
    return KINDS[kind][1](character(codepoint))


@functools.lru_cache(maxsize=1)
def _questions() -> tuple[Question, ...]:
    found: list[Question] = []
    for kind, (ending, solve) in KINDS.items():
        able = [(c, solved) for c in characters() if (solved := solve(c)) is not None]
        able.sort(key=lambda pair: hashed("question", kind, pair[0].name))
        found += [
            Question(prompt=f"{c.name}: {ending}", answer=solved, codepoint=c.codepoint, kind=kind)
            for c, solved in able[:MOST_OF_A_KIND]
        ]
    return tuple(sorted(found, key=lambda q: (q["codepoint"], q["kind"])))


def questions(split: Split | None = None) -> list[Question]:
    """Questions about the characters of one split, by code point and kind."""
    return [Question(**q) for q in _questions() if split in (None, character(q["codepoint"]).split)]


# --- the gold score ---


def gold(record: Mapping, answer_given: str) -> float:
    """How right an answer is, in [0, 1], judged by the Unicode database; `record` needs `codepoint` and `kind`.

    Exactly right (spaces aside): 1. Otherwise half the squared F1 of the longest common subsequence of words: some
    credit for the right words in the right order, less for every word missing, wrong, repeated or added, 0 for none.
    So an answer with one wrong word in four is worth 0.28, and no mistake more than 0.5.
    """
    right = answer(record["kind"], record["codepoint"])
    if right is None:
        raise ValueError(f"{record['kind']} cannot be asked of u+{record['codepoint']:04x}")
    want, got = right.split(), answer_given.split()
    if want == got:
        return 1.0
    f1 = 2 * _common(want, got) / (len(want) + len(got))
    return 0.5 * f1**2


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0  # the row above, one to the left
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


# --- preferences ---


class Preference(TypedDict):
    prompt: str
    chosen: str
    rejected: str
    codepoint: int
    kind: str
    corruption: str


REJECTED_PER_QUESTION = 4


@functools.lru_cache(maxsize=1)
def _mark_words() -> tuple[str, ...]:
    return tuple(sorted({mark for c in characters() for mark in c.marks}))


@functools.lru_cache(maxsize=1)
def _letters() -> dict[str, tuple[str, ...]]:
    """Script -> the names of its letters, as in "greek small letter alpha"."""
    pool: dict[str, set[str]] = {}
    for c in characters():
        head, _, letter = c.name.partition(" letter ")
        if letter and " " not in letter:
            pool.setdefault(head.split()[0], set()).add(letter)
    return {script: tuple(sorted(letters)) for script, letters in pool.items()}


@functools.lru_cache(maxsize=1)
def _answers() -> dict[str, tuple[str, ...]]:
    return {kind: tuple(sorted({q["answer"] for q in _questions() if q["kind"] == kind})) for kind in KINDS}


@functools.lru_cache(maxsize=1)
def _words() -> tuple[str, ...]:
    return tuple(sorted({word for q in _questions() for word in q["answer"].split()}))


def _wrong_mark(q: Question, rng: random.Random) -> str | None:
    head, joint, tail = q["answer"].rpartition(" with ")
    if not joint and q["kind"] != "marks":
        return None
    marks = tail.split(" and ")
    marks[rng.randrange(len(marks))] = rng.choice(_mark_words())
    return head + joint + " and ".join(marks)


def _wrong_case(q: Question, rng: random.Random) -> str | None:
    swap = {"small": "capital", "capital": "small"}
    return " ".join(swap.get(word, word) for word in q["answer"].split())


def _wrong_letter(q: Question, rng: random.Random) -> str | None:
    words = q["answer"].split()
    if "letter" not in words[:-1] or words[0] not in _letters():
        return None
    words[words.index("letter") + 1] = rng.choice(_letters()[words[0]])
    return " ".join(words)


def _truncated(q: Question, rng: random.Random) -> str | None:
    words = q["answer"].split()
    return " ".join(words[: rng.randrange(1, len(words))]) if len(words) > 1 else None


def _repeated(q: Question, rng: random.Random) -> str | None:
    words = q["answer"].split()
    at = rng.randrange(len(words))
    return " ".join(words[: at + 1] + words[at:])


def _garbled(q: Question, rng: random.Random) -> str | None:
    """One word runs into the end of another, as a model that spells in pieces of words does."""
    words = q["answer"].split()
    at, other = rng.randrange(len(words)), rng.choice(_words())
    words[at] = words[at][: rng.randrange(1, len(words[at]) + 1)] + other[rng.randrange(1, len(other) + 1) :]
    return " ".join(words)


def _another(q: Question, rng: random.Random) -> str | None:
    return rng.choice(_answers()[q["kind"]])


def _copied(q: Question, rng: random.Random) -> str | None:
    return character(q["codepoint"]).name


# Each gives a wrong answer, or None (or the right one by chance) where it does not apply. Near misses change what the
# question is about; the others fit every answer and would outnumber them if drawn from one pot.
NEAR_MISSES: dict[str, Callable[[Question, random.Random], str | None]] = {
    "mark": _wrong_mark,
    "case": _wrong_case,
    "letter": _wrong_letter,
}
OTHERS: dict[str, Callable[[Question, random.Random], str | None]] = {
    "truncated": _truncated,
    "repeated": _repeated,
    "garbled": _garbled,
    "another": _another,
    "copied": _copied,
}
CORRUPTIONS = NEAR_MISSES | OTHERS


def _rejected(q: Question) -> list[tuple[str, str]]:
    """(corruption, wrong answer), four different ones at most; two near misses at most, then the others."""
    rng = random.Random(hashed("preference", q["kind"], q["prompt"]))
    near, others = (rng.sample(sorted(pot), len(pot)) for pot in (NEAR_MISSES, OTHERS))
    wrong = {c: CORRUPTIONS[c](q, rng) for c in near + others}
    near, others = ([c for c in pot if wrong[c] not in (None, q["answer"])] for pot in (near, others))
    found: dict[str, str] = {}
    for corruption in near[:2] + others:
        found.setdefault(str(wrong[corruption]), corruption)
    return [(corruption, text) for text, corruption in found.items()][:REJECTED_PER_QUESTION]


def preferences(split: Split | None = None) -> list[Preference]:
    """The right answer beside corrupted ones, for every question of the split."""
    return [
        Preference(
            prompt=q["prompt"],
            chosen=q["answer"],
            rejected=wrong,
            codepoint=q["codepoint"],
            kind=q["kind"],
            corruption=corruption,
        )
        for q in questions(split)
        for corruption, wrong in _rejected(q)
    ]


# --- pictures and names ---

CAPTIONS = ("{name}", "a picture of {name}", "{name}, {style}", "{script}: {name}")
SCRIPT_PROMPTS = ("{script}", "a picture of {script}", "{script} letter")


class Pairs:
    """Pictures with captions; row i of `glyphs` is described by each of `captions(i)`."""

    def __init__(self, pictures: Glyphs):
        self.glyphs = pictures

    def __len__(self) -> int:
        return len(self.glyphs)

    def image(self, i: int):
        """(size, size) uint8, ink 255"""
        return self.glyphs.image(i)

    def name(self, i: int) -> str:
        return character(int(self.glyphs.codepoint[i])).name

    def captions(self, i: int) -> tuple[str, ...]:
        """The first is the bare name; the font's style is told, its family is not (a held-out family has no name)."""
        c, font = character(int(self.glyphs.codepoint[i])), FONTS[int(self.glyphs.font[i])]
        return tuple(t.format(name=c.name, style=font.style, script=c.script) for t in CAPTIONS)


def pairs(split: Split | None = None, fonts: Fonts = "all", size: int = SIZE) -> Pairs:
    return Pairs(glyphs(split, fonts, size))


def script_prompts(script: str) -> tuple[str, ...]:
    """What to compare a picture with for zero-shot classification by script: average their embeddings."""
    return tuple(t.format(script=script) for t in SCRIPT_PROMPTS)

"""The embedded world against the Unicode database, the fonts' own tables and itself drawn twice."""

import pickle
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from fledge.data import world
from fledge.data.world import drawing, text
from fledge.data.world.__main__ import counts
from fledge.data.world.database import codepoints
from fledge.errors import InputError

# Of the facts as Pythons 3.11 (Unicode 14.0), 3.12 (15.0) and 3.13 (15.1) give them: another Python, the same world.
FACTS = "cf6622d37b87c3e89c6df684918687dae6e49ee97274492be5daea7d11db997a"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Drawn and read anew: neither trusts nor touches the user's cache."""
    caches = (drawing._open, drawing.glyphs, text.prose)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


# --- characters ---


def test_the_same_facts_on_every_python():
    assert world.facts() == FACTS


def test_characters_are_assigned_and_visible():
    for c in codepoints():
        assert unicodedata.category(chr(c))[0] in "LMNPS", hex(c)
        assert not unicodedata.name(chr(c)).startswith("VARIATION SELECTOR")
    assert len(world.characters()) == len(set(codepoints())) > 7000


def test_relations_agree_with_python_strings():
    for c in world.characters():
        assert c.name == unicodedata.name(c.char).lower()
        if c.capital is not None:
            assert c.char.upper() == chr(c.capital)
        if c.small is not None:
            assert c.char.lower() == chr(c.small)
        if c.base is not None:
            decomposed = unicodedata.normalize("NFD", c.char)
            assert decomposed[0] == chr(c.base) and len(decomposed) == 1 + len(c.marks)
        if c.plain is not None:
            assert unicodedata.normalize("NFKC", c.char) == unicodedata.normalize("NFKC", chr(c.plain))
        if c.value is not None:
            assert float(Fraction(c.value)) == pytest.approx(unicodedata.numeric(c.char))
        if c.case == "small":
            assert c.char.islower()
        if c.case == "capital":
            assert c.char.isupper()
        if c.case == "none":
            assert c.char.isalpha() and not c.char.islower() and not c.char.isupper()


def test_examples_known_by_heart():
    e_acute = world.character(ord("é"))
    assert (chr(e_acute.capital), chr(e_acute.base), e_acute.marks) == ("É", "e", ("acute",))
    assert (e_acute.script, e_acute.case, e_acute.category) == ("latin", "small", "lowercase letter")
    assert world.character(ord("¾")).value == "3/4" and world.character(ord("Ⅻ")).value == "12"
    assert chr(world.character(ord("𝐀")).plain) == "A"
    assert world.character(ord("ộ")).marks == ("circumflex", "dot below")
    scripts = {"ж": "cyrillic", "א": "hebrew", "→": "arrow", "+": "operator", "?": "punctuation", "7": "number"}
    assert {char: world.character(ord(char)).script for char in scripts} == scripts


def test_splits_are_disjoint_whole_and_never_part_a_case_pair():
    sets = [{c.codepoint for c in world.characters(split)} for split in world.SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(codepoints())
    for share, members in zip((0.8, 0.1, 0.1), sets, strict=True):
        assert len(members) / len(codepoints()) == pytest.approx(share, abs=0.02)
    for c in world.characters():
        for other in {c.char.upper(), c.char.lower(), unicodedata.normalize("NFC", c.char)}:
            if len(other) == 1 and ord(other) in set.union(*sets):
                assert world.character(ord(other)).split == c.split, (c.name, other)


# --- pictures ---


def test_number_of_pictures_and_no_blank_among_them():
    everything = world.glyphs()
    assert 50_000 < len(everything) < 60_000
    images = everything.images()
    assert images.shape == (len(everything), 32, 32) and images.dtype == np.uint8
    assert (images.max(axis=(1, 2)) > 0).all()
    frame = np.ones((32, 32), bool)
    frame[2:-2, 2:-2] = False
    assert not images[:, frame].any()  # the margin


def test_unseen_family_is_never_among_the_seen_fonts():
    seen, unseen = world.glyphs(fonts="seen"), world.glyphs(fonts="unseen")
    families = [{world.FONTS[f].family for f in np.unique(g.font)} for g in (seen, unseen)]
    assert families[1] == {"stix general"} and not families[0] & families[1]
    assert len(seen) + len(unseen) == len(world.glyphs())


def test_pictures_of_a_split_are_of_its_characters():
    for split in world.SPLITS:
        own = {c.codepoint for c in world.characters(split)}
        assert set(world.glyphs(split).codepoint.tolist()) <= own
    assert sum(len(world.glyphs(split)) for split in world.SPLITS) == len(world.glyphs())


def test_covered_is_the_fonts_own_character_map():
    from fontTools.ttLib import TTFont  # another reader of fonts than the one that draws

    for font in (world.FONTS[4], next(f for f in world.FONTS if f.family == "stix general")):
        with TTFont(drawing.font_folder() / font.file) as tables:
            charmap = {c for c, glyph in tables.getBestCmap().items() if glyph != ".notdef"}
        assert set(drawing.covered(font)) == charmap & set(codepoints())


def test_tex_fonts_give_only_ascii_letters_and_digits():
    tex = [i for i, font in enumerate(world.FONTS) if font.ascii_only]
    everything = world.glyphs()
    chars = {chr(c) for c in everything.codepoint[np.isin(everything.font, tex)].tolist()}
    assert len(tex) == 5 and chars == set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")


def test_drawing_twice_gives_the_same_and_the_cache_is_what_was_drawn():
    font = world.FONTS[12]
    points = drawing.covered(font)
    first, again = drawing.draw(font, points), drawing.draw(font, points)
    assert np.array_equal(first, again)
    everything = world.glyphs()
    assert np.array_equal(everything.images(np.flatnonzero(everything.font == 12)), first)


def test_letters_stand_upright_on_one_line():
    """A full stop is at the bottom, an apostrophe at the top; an L has its ink left and low, a 7 high."""
    dot, apostrophe, ell, seven = drawing.draw(world.FONTS[0], [ord(c) for c in ".'L7"]).astype(float)
    assert dot[:16].sum() == 0 and apostrophe[20:].sum() == 0
    assert ell[16:].sum() > ell[:16].sum() and ell[:, :16].sum() > ell[:, 16:].sum()
    assert seven[:16].sum() > seven[16:].sum()


@pytest.mark.parametrize("size", [8, 64])
def test_any_size(size):
    pictures = drawing.draw(world.FONTS[0], [ord(c) for c in "aW∰"], size)
    assert pictures.shape == (3, size, size) and pictures.any(axis=(1, 2)).all()


def test_a_damaged_cache_is_drawn_again():
    before = world.glyphs().images(slice(0, 50))
    [file] = world.cache_folder().glob("world/glyphs-32-*/images.npy")
    with file.open("r+b") as f:
        f.seek(1000)
        f.write(b"\xff" * 64)
    drawing._open.cache_clear()
    assert np.array_equal(world.Glyphs().images(slice(0, 50)), before)
    assert not list(world.cache_folder().glob("world/.tmp-*"))


def test_a_selection_travels_to_a_worker_without_its_pixels():
    pictures = world.glyphs("test", "unseen")
    packed = pickle.dumps(pictures)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).image(7), pictures.image(7))


def test_wrong_arguments_are_sentences():
    with pytest.raises(InputError, match="seen"):
        world.glyphs(fonts="bold")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="size=2"):
        world.glyphs(size=2)
    with pytest.raises(InputError, match="statements"):
        world.documents("poems")  # type: ignore[arg-type]


# --- texts ---


def test_statements_tell_the_truth_about_their_own_split():
    for split in world.SPLITS:
        documents = world.documents("statements", split)
        assert len(documents) == len(world.characters(split))
        for c, document in zip(world.characters(split), documents, strict=True):
            assert document.startswith(f"this is {unicodedata.name(c.char).lower()}. ")
            assert f"its code point is u+{ord(c.char):04x}." in document
            if " its capital form is " in document:
                told = document.split(" its capital form is ")[1].split(".")[0]
                assert unicodedata.lookup(told) == c.char.upper()


def test_prose_is_plenty_and_shares_no_paragraph_between_splits():
    def paragraphs(split):
        words = (" ".join(p.split()).lower() for d in world.documents("prose", split) for p in d.split("\n\n"))
        return {p for p in words if len(p) >= 40}

    train, validation, test = map(paragraphs, world.SPLITS)
    assert not train & validation and not train & test and not validation & test
    assert sum(len(d) for d in world.documents("prose")) > 1_000_000
    assert min(len(world.documents("prose", split)) for split in world.SPLITS) >= 20
    assert tuple(text.read_prose()) == text.prose()


# --- questions, preferences, gold ---


def test_answers_by_another_way():
    """Straight from `unicodedata` and `str`, without the world's own facts."""
    for q in world.questions():
        char, subject = chr(q["codepoint"]), q["prompt"].split(":")[0]
        assert unicodedata.lookup(subject) == char
        decomposed = unicodedata.normalize("NFD", char)
        expected = {
            "capital": lambda c=char: unicodedata.name(c.upper()).lower(),
            "small": lambda c=char: unicodedata.name(c.lower()).lower(),
            "base": lambda d=decomposed: unicodedata.name(d[0]).lower(),
            "marks": lambda s=subject: s.split(" with ")[1],
            "plain": lambda c=char: unicodedata.name(
                chr(int(unicodedata.decomposition(c).split()[1], 16)),
            ).lower(),
            "case": lambda c=char: "small" if c.islower() else "capital" if c.isupper() else "none",
            "script": lambda s=subject: s.split()[0].replace("old", "old italic"),
            "value": lambda c=char: str(Fraction(unicodedata.numeric(c)).limit_denominator(1000)),
        }[q["kind"]]()
        assert q["answer"] == expected, q


def test_answers_follow_from_the_prompt():
    """Every word of an answer is in the prompt, or one of the few that every split's answers use."""
    common = {"small", "capital", "none", "latin", "greek", "arabic", "letter", "digit", "italic"}
    for q in world.questions():
        if q["kind"] != "value":
            assert set(q["answer"].split()) <= set(q["prompt"].split(":")[0].split()) | common, q


def test_questions_are_balanced_and_split_by_character():
    assert set(world.KINDS) == {q["kind"] for q in world.questions("test")}
    for split in world.SPLITS:
        own = {c.codepoint for c in world.characters(split)}
        assert {q["codepoint"] for q in world.questions(split)} <= own
        counts = [sum(q["kind"] == kind for q in world.questions(split)) for kind in world.KINDS if kind != "value"]
        assert max(counts) < 1.5 * min(counts)
    prompts = [q["prompt"] for q in world.questions()]
    assert len(prompts) == len(set(prompts))


def test_no_held_out_case_pair_is_told_in_training():
    """The leak rule: neither a held-out name nor its case partner's is the subject of a training text."""
    subjects = {d.split(". ")[0] for d in world.documents("statements", "train")}
    subjects |= {"this is " + q["prompt"].split(":")[0] for q in world.questions("train")}
    for q in world.questions("test"):
        assert "this is " + q["prompt"].split(":")[0] not in subjects
        if q["kind"] in ("capital", "small"):
            assert "this is " + q["answer"] not in subjects


def test_rejected_is_always_worse():
    for split in world.SPLITS:
        for p in world.preferences(split):
            assert p["chosen"] != p["rejected"]
            assert world.gold(p, p["chosen"]) == 1.0 > 0.5 >= world.gold(p, p["rejected"]) >= 0.0
    kinds = {p["corruption"] for p in world.preferences("test")}
    assert {"mark", "case", "letter", "truncated", "repeated", "another", "copied", "garbled"} == kinds


def test_gold_by_hand():
    q = next(q for q in world.questions() if q["prompt"] == "latin small letter e with acute: its base letter?")
    assert world.gold(q, "latin small letter e") == world.gold(q, "  latin small letter  e\n") == 1.0
    assert world.gold(q, "latin capital letter e") == pytest.approx(0.5 * 0.75**2)
    assert world.gold(q, "latin small letter") == pytest.approx(0.5 * (6 / 7) ** 2)
    assert world.gold(q, "latin small letter e e e e e") == pytest.approx(0.5 * (8 / 12) ** 2)
    assert world.gold(q, "e letter small latin") == pytest.approx(0.5 * 0.25**2)  # order counts
    assert world.gold(q, "") == world.gold(q, "no idea") == 0.0
    assert world.gold({"kind": "capital", "codepoint": ord("é"), "answer": "a lie"}, "a lie") == 0.0


def test_captions_name_the_character():
    pairs = world.pairs("test", "unseen")
    for i in (0, 99, len(pairs) - 1):
        name = unicodedata.name(chr(pairs.glyphs.codepoint[i])).lower()
        assert pairs.captions(i)[0] == pairs.name(i) == name and all(name in c for c in pairs.captions(i))
        assert "stix" not in " ".join(pairs.captions(i)).replace(name, "")
        assert pairs.image(i).shape == (32, 32)


# --- digest ---


def test_digest_is_stable_and_names_what_it_is_made_of():
    assert world.digest() == world.digest() and world.fingerprint() == world.fingerprint()
    assert world.fingerprint("prose") != world.fingerprint("questions")
    about = world.digest("glyphs")
    assert set(about["fonts"]) == {font.file for font in world.FONTS} and about["unicode"] == "14.0.0"
    assert sum(about["pictures"].values()) == len(world.glyphs())


def test_the_page_states_the_numbers_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "world.md").read_text(encoding="utf-8")
    lines = [line for line in counts().splitlines() if "prose" not in line]  # prose is this Python's own
    assert len(lines) > 10 and [line for line in lines if line not in page] == []

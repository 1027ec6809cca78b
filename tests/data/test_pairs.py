"""Pictures with captions: concepts, what is left out, and that each picture meets its own caption."""

import json
import pickle
import shutil
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from fledge.config import load
from fledge.data.augment import AugmentConfig
from fledge.data.pairs import PairsConfig, captioned
from fledge.errors import InputError

STYLES = ["images.ink", "images.oil"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))


def plain(path, level):
    """A picture of one grey level, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (level,) * 3).save(path)


def level(image):
    return np.asarray(image)[0, 0, 0]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def jsonl(tmp_path):
    root = tmp_path / "set"
    for i, name in enumerate(["ink/sun", "oil/sun", "ink/cat", "ink/dog", "oil/dog"]):
        plain(root / f"{name}.png", 10 * (i + 1))
    return write(
        root / "captions.jsonl",
        [
            {
                "name": "sun",
                "keywords": ["star", " bright  light "],
                "split": "train",
                "images": {"ink": "ink/sun.png", "oil": "oil/sun.png"},
            },
            {"name": "cat", "keywords": [], "split": "train", "images": {"ink": "ink/cat.png"}},
            {
                "name": "dog",
                "keywords": ["pet"],
                "split": "val",
                "images": {"ink": "ink/dog.png", "oil": "oil/dog.png"},
            },
        ],
    )


def config(path, **values):
    return load(PairsConfig, {"path": str(path), **values})


def styled(path, **values):
    return config(path, image_field=STYLES, caption_field="name", **values)


def test_several_pictures_of_one_caption(jsonl):
    pairs = styled(jsonl).open()
    assert pairs.captions == ("sun", "cat", "dog") and pairs.members == ((0, 1), (2,), (3, 4))
    assert [level(pairs.images.pil(i)) for i in range(5)] == [10, 20, 30, 40, 50]
    assert [pairs.images.label(i) for i in range(5)] == [0, 0, 1, 2, 2] and pairs.images.classes == pairs.captions
    assert {level(pairs.draw(0, Random(seed))) for seed in range(20)} == {10, 20}
    assert pairs.report() == ""


def test_where_and_joined_captions(jsonl):
    pairs = config(jsonl, image_field="images.ink", caption_field=["name", "keywords"], where={"split": "train"}).open()
    assert pairs.captions == ("sun, star, bright light", "cat")
    joined = config(jsonl, image_field="images.ink", caption_field=["name", "keywords"], join=" ").open()
    assert joined.captions[0] == "sun star bright light"


def test_equal_captions_are_one_concept(tmp_path):
    for i in range(3):
        plain(tmp_path / f"{i}.png", 60 * i)
    captions = ["a dot", "a line", "a  dot "]
    path = write(tmp_path / "p.jsonl", [{"image": f"{i}.png", "caption": c} for i, c in enumerate(captions)])
    pairs = config(path).open()
    assert pairs.captions == ("a dot", "a line") and pairs.members == ((0, 2), (1,))


def test_rows_bring_each_picture_with_its_text(jsonl):
    pairs = styled(jsonl).open()
    text = {"text_ids": torch.arange(12).view(3, 4), "text_mask": torch.ones(3, 4, dtype=torch.bool)}
    view = AugmentConfig(size=4, mean=(0.0,), std=(1.0,))
    rows = pickle.loads(pickle.dumps(captioned(pairs, view, text)))
    batch = rows([2, 0], [1, 2])
    assert batch["caption_id"].tolist() == [2, 0]
    assert torch.equal(batch["text_ids"], text["text_ids"][[2, 0]])
    levels = (batch["image"].amax(dim=(1, 2, 3)) * 255).round().int().tolist()
    assert levels[0] in (40, 50) and levels[1] in (10, 20)
    assert torch.equal(rows([0], [2])["image"][0], batch["image"][1])
    with pytest.raises(ValueError, match="2 rows for 3 captions"):
        captioned(pairs, view, {"text_ids": torch.zeros(2, 4)})


def test_fingerprint_is_content_not_place(jsonl, tmp_path):
    before = styled(jsonl).fingerprint()
    shutil.copytree(jsonl.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / jsonl.name
    assert styled(moved).fingerprint() == before
    plain(tmp_path / "moved/ink/cat.png", 99)
    assert styled(moved).fingerprint() != before
    plain(tmp_path / "moved/ink/cat.png", 30)
    assert styled(moved).fingerprint() == before
    moved.write_text(moved.read_text().replace("dog", "hog", 1))
    assert styled(moved).fingerprint() != before


def test_holdout_is_by_caption(tmp_path):
    plain(tmp_path / "a.png", 1)
    rows = [{"image": "a.png", "caption": f"number {i // 2}"} for i in range(200)]
    path = write(tmp_path / "p.jsonl", rows)
    train, held = (config(path, split=split, holdout=0.3).open() for split in ("train", "validation"))
    assert not set(train.captions) & set(held.captions) and len(train) + len(held) == 100
    assert 15 < len(held) < 45


# -- wrong input -----------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_named_by_line(jsonl):
    (jsonl.parent / "torn.png").write_bytes(b"\x89PNG")
    bad = [
        '{"name": "half", ',
        "",
        '["a list"]',
        {"name": "  ", "images": {"ink": "ink/sun.png"}},
        {"name": "no picture", "images": {}},
        {"name": "lost", "images": {"ink": "ink/lost.png"}},
        {"name": "half \ud800", "images": {"ink": "ink/sun.png"}},
        {"name": "torn", "images": {"ink": "torn.png"}},
    ]
    with open(jsonl, "a") as file:
        file.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in bad))
    pairs = styled(jsonl).open()
    assert pairs.captions == ("sun", "cat", "dog")
    assert [one.where.split(":")[1] for one in pairs.skipped] == ["4", "6", "7", "8", "10", "9", "11"]
    expected = ["not JSON", "found list", "empty caption", "no picture", "surrogate", "no such file", ""]
    assert all(words in one.why for words, one in zip(expected, pairs.skipped, strict=True))
    assert pairs.report().startswith("left out 7 of 12 captioned pictures: captions.jsonl:4 (not JSON")


def test_nothing_usable_is_an_error(tmp_path, jsonl):
    with pytest.raises(InputError, match="does not exist"):
        config(tmp_path / "none.jsonl").check()
    with pytest.raises(InputError, match="is a folder"):
        config(tmp_path).check()
    with pytest.raises(InputError, match="no row has a value in capton; the rows have name, keywords"):
        config(jsonl, image_field="images.ink", caption_field="capton").check()
    with pytest.raises(InputError, match="no row passes where"):
        styled(jsonl, where={"split": "trian"}).check()
    lost = write(tmp_path / "lost.jsonl", [{"image": "lost.png", "caption": "lost"}])
    with pytest.raises(InputError, match="no picture with a caption is left.*lost.jsonl:1: lost.png .no such file"):
        config(lost).check()
    with pytest.raises(InputError, match="void.jsonl is empty; expected one JSON object"):
        config(write(tmp_path / "void.jsonl", [""])).check()


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, "needs `path`"),
        ({"path": "p.jsonl", "image_field": []}, "at least one field"),
        ({"path": "p.jsonl", "split": "validation"}, "set holdout"),
        ({"path": "p.jsonl", "fonts": "unseen"}, "has no use for fonts"),
        ({"source": "world", "where": {"split": "train"}}, "has no use for where"),
    ],
)
def test_contradictions_are_refused(values, expected):
    with pytest.raises(InputError, match=expected):
        load(PairsConfig, values)


def test_world(monkeypatch):
    import unicodedata

    monkeypatch.delenv("FLEDGE_CACHE")  # the drawn world is the same for every test
    from fledge.data.world import characters, glyphs

    pairs = load(PairsConfig, {"source": "world", "channels": 1, "split": "test", "fonts": "unseen"}).open()
    source = glyphs("test", "unseen")
    assert set(pairs.captions) == {unicodedata.name(chr(c)).lower() for c in source.codepoint.tolist()}
    assert len(set(pairs.captions)) == len(pairs) and sum(map(len, pairs.members)) == len(source)
    assert set(pairs.captions) <= {one.name for one in characters("test")}
    concept = pairs.captions.index(pairs.captions[-1])
    for picture in pairs.members[concept]:
        assert unicodedata.name(chr(source.codepoint[picture])).lower() == pairs.captions[concept]
        np.testing.assert_array_equal(np.asarray(pairs.images.pil(picture)), source.image(picture))

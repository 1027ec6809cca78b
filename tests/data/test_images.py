"""Image folders and glyphs: what is found, what is left out, and that identity is content."""

import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fledge.config import load
from fledge.data import images as module
from fledge.data.augment import AugmentConfig, EvalConfig, MultiCropConfig
from fledge.data.images import ImagesConfig, augmented, decode, eval_batch
from fledge.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FLEDGE_CACHE", str(folder))
    return folder


def noise(seed, width=20, height=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, image: Image.Image, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


@pytest.fixture
def folder(tmp_path):
    """Two classes, four formats, a nested picture, and things that are no pictures."""
    root = tmp_path / "photos"
    for i, name in enumerate(["cat/1.png", "cat/deep/2.jpg", "dog/3.webp", "dog/4.bmp", "dog/5.JPEG"]):
        save(root / name, noise(i))
    save(root / ".hidden/6.png", noise(6))
    (root / "dog/notes.txt").write_text("no picture")
    return root


def config(path, **values):
    return load(ImagesConfig, {"path": str(path), **values})


# -- what is found ---------------------------------------------------------------------------------------------------


def test_labelled_folder(folder):
    images = config(folder).open()
    assert list(images.names) == ["cat/1.png", "cat/deep/2.jpg", "dog/3.webp", "dog/4.bmp", "dog/5.JPEG"]
    assert images.classes == ("cat", "dog")
    assert [images.label(i) for i in range(len(images))] == [0, 0, 1, 1, 1]
    assert images.skipped == () and images.report() == ""
    np.testing.assert_array_equal(np.asarray(images.pil(0)), np.asarray(noise(0)))  # png and bmp lose nothing
    np.testing.assert_array_equal(np.asarray(images.pil(3)), np.asarray(noise(3)))


def test_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "a.png", noise(0))
    save(tmp_path / "sub/b.png", noise(1))
    images = config(tmp_path).open()
    assert len(images) == 2 and images.classes == () and images.label(0) is None
    with pytest.raises(InputError, match="a.png lies in no subfolder"):
        config(tmp_path, labels="folders").open()
    with pytest.raises(InputError, match="no labels"):
        augmented(images, AugmentConfig(size=8), labelled=True)


def test_holdout_is_by_content(folder):
    save(folder / "dog/copy of 1.png", noise(0))  # the same bytes as cat/1.png
    for i in range(10, 90):
        save(folder / f"cat/{i}.png", noise(i, 4, 4))
    names = {split: set(config(folder, split=split, holdout=0.3).open().names) for split in ("train", "validation")}
    assert not names["train"] & names["validation"]
    assert names["train"] | names["validation"] == set(config(folder, split="all").open().names)
    assert 0.1 < len(names["validation"]) / 86 < 0.5
    assert {"cat/1.png", "dog/copy of 1.png"} <= names["train"] or {"cat/1.png", "dog/copy of 1.png"} <= names[
        "validation"
    ]


def test_a_name_that_is_no_text(folder):
    try:
        save(folder / os.fsdecode(b"cat/\xff.png"), noise(7))
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    assert len(config(folder).open()) == 6 and len(config(folder).fingerprint()) == 64


def test_a_link_that_leads_back_up_ends(folder):
    os.symlink(folder, folder / "dog" / "again")
    assert len(config(folder).open()) == 5


# -- decoding --------------------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path):
    image, exif = noise(0), Image.Exif()
    exif[0x0112] = 6  # stored turned: upright after 90 degrees clockwise
    save(tmp_path / "turned.png", image, exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "turned.png", "RGB")), np.rot90(np.asarray(image), k=-1))


def test_transparency_is_put_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:] = (200, 0, 0, 255)
    save(tmp_path / "a.png", Image.fromarray(pixels))
    seen = np.asarray(decode(tmp_path / "a.png", "RGB"))
    assert (seen[:, :2] == 255).all() and (seen[:, 2:] == (200, 0, 0)).all()


def test_sixteen_bit_grey_keeps_its_scale(tmp_path):
    levels = np.array([[0, 257 * 100, 65535]], np.uint16)
    save(tmp_path / "deep.png", Image.fromarray(levels))
    assert np.asarray(decode(tmp_path / "deep.png", "L")).tolist() == [[0, 100, 255]]


def test_grey_and_resize_to(folder):
    images = config(folder, channels=1, resize_to=8).open()
    assert images.mode == "L"
    assert all(images.pil(i).mode == "L" and images.pil(i).size == (10, 8) for i in range(len(images)))
    assert config(folder, resize_to=400).open().pil(0).size == (20, 16)  # never enlarged


def test_shrunk_jpeg_is_nearly_the_exact_one(tmp_path):
    smooth = noise(1, 8, 6).resize((640, 480), Image.Resampling.BICUBIC)
    save(tmp_path / "large.jpg", smooth, quality=95)
    shrunk = decode(tmp_path / "large.jpg", "RGB", resize_to=48)
    exact = smooth.resize((64, 48), Image.Resampling.BICUBIC)
    assert shrunk.size == (64, 48)
    assert np.abs(np.asarray(shrunk, float) - np.asarray(exact, float)).mean() < 2


def test_cached_pictures_are_the_decoded_ones(folder):
    plain, cached = config(folder, resize_to=9).open(), config(folder, resize_to=9, cache=True).open()
    assert plain.fingerprint == cached.fingerprint
    for i in range(len(plain)):
        assert plain.pil(i).size == cached.pil(i).size and plain.pil(i).tobytes() == cached.pil(i).tobytes()


# -- identity --------------------------------------------------------------------------------------------------------


def test_fingerprint_is_content_not_place(folder, tmp_path):
    before = config(folder).fingerprint()
    moved = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(folder, moved)
    os.utime(moved / "cat/1.png", (1, 1))
    assert config(moved).fingerprint() == before
    save(moved / "cat/1.png", noise(99))
    assert config(moved).fingerprint() != before
    shutil.copy(folder / "cat/1.png", moved / "cat/1.png")
    assert config(moved).fingerprint() == before
    (moved / "cat/1.png").rename(moved / "cat/0.png")
    assert config(moved).fingerprint() != before


def test_a_second_start_reads_only_what_changed(folder, own_cache, monkeypatch):
    looked = []
    inspect = module.inspect
    monkeypatch.setattr(module, "inspect", lambda path: looked.append(path.name) or inspect(path))
    first = config(folder).fingerprint()
    assert len(looked) == 5
    assert config(folder).fingerprint() == first and len(looked) == 5
    save(folder / "cat/1.png", noise(50, 21, 17))
    assert config(folder).fingerprint() != first and looked[5:] == ["1.png"]
    for index in (own_cache / "images").iterdir():
        index.write_text(index.read_text()[:40])  # a broken cache is made again
    config(folder).check()
    assert len(looked) == 11


# -- wrong input -----------------------------------------------------------------------------------------------------


def broken(folder: Path):
    (folder / "cat/empty.png").write_bytes(b"")
    (folder / "cat/text.jpg").write_text("this is no picture")
    whole = (folder / "cat/deep/2.jpg").read_bytes()
    (folder / "dog/torn.jpg").write_bytes(whole[: len(whole) // 2])
    os.symlink("nowhere.png", folder / "dog/gone.png")


def test_undecodable_pictures_are_counted_and_named(folder):
    good = config(folder).open()
    broken(folder)
    for _ in range(2):  # freshly indexed, and from the cache
        images = config(folder).open()
        assert images.names == good.names and images.fingerprint == good.fingerprint
        assert [one.where for one in images.skipped] == [
            "cat/empty.png",
            "cat/text.jpg",
            "dog/gone.png",
            "dog/torn.jpg",
        ]
        assert images.report().startswith("left out 4 of 9 pictures: cat/empty.png (not a picture in a known format);")
        assert images.report().endswith("and 1 more")


def test_nothing_usable_is_an_error(tmp_path, folder):
    with pytest.raises(InputError, match="does not exist"):
        config(tmp_path / "missing").check()
    with pytest.raises(InputError, match="is a file"):
        config(folder / "cat/1.png").check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in it"):
        config(tmp_path / "empty").check()
    (tmp_path / "empty/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match="none of its 1 pictures can be used; left out 1 of 1 pictures: a.png"):
        config(tmp_path / "empty").check()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_left_out(folder):
    save(folder / "cat/large.png", Image.new("RGB", (60, 50)))
    images = config(folder, max_pixels=1000).open()
    assert [(one.where, one.why) for one in images.skipped] == [
        ("cat/large.png", "60x50 pixels, the limit max_pixels is 1000")
    ]
    save(folder / "cat/bomb.png", Image.new("1", (10_000, 10_000)))
    assert [one.where for one in config(folder).open().skipped] == ["cat/bomb.png"]


def test_a_picture_removed_during_the_run_is_named(folder):
    images = config(folder).open()
    (folder / "cat/1.png").unlink()
    with pytest.raises(InputError, match="cat/1.png: no such file; it could be read when"):
        images.pil(0)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"source": "folder"}, "needs `path`"),
        ({"source": "world", "path": "photos"}, "has no use for path"),
        ({"source": "world", "labels": "folders"}, "has no labels"),
        ({"path": "photos", "labels": "script"}, "has no labels"),
        ({"path": "photos", "split": "validation"}, "set holdout"),
        ({"path": "photos", "split": "test"}, "exists in the world only"),
        ({"path": "photos", "fonts": "unseen"}, "has no use for fonts"),
    ],
)
def test_contradictions_are_refused(values, expected):
    with pytest.raises(InputError, match=expected):
        load(ImagesConfig, values)


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_pure_and_picklable(folder):
    images = config(folder).open()
    rows = pickle.loads(pickle.dumps(augmented(images, AugmentConfig(size=8), labelled=True)))
    batch = rows([3, 0], [5, 6])
    assert batch["image"].shape == (2, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["label"].tolist() == [1, 0]
    alone = rows([0], [6])
    assert torch.equal(alone["image"][0], batch["image"][1])
    crops = augmented(images, MultiCropConfig(global_size=8, local_size=4, local_crops=3))([3, 0], [5, 6])
    assert crops["global_crops"].shape == (2, 2, 3, 8, 8) and crops["local_crops"].shape == (2, 3, 3, 4, 4)
    none = augmented(images, MultiCropConfig(global_size=8, local_crops=0))([3], [5])
    assert set(none) == {"global_crops"}


def test_eval_batch(folder):
    images, view = config(folder).open(), EvalConfig(size=16, resize=16)
    pixels = eval_batch(images, [0, 3], view)
    expected = np.asarray(noise(0).crop((2, 0, 18, 16)), np.float32) / 255
    expected = (expected - np.float32(view.mean)) / np.float32(view.std)
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)


# -- the world -------------------------------------------------------------------------------------------------------


@pytest.fixture
def world_cache(monkeypatch):
    """The drawn world is the same for every test: keep it where it is."""
    monkeypatch.delenv("FLEDGE_CACHE")


def test_world(world_cache):
    from fledge.data.world import characters, glyphs

    train = load(ImagesConfig, {"source": "world", "channels": 1}).open()
    test = load(ImagesConfig, {"source": "world", "split": "test", "fonts": "unseen"}).open()
    assert train.pil(0).mode == "L" and test.pil(0).mode == "RGB" and train.pil(0).size == (32, 32)
    assert train.classes == test.classes  # a label means the same in every split
    source = glyphs("test", "unseen")
    assert len(test) == len(source)
    assert [test.classes[test.label(i)] for i in range(len(test))] == source.script.tolist()
    np.testing.assert_array_equal(np.asarray(test.pil(5))[..., 0], source.image(5))
    assert pickle.loads(pickle.dumps(test)).pil(7).tobytes() == test.pil(7).tobytes()
    named = load(ImagesConfig, {"source": "world", "split": "all", "labels": "character"}).open()
    assert len(named.classes) == len(characters())
    assert Counter(named.labels)[named.classes.index("digit seven")] > 10  # one picture a font


def test_config_survives_its_own_dump(folder):
    from fledge.config import dump, parse

    for values in ({"source": "world"}, {"path": str(folder), "holdout": 0.1}):
        first = load(ImagesConfig, values)
        assert load(ImagesConfig, parse(dump(first), "dump").data) == first
    assert json.loads(first.model_dump_json())["holdout"] == 0.1

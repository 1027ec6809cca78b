import json
import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch

from fledge.data import text, world
from fledge.data import tokenizer as tokenizers
from fledge.data.text import IGNORE, Packed, TextConfig, mask_tokens, next_labels, pack
from fledge.data.tokenizer import TokenizerConfig
from fledge.errors import InputError

WORDS = ["the", "a", "fox", "dog", "cat", "runs", "sleeps", "over", "under", "lazy", "quick", "brown", "hill", "house"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))


def prose(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) + f" {i}" for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(TokenizerConfig(vocab_size=300), prose(50))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(prose(200)))
    return TextConfig(source="files", path=str(tmp_path / "text.txt"), seq_len=32, validation_fraction=0.2)


# ---- documents


def test_splits_are_disjoint_complete_and_by_document(config, tmp_path):
    splits = {s: text.documents(config, s) for s in ("train", "validation", "test")}
    assert sorted(sum(splits.values(), [])) == sorted(prose(200))
    assert 20 <= len(splits["validation"]) <= 60 and 2 <= len(splits["test"]) <= 22  # 40 and 10 expected
    (tmp_path / "other.txt").write_text(
        "\n\n".join([*prose(20, 1), *reversed(prose(200))])
    )  # a document keeps its split
    other = config.model_copy(update={"path": str(tmp_path / "other.txt")})
    assert set(splits["validation"]) < set(text.documents(other, "validation"))


@pytest.mark.parametrize(
    "split_on, expected",
    [("blank", ["a\nb", " c", "d"]), ("line", ["a", "b", " c", "d"]), ("file", ["a\nb\n\n c\n \n\n\nd\n"])],
)
def test_what_divides_a_file(split_on, expected):
    assert text.split_text("a\nb\n\n c\n \n\n\nd\n", split_on) == expected
    assert text.split_text(" \n\n", split_on) == []


def test_files_folders_and_fields(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("\ufefftwo\r\n\r\nthree")
    (tmp_path / "in" / "deep" / "c.jsonl").write_text('{"body": "four\\n\\nfour"}\n\n{"body": ""}\n')
    (tmp_path / "in" / "a.txt").write_text("one")
    config = TextConfig(
        source="files", path=str(tmp_path / "in"), field="body", validation_fraction=0.0, test_fraction=0.0
    )
    assert text.documents(config, "train") == ["one", "two", "three", "four\n\nfour"]
    held = config.model_copy(update={"validation_path": str(tmp_path / "in" / "a.txt")})
    assert text.documents(held, "validation") == ["one"] and len(text.documents(held, "train")) == 4


def test_fingerprint_is_of_contents(config, tmp_path):
    (tmp_path / "elsewhere.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    moved = config.model_copy(update={"path": str(tmp_path / "elsewhere.txt")})
    assert moved.fingerprint() == config.fingerprint()
    (tmp_path / "elsewhere.txt").write_text("other")
    assert moved.fingerprint() != config.fingerprint()


def test_the_world_is_text():
    config = TextConfig(kinds=["statements"])
    assert text.documents(config, "validation") == world.documents("statements", "validation")
    assert config.fingerprint() == TextConfig(kinds=["statements"], seq_len=8).fingerprint()


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.txt", b"good \xff text", ["a.txt", "offset 5", "0xff", "UTF-8"]),
        ("a.txt", b"good\0", ["a.txt", "offset 4", "zero byte"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ["a.jsonl:2", "JSON"]),
        ("a.jsonl", b'{"body": "x"}', ["a.jsonl:1", "'text'", "body"]),
        ("a.jsonl", b'{"text": 3}', ["a.jsonl:1", "int"]),
        ("a.jsonl", b"[1]", ["a.jsonl:1", "object"]),
        ("a.jpg", b"x", ["a.jpg", ".txt"]),
        (None, b"", ["no file or folder"]),
    ],
)
def test_wrong_input_is_named(tmp_path, name, data, words):
    if name:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        text.documents(TextConfig(source="files", path=str(tmp_path / (name or "none"))), "train")
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_file_is_named_by_its_own_key(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    config = TextConfig(source="files", path=str(tmp_path / "a.txt"), validation_path=str(tmp_path / "b.txt"))
    with pytest.raises(InputError, match=r"^data\.validation_path: there is no file"):
        config.check()


def test_contradictions():
    for config in (
        TextConfig(source="files"),
        TextConfig(path="x"),
        TextConfig(validation_fraction=0.6, test_fraction=0.5),
    ):
        with pytest.raises(InputError):
            config.check()


def test_too_short_text_says_the_numbers(config, tokenizer):
    with pytest.raises(InputError, match=r"tokens give 0 rows.*seq_len 100000.*1 are needed"):
        Packed(config.model_copy(update={"seq_len": 100000}), tokenizer, "train")
    with pytest.raises(InputError, match="5000 are needed"):
        Packed(config, tokenizer, "train", at_least=5000)
    rows = Packed(config.model_copy(update={"seq_len": 100000}), tokenizer, "train", at_least=0)
    assert len(rows) == 1


# ---- shards


@pytest.mark.parametrize("shard", [1 << 26, 100])
def test_shards_hold_the_documents_and_are_made_once(config, tokenizer, monkeypatch, shard):
    monkeypatch.setattr(text, "SHARD", shard)
    tokens = text.tokenise(config, tokenizer, "train", "causal")
    assert len(tokens.shards) == 1 if shard > 100 else len(tokens.shards) > 5
    found = [tokens.take(a, b).tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    assert found == [
        [tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for t in text.documents(config, "train")
    ]
    everything = tokens.take(0, len(tokens))
    assert all((tokens.take(a, a + 150) == everything[a : a + 150]).all() for a in range(0, len(tokens) - 150, 37))
    monkeypatch.setattr(text, "_write", lambda *a: pytest.fail("tokenised twice"))
    again = pickle.loads(pickle.dumps(text.tokenise(config, tokenizer, "train", "causal")))
    assert (again.take(0, len(again)) == everything).all()
    assert len(pickle.dumps(tokens)) < 1000


def test_another_tokenizer_split_or_style_is_another_folder(config, tokenizer):
    other = tokenizers.train(TokenizerConfig(vocab_size=280), prose(50))
    seen = {
        text.tokenise(config, *how).folder for how in [(tokenizer, "train", "causal"), (tokenizer, "test", "causal")]
    }
    seen |= {
        text.tokenise(config, *how).folder for how in [(tokenizer, "train", "encoder"), (other, "train", "causal")]
    }
    assert len(seen) == 4
    longer = config.model_copy(update={"seq_len": 64, "packing": "best_fit"})
    assert text.tokenise(longer, tokenizer, "train", "causal").folder in seen


@pytest.mark.parametrize("name", ["tokens-00000.npy", "offsets.npy", "manifest.json"])
def test_a_broken_cache_is_made_again_with_a_warning(config, tokenizer, name):
    tokens = text.tokenise(config, tokenizer, "train", "causal")
    good = tokens.take(0, len(tokens))
    data = bytearray((tokens.folder / name).read_bytes())
    data[-3] ^= 1
    (tokens.folder / name).write_bytes(data)
    with pytest.warns(UserWarning, match=name):
        again = text.tokenise(config, tokenizer, "train", "causal")
    assert (again.take(0, len(again)) == good).all()


# ---- packing: brute force


def brute_force_concat(documents: list[list[int]], seq_len: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (token, document number within the row, position), one token after the other."""
    rows, row, last = [], [], None
    for n, document in enumerate(documents):
        for token in document:
            if last == n:
                row.append((token, row[-1][1], row[-1][2] + 1))
            else:
                row.append((token, row[-1][1] + 1 if row else 1, 0))
            last = n
            if len(row) == seq_len:
                rows.append(row)
                row, last = [], None
    return [*rows, row] if row else rows


def brute_force_best_fit(documents: list[list[int]], seq_len: int) -> list[list[list[int]]]:
    """Rows of pieces: scan every row for the tightest fit."""
    pieces = [d[i : i + seq_len] for d in documents for i in range(0, len(d), seq_len)]
    rows: list[list[list[int]]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        room = [(seq_len - sum(map(len, row)), n) for n, row in enumerate(rows)]
        fits = [(free, n) for free, n in room if free >= len(piece)]
        if fits:
            rows[min(fits)[1]].append(piece)
        else:
            rows.append([piece])
    return rows


def lengths(n: int, top: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([1, rng.randint(1, top), rng.randint(1, 5)]) for _ in range(n)]


def running(sizes: list[int]) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    offsets = np.cumsum([0, *sizes])
    tokens = np.arange(1000, 1000 + offsets[-1])
    return offsets, [tokens[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)], tokens


@pytest.mark.parametrize("seed", range(5))
def test_concat_is_the_loop(seed):
    offsets, documents, tokens = running(lengths(60, 40, seed) + [16, 16, 32])
    index = pack(offsets, 16, "concat")
    expected = brute_force_concat(documents, 16)
    got = text.assemble(index, range(len(index.rows) - 1), lambda a, b: tokens[a:b], 16, 7)
    assert len(index.rows) - 1 == len(expected) == math.ceil(len(tokens) / 16)
    for r, row in enumerate(expected):
        filled = row + [(7, 0, 0)] * (16 - len(row))
        for axis, name in enumerate(("input_ids", "document", "position")):
            assert got[name][r].tolist() == [cell[axis] for cell in filled]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_loop(seed):
    offsets, documents, tokens = running(lengths(60, 40, seed) + [16, 16, 32])
    index = pack(offsets, 16, "best_fit")
    got = text.assemble(index, range(len(index.rows) - 1), lambda a, b: tokens[a:b], 16, 7)
    expected = brute_force_best_fit(documents, 16)
    assert len(index.rows) - 1 == len(expected)
    for r, pieces in enumerate(expected):
        flat, numbers = sum(pieces, []), sum([[n + 1] * len(p) for n, p in enumerate(pieces)], [])
        assert got["input_ids"][r].tolist() == flat + [7] * (16 - len(flat))
        assert got["document"][r].tolist() == numbers + [0] * (16 - len(flat))
    real = got["document"] > 0
    assert sorted(got["input_ids"][real].tolist()) == tokens.tolist()  # every token once


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_target_crosses_a_boundary(config, tokenizer, packing):
    data = Packed(config.model_copy(update={"packing": packing}), tokenizer, "train", at_least=4)
    batch = data.rows(list(range(len(data))))
    assert {(k, v.dtype) for k, v in batch.items()} == {
        (k, torch.int64) for k in ("input_ids", "document", "position", "labels")
    }
    scored = Counter()
    for ids, document, position, labels in zip(*(batch[k].tolist() for k in batch), strict=True):
        for t in range(len(ids)):
            inside = t + 1 < len(ids) and document[t] > 0 and document[t + 1] == document[t]
            assert labels[t] == (ids[t + 1] if inside else IGNORE)
            scored[inside] += 1
            if document[t]:
                assert position[t] == (position[t - 1] + 1 if t and document[t - 1] == document[t] else 0)
    pieces = int((batch["document"] > 0).logical_and(batch["position"] == 0).sum())
    assert scored[True] == len(data.tokens) - pieces


def test_padding_is_by_length_where_pad_is_a_real_token(config, tokenizer):
    """With the id of the end used for padding nothing changes but the filling."""
    pack_config = config.model_copy(update={"packing": "best_fit"})
    one, two = Packed(pack_config, tokenizer, "train"), Packed(pack_config, tokenizer, "train")
    two.pad_id = tokenizer.eos_token_id
    a, b = (data.rows(list(range(len(data)))) for data in (one, two))
    assert all(torch.equal(a[k], b[k]) for k in ("document", "position", "labels"))
    assert (a["input_ids"] != b["input_ids"]).sum() == (a["document"] == 0).sum() > 0
    assert (a["labels"] == tokenizer.eos_token_id).sum() > 0.9 * one.documents  # the end is learned


def test_bits_per_byte_counts_every_byte(config, tokenizer):
    data = Packed(config.model_copy(update={"seq_len": 512, "packing": "best_fit"}), tokenizer, "train")
    labels = data.rows(list(range(len(data))))["labels"]
    counted = tokenizers.token_bytes(tokenizer)[labels[labels >= 0]].sum()
    assert counted == sum(len(d.encode()) for d in text.documents(config, "train"))


def test_a_slice_of_the_ids_is_a_slice_of_the_rows(config, tokenizer):
    data = Packed(config, tokenizer, "train")
    whole, part = data.rows([3, 1, 4, 1]), pickle.loads(pickle.dumps(data)).rows([4, 1])
    assert all(torch.equal(whole[k][2:], part[k]) for k in whole)


def test_next_labels_of_padding_are_ignored():
    labels = next_labels(torch.tensor([[5, 6, 7, 8, 0, 0]]), torch.tensor([[1, 1, 2, 2, 0, 0]]))
    assert labels.tolist() == [[6, IGNORE, 8, IGNORE, IGNORE, IGNORE]]


# ---- masks


def masked(rows: int, seeds=None, p: float = 0.15, width: int = 100):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 500, (rows, width), generator=g)
    ids[:, 0], ids[:, 50] = 4, 5  # specials
    document = torch.ones_like(ids)
    for row in range(rows):
        document[row, width - row % 40 :] = 0  # padding
    able = text.maskable(ids, document, range(10))
    ordinary = torch.arange(10, 500)
    seeds = seeds or list(range(rows))
    out = mask_tokens(ids, able, mlm_probability=p, mask_id=6, ordinary_ids=ordinary, seeds=seeds)
    return ids, able, *out


def test_the_quota_is_exact_and_specials_are_never_chosen():
    ids, able, corrupted, labels = masked(200)
    for row in range(200):
        n = sum(1 for t in range(100) if t < 100 - row % 40 and t not in (0, 50))
        assert int(able[row].sum()) == n
        assert int((labels[row] != IGNORE).sum()) == max(1, round(0.15 * n))
    chosen = labels != IGNORE
    assert not (chosen & ~able).any()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(corrupted[~chosen], ids[~chosen])


def test_eighty_ten_ten_within_binomial_bounds():
    ids, _, corrupted, labels = masked(3000)
    chosen = labels != IGNORE
    n = int(chosen.sum())
    mask = int((corrupted[chosen] == 6).sum())
    kept = int((corrupted[chosen] == ids[chosen]).sum())
    for count, p in ((mask, 0.8), (kept, 0.1 + 0.1 / 490), (n - mask - kept, 0.1 - 0.1 / 490)):
        assert abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p))
    others = corrupted[chosen][(corrupted[chosen] != 6) & (corrupted[chosen] != ids[chosen])]
    assert others.min() >= 10 and len(others.unique()) > 480
    places = chosen.float().mean(0)[torch.tensor([t for t in range(60) if t not in (0, 50)])]
    assert (places - 0.15).abs().max() < 4.5 * math.sqrt(0.15 * 0.85 / 3000)


def test_a_mask_is_a_function_of_row_and_seed_alone():
    before, state = random.getstate(), torch.get_rng_state()
    ids, able, corrupted, labels = masked(40)
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), state)
    flipped = mask_tokens(
        ids.flip(0), able.flip(0), mlm_probability=0.15, mask_id=6, ordinary_ids=torch.arange(10, 500),
        seeds=list(range(40))[::-1],
    )  # fmt: skip
    assert torch.equal(flipped[0].flip(0), corrupted) and torch.equal(flipped[1].flip(0), labels)
    assert not torch.equal(masked(40, seeds=list(range(100, 140)))[3], labels)


def test_at_least_one_and_none_of_nothing():
    able = torch.tensor([[True, False, False], [False, False, False]])
    ids = torch.tensor([[11, 2, 3], [1, 2, 3]])
    corrupted, labels = mask_tokens(
        ids, able, mlm_probability=0.15, mask_id=6, ordinary_ids=torch.tensor([11]), seeds=[1, 2]
    )
    assert labels.tolist() == [[11, IGNORE, IGNORE], [IGNORE] * 3] and torch.equal(corrupted[1], ids[1])


def test_manifest_names_what_was_tokenised(config, tokenizer):
    manifest = json.loads((text.tokenise(config, tokenizer, "train", "causal").folder / "manifest.json").read_text())
    assert manifest["split"] == "train" and manifest["vocabulary"] == len(tokenizer) and manifest["digest"]

"""What a folder, a config, a picture or an environment can do to us: nothing. End to end, over all parts at once.

Single bytes, names and kinds are tested beside what reads them: fledge/test_artifact.py, fledge/test_checkpoint.py,
fledge/test_config.py, data/test_images.py.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from fledge import artifact, checkpoint, cli, files
from fledge.config import load
from fledge.data.images import ImagesConfig
from fledge.data.tokenizer import TokenizerConfig, train
from fledge.errors import InputError
from fledge.importer import bring_in
from fledge.models import language
from fledge.models.language import CausalConfig
from fledge.redact import redact
from tests import launch
from tests.fledge.test_checkpoint import save

SECRETS = {
    "WANDB_API_KEY": "c0ffee5eed" * 4,
    "HF_TOKEN": "hf_canaryCanaryCanaryCanaryCanary",
    "AWS_SECRET_ACCESS_KEY": "canary/Canary+Canary/Canary+Canary/canary0",
}
BY_HAND = "canaryThatWasTypedByHand"
MAE = """
stage: pretrain.mae
data: {path: pictures}
augment: {size: 16}
model: {img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}
decoder: {embed_dim: 8, depth: 1, num_heads: 2}
optim: {warmup: 0}
train: {batch: 4, steps: 2, precision: fp32, device: cpu}
track: {wandb: offline}
"""


class Bomb:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def no_pickle(monkeypatch):
    """Every way to unpickle fails the test, also where somebody would catch its error."""
    called: list[str] = []

    def refuse(*args, **kw):
        called.append("unpickled")
        raise AssertionError("something was unpickled")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    yield
    assert not called


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """A language model as an artifact."""
    tokens = train(TokenizerConfig(vocab_size=300), ["the cat sat on the mat", "a dog ran"] * 20)
    torch.manual_seed(0)
    model = language.build_causal(CausalConfig(embed_dim=16, depth=1, num_heads=2, context_length=32), tokens)
    folder = tmp_path_factory.mktemp("parent") / "clm"
    artifact.write(
        folder, kind="causal-lm", save=lambda to: language.save(model, tokens, to), config="stage: pretrain.clm\n",
        architecture={},
    )  # fmt: skip
    return folder


def resealed(folder: Path, change=lambda manifest: None) -> None:
    """As somebody leaves a folder who knows how to make its manifest fit."""
    manifest = json.loads((folder / files.MANIFEST).read_text())
    table = {
        name: {"sha256": files.sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in files.members(folder)
    }
    manifest |= {"files": table, "digest": files.table_digest(table)}
    change(manifest)
    (folder / files.MANIFEST).write_text(files.canonical(files.seal(manifest)))


def saved(root: Path) -> Path:
    return save(root, 3, {"model": {"w": torch.ones(2)}, "optim": {}, "stream": {}}, {"stream": {}}, 2)


# ------------------------------------------------------------------------------------------------ pickles


PLANTED = ["pytorch_model.bin", "model.pt", "training.pkl", "last.CKPT", "rng.pth", "scheduler.pickle", "m.joblib"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pickle_is_never_read(tmp_path, parent, name, no_pickle):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for sealed in (False, True):
        folder = tmp_path / f"artifact{sealed}"
        shutil.copytree(parent, folder)
        (folder / name).write_bytes(bomb)
        if sealed:
            resealed(folder)
        with pytest.raises(InputError, match=name):
            artifact.open(folder)
        step = saved(tmp_path / f"checkpoints{sealed}")
        (step / name).write_bytes(bomb)
        if sealed:
            resealed(step)
        with pytest.warns(RuntimeWarning, match=name):
            assert checkpoint.newest(step.parent) is None
    assert not (tmp_path / "exploded").exists()


def test_what_is_read_is_no_pickle(tmp_path, parent, no_pickle):
    opened = artifact.open(parent)
    language.read(opened)
    language.read_tokenizer(opened)
    saved(tmp_path)
    assert checkpoint.newest(tmp_path).tensors("model")["w"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_pickle_under_another_name_is_no_tensor(tmp_path, parent, name, no_pickle):
    """Sealed by its maker, it is the maker's; but it is parsed as safetensors, and as nothing else."""
    folder = tmp_path / "a"
    shutil.copytree(parent, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    if name != "model.safetensors":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
    resealed(folder)
    opened = artifact.open(folder)
    for read in (opened.tensors, lambda: language.read(opened)):
        with pytest.raises(Exception, match="(?i)safetensor|header"):
            read()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/x.safetensors", "weights.dat", "absent.safetensors", 3]
)
def test_an_index_of_shards_cannot_lead_elsewhere(tmp_path, parent, shard, no_pickle):
    shutil.copy(parent / "model.safetensors", tmp_path / "outside.safetensors")
    folder = tmp_path / "a"
    shutil.copytree(parent, folder)
    (folder / "model.safetensors").rename(folder / "rest.safetensors")
    (folder / "weights.dat").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    resealed(folder)
    with pytest.raises(InputError, match=r"index.json names .* which is no .safetensors file of the folder"):
        artifact.open(folder)
    with pytest.raises(InputError, match="is no .safetensors file of the folder"):
        bring_in("causal-lm", str(folder), tmp_path / "b")


@pytest.mark.parametrize("kind", ["causal-lm", "vision-encoder"])
def test_import_takes_no_pickle_beside_safetensors_of_another_name(tmp_path, kind, no_pickle):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "other.safetensors").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (folder / "config.json").write_text('{"model_type": "llama", "architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(InputError, match="has no model.safetensors"):
        bring_in(kind, str(folder), tmp_path / "a")


# ------------------------------------------------------------------------------------------------ digests, then parsing


def test_digests_are_checked_before_anything_is_parsed(tmp_path, parent, monkeypatch):
    def parsed(*args, **kw):
        pytest.fail("it was parsed")

    folder = tmp_path / "a"
    shutil.copytree(parent, folder)
    step = saved(tmp_path / "checkpoints")
    for file in (folder / "config.json", folder / "tokenizer.json", folder / "model.safetensors"):
        raw = file.read_bytes()
        file.write_bytes(raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])
    for file in (step / "state.json", step / "model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(checkpoint, "load_file", parsed)
    monkeypatch.setattr("safetensors.torch.load_file", parsed)
    plain = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **kw: plain(text, **kw) if '"seal"' in str(text) else parsed())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", parsed)
    with pytest.raises(InputError, match=r"config.json was changed.*model.safetensors was changed.*tokenizer.json was"):
        artifact.open(folder)
    with pytest.warns(RuntimeWarning, match=r"model.safetensors was changed.*state.json was changed"):
        assert checkpoint.newest(step.parent) is None


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "a/../../outside", "a\\b", "C:x"])
def test_a_manifest_cannot_name_what_lies_outside(tmp_path, parent, name, monkeypatch):
    (tmp_path / "outside").write_text("x")
    folder, step = tmp_path / "a", saved(tmp_path / "checkpoints")
    shutil.copytree(parent, folder)
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    for place in (folder, step):
        resealed(place, lambda manifest: manifest["files"].update({name: entry}))
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail(f"read {path}"))
    with pytest.raises(InputError, match="not a plain name inside the folder"):
        artifact.open(folder)
    with pytest.warns(RuntimeWarning, match="not a plain name inside the folder"):
        assert checkpoint.newest(step.parent) is None


@pytest.mark.parametrize("what", ["model.safetensors", "manifest.json"])
def test_a_link_is_not_followed(tmp_path, parent, what):
    folder, step = tmp_path / "a", saved(tmp_path / "checkpoints")
    shutil.copytree(parent, folder)
    for place in (folder, step):
        shutil.move(place / what, tmp_path / f"{place.name}-outside")
        (place / what).symlink_to(tmp_path / f"{place.name}-outside")
    with pytest.raises(InputError, match=f"{what} is (a link|not a plain file)"):
        artifact.open(folder)
    with pytest.warns(RuntimeWarning, match=f"{what} is (a link|not a plain file)"):
        assert checkpoint.newest(step.parent) is None


# ------------------------------------------------------------------------------------------------ YAML


ALIASES = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 7}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text, says",
    [
        (ALIASES, "too much after aliases"),
        ("b: &a x\na: [" + "*a," * 99 + "]", "more than 64 aliases"),
        ("a: " + "{a: " * 99 + "}" * 99, "more than 32 levels deep"),
        ("a: " + "x" * (1 << 21), "larger than 1,048,576 bytes"),
        ("seed: 1\nseed: 2", "duplicate key, first at"),
        ("a: !!python/object/apply:os.system [touch exploded]", "is not allowed"),
    ],
)  # fmt: skip
def test_a_config_that_attacks_is_wrong_input(tmp_path, monkeypatch, capsys, text, says):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(f"stage: pretrain.mae\n{text}\n")
    assert cli.main(["run", "a.yaml"]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and len(said) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


# ------------------------------------------------------------------------------------------------ pictures


def bomb_png(path: Path, side: int) -> None:
    """A few bytes that promise side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 99)))


def test_pictures_that_explode_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (20, 20), "red").save(pictures / "good.png")
    bomb_png(pictures / "above.png", 10_000)  # above the limit, where Pillow only warns
    bomb_png(pictures / "far.png", 100_000)  # far above it, where Pillow itself refuses
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded") if self.width > 20 else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        images = load(ImagesConfig, {"path": str(pictures)}).open()
    assert len(images) == 1 and [one.where for one in images.skipped] == ["above.png", "far.png"]
    assert "left out 2 of 3 pictures: above.png (10000x10000 pixels" in images.report()
    assert "far.png (too many pixels)" in images.report()


# ------------------------------------------------------------------------------------------------ secrets


def test_no_secret_reaches_a_run_a_log_or_a_report(tmp_path):
    """A whole stage with wandb offline, in a process of its own, with canaries in its environment and its arguments."""
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (i * 30, 9, 90)).save(tmp_path / f"pictures/{i}.png")
    (tmp_path / "mae.yaml").write_text(MAE)
    environ = launch.environment(**SECRETS, HOME=str(tmp_path), FLEDGE_CACHE=str(tmp_path / "cache"))
    del environ["WANDB_MODE"]
    code = "import sys; from fledge import cli; raise SystemExit(cli.main(sys.argv[1:sys.argv.index('--')]))"

    def command(*args: str) -> subprocess.CompletedProcess:
        typed = [sys.executable, "-c", code, *args, "--", "--token", SECRETS["HF_TOKEN"]]
        return subprocess.run(typed, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    good = command("run", "mae.yaml")
    assert good.returncode == 0, good.stderr
    wrong = [
        command("run", "mae.yaml", f"api_key={BY_HAND}"),
        command("run", "mae.yaml", f"--hf-token={BY_HAND}"),
        command("run", "mae.yaml", f"data.path=s3/{SECRETS['AWS_SECRET_ACCESS_KEY']}"),
        command("import", "causal-lm", f"{SECRETS['HF_TOKEN']}/x", "made"),
    ]
    assert [one.returncode for one in wrong] == [2, 2, 2, 2], [one.stderr for one in wrong]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and (tmp_path / "runs/mae/report.html") in written
    logs = [text.encode() for one in (good, *wrong) for text in (one.stdout, one.stderr)]
    for secret in (*SECRETS.values(), BY_HAND):
        assert not [path for path in written if secret.encode() in path.read_bytes()]
        assert not [log for log in logs if secret.encode() in log]


def test_what_is_redacted_and_what_is_not(monkeypatch):
    for name in list(os.environ):
        if "KEY" in name or "TOKEN" in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv("SOME_API_KEY", "0123456789")
    monkeypatch.setenv("DATABASE_PASSWORD", "0123456789abc")
    monkeypatch.setenv("USE_TOKEN", "1")
    monkeypatch.setenv("KEYBOARD", "dvorak-layout")
    assert redact("a 0123456789abc b 0123456789, 1 dvorak-layout") == "a … b …, 1 dvorak-layout"
    assert redact("override wandb.api_key=abc and --hf-token=x1 SECRET=y") == (
        "override wandb.api_key=… and --hf-token=… SECRET=…"
    )
    kept = "unknown key; rollout.max_new_tokens=5 tokenizer.vocab_size=3 monkey=4 a key: b, optim.lr=1e-3"
    assert redact(kept) == kept

"""The hand-off: every fault of every file is named, kinds are strict, and the lineage outlives its ancestors."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fledge import artifact, files
from fledge.config import Config, StageConfig, parent
from fledge.errors import InputError
from tests import launch

SCORE = {
    "metric": "bits per byte", "after": 2.125, "n": 20, "low": 2.0, "high": 2.25, "before": None, "baseline": 3.5,
    "baseline_name": "trigram", "unit": "documents", "note": "",
}  # fmt: skip


def save(folder: Path) -> None:
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"width": 6}\n')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}\n')


def make(path: Path, kind: str = "causal-lm", stage: str = "pretrain.clm", **options) -> artifact.Artifact:
    given = {"save": save, "config": f"stage: {stage}\nseed: 3\n", "architecture": {"width": 6}, "step": 40, "seed": 3}
    return artifact.write(path, kind=kind, **{**given, **options})


def edit(path: Path, change, sealed: bool = True) -> None:
    """Change a manifest as somebody would who knows how to seal it again."""
    manifest = json.loads((path / files.MANIFEST).read_text())
    change(manifest)
    text = files.canonical(files.seal(manifest) if sealed else manifest)
    (path / files.MANIFEST).write_text(text)


# ---- round trip -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_opened(tmp_path):
    scores = {"scores": [SCORE], "tokens": 1000}
    written = make(tmp_path / "a", metrics=scores, preprocessing={"tokenizer": "t"}, data={"train": {"n": (1, 2)}})
    opened = artifact.open(str(tmp_path / "a"), "causal-lm")
    assert opened.manifest == written.manifest
    assert (opened.kind, opened.stage, opened.name, opened.step, opened.seed) == (
        "causal-lm", "pretrain.clm", "clm", 40, 3,
    )  # fmt: skip
    assert (opened.metrics, opened.scores, opened.parents, opened.origin) == (scores, [SCORE], {}, None)
    assert opened.preprocessing == {"tokenizer": "t"} and opened.data == {"train": {"n": [1, 2]}}
    assert opened.tensors()["weight"].tolist() == list(range(6))
    assert set(opened.manifest["files"]) == {
        "README.md", "config.json", "config.yaml", "model.safetensors", "tokenizer.json"
    }  # fmt: skip


def test_the_digest_is_that_of_the_content(tmp_path):
    """Independent truth: sha256sum's own lines."""
    made = make(tmp_path / "a")
    names = sorted(path.name for path in made.path.iterdir() if path.name != "manifest.json")
    lines = subprocess.run(["sha256sum", *names], cwd=made.path, capture_output=True, check=True).stdout
    table = subprocess.run(["sha256sum"], input=lines, capture_output=True, check=True).stdout.decode()
    assert made.digest == table.split()[0]
    assert make(tmp_path / "b").digest == made.digest
    assert make(tmp_path / "c", config="stage: pretrain.clm\nseed: 4\n").digest != made.digest


def test_a_moved_folder_opens_from_any_directory(tmp_path, monkeypatch):
    made = make(tmp_path / "a")
    shutil.move(made.path, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert artifact.open(".", "causal-lm").digest == made.digest


def test_what_is_not_finite_becomes_null_and_what_is_not_json_is_refused(tmp_path):
    assert make(tmp_path / "a", metrics={"loss": float("nan")}).metrics == {"loss": None}
    with pytest.raises(TypeError):
        make(tmp_path / "b", metrics={"loss": torch.tensor(1.0)})
    assert not (tmp_path / "b").exists()


def test_shards_are_read_together(tmp_path):
    def shards(folder: Path) -> None:
        for i in (1, 2):
            save_file({f"weight{i}": torch.full((2,), float(i))}, folder / f"model-{i}.safetensors")
        index = {"weight_map": {"weight1": "model-1.safetensors", "weight2": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    tensors = make(tmp_path / "a", save=shards).tensors()
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"weight1": [1, 1], "weight2": [2, 2]}


def test_opening_needs_no_torch(tmp_path):
    made = make(tmp_path / "a")
    code = (
        f"import sys; from fledge import artifact; made = artifact.open({str(made.path)!r}); "
        "artifact.describe(made); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=launch.environment())


# ---- faults ---------------------------------------------------------------------------------------------------------

NAMES = ("model.safetensors", "config.json", "tokenizer.json", "README.md", "config.yaml", "manifest.json")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(Path("..") / path.name)


FAULTS = {
    "flip": (flip, "was changed after it was written"),
    "truncate": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "was changed after it was written"),
    "empty": (lambda path: path.write_bytes(b""), "was changed after it was written"),
    "remove": (Path.unlink, "is missing"),
    "link": (link, "is (a link|not a plain file)"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_of_any_file_is_named(tmp_path, name, fault):
    made = make(tmp_path / "a")
    break_it, words = FAULTS[fault]
    break_it(made.path / name)
    with pytest.raises(InputError, match=f"a: {name} {words}"):
        artifact.open(made.path)


def test_edited_weights_say_what_to_do(tmp_path):
    made = make(tmp_path / "a")
    expected = made.manifest["files"]["model.safetensors"]["sha256"][:12]
    flip(made.path / "model.safetensors")
    with pytest.raises(InputError) as error:
        artifact.open(made.path)
    assert f"expected {expected}…" in str(error.value) and "--fresh" in str(error.value)


def test_a_flip_of_a_byte_of_the_manifest_shows(tmp_path):
    made = make(tmp_path / "a", parents={"init": make(tmp_path / "b")})
    path = made.path / files.MANIFEST
    content = path.read_bytes()
    for at in range(0, len(content), 5):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(InputError):
            artifact.open(made.path)
    path.write_bytes(content)
    artifact.open(made.path)


@pytest.mark.parametrize("name", ["notes.txt", "deeper/model.safetensors", "pytorch_model.bin"])
def test_a_file_that_does_not_belong_is_named(tmp_path, name):
    made = make(tmp_path / "a")
    (made.path / name).parent.mkdir(exist_ok=True)
    (made.path / name).write_text("x")
    with pytest.raises(InputError, match=f"{name} does not belong here"):
        artifact.open(made.path)


ODD_NAMES = ["../b", "/etc/hosts", "a/../../b", "./a", "a//b", "", ".", "..", "a\\b", "C:b", "a\nb", "a/", "a\x00b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_outside_the_folder_is_refused_before_it_is_used(tmp_path, name, monkeypatch):
    (tmp_path / "b").write_text("secret")
    made = make(tmp_path / "a")
    entry = {"sha256": files.sha256(tmp_path / "b"), "bytes": 6}
    edit(made.path, lambda manifest: manifest["files"].update({name: entry}))
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail(f"read {path}"))
    with pytest.raises(InputError, match="not a plain name inside the folder"):
        artifact.open(made.path)


@pytest.mark.parametrize("name", ["a", "a.json", "deep/er/a.json", "é.txt", ".hidden", "a b", "..a"])
def test_plain_names(name):
    assert files.plain(name)


def test_a_folder_that_is_a_link_is_refused(tmp_path):
    made = make(tmp_path / "a")
    (tmp_path / "outside").mkdir()
    (made.path / "deeper").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="deeper does not belong here"):
        artifact.open(made.path)


@pytest.mark.parametrize(
    "table",
    [None, [], {"config.json": 3}, {"config.json": {"sha256": 1, "bytes": 2}}, {"config.json": {"sha256": "a"}}],
)
def test_a_manifest_of_other_types_is_refused(tmp_path, table):
    made = make(tmp_path / "a")
    edit(made.path, lambda manifest: manifest.update(files=table))
    with pytest.raises(InputError, match="no readable table of files"):
        artifact.open(made.path)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", "{", '"text"', '{"format": true}', "[" * 100_000, '{"a": NaN}']
)
def test_a_manifest_that_is_something_else_is_refused(tmp_path, text):
    made = make(tmp_path / "a")
    (made.path / files.MANIFEST).write_text(text)
    with pytest.raises(InputError, match="manifest.json was changed after it was written"):
        artifact.open(made.path)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("number", [0, 2, 17])
def test_another_format_number_is_refused_by_name(tmp_path, number, sealed):
    made = make(tmp_path / "a")
    edit(made.path, lambda manifest: manifest.update(format=number), sealed)
    with pytest.raises(InputError, match=f"has format {number}; this version of fledge reads format 1"):
        artifact.open(made.path)


def test_pickles_are_neither_written_nor_read(tmp_path):
    def pickled(folder: Path) -> None:
        torch.save({}, folder / "pytorch_model.bin")

    with pytest.raises(InputError, match="pytorch_model.bin may hold pickled code"):
        make(tmp_path / "a", save=pickled)
    made = make(tmp_path / "a")
    pickled(made.path)
    path = made.path / "pytorch_model.bin"
    entry = {"sha256": files.sha256(path), "bytes": path.stat().st_size}

    def add(manifest: dict) -> None:
        manifest["files"]["pytorch_model.bin"] = entry
        manifest["digest"] = files.table_digest(manifest["files"])

    edit(made.path, add)
    with pytest.raises(InputError, match="pytorch_model.bin may hold pickled code"):
        artifact.open(made.path)


@pytest.mark.parametrize("module", ["fledge/artifact.py", "fledge/checkpoint.py", "fledge/files.py"])
def test_no_module_here_can_unpickle(module):
    tree = ast.parse((launch.ROOT / module).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.save", "np.load", "eval", "exec"}


# ---- kinds and parents ----------------------------------------------------------------------------------------------


def test_kinds_are_strict(tmp_path):
    made = make(tmp_path / "a")
    assert artifact.open(made.path, ("text-encoder", "causal-lm")).kind == "causal-lm"
    message = "parents.encoder .*a is a causal-lm, expected a vision-encoder or text-encoder"
    with pytest.raises(InputError, match=message):
        artifact.open(made.path, ("vision-encoder", "text-encoder"), "encoder")
    edit(made.path, lambda manifest: manifest.update(kind="toaster"))
    with pytest.raises(InputError, match="is a 'toaster'; expected one of vision-encoder"):
        artifact.open(made.path)
    with pytest.raises(ValueError, match="toaster"):
        make(tmp_path / "b", kind="toaster")


def test_a_wrong_place_is_explained(tmp_path):
    make(tmp_path / "run/artifact")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.yaml").write_text("stage: pretrain.mae\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for place, words in {
        "run": "is a run's folder; give .*run/artifact",
        "unfinished": "no finished artifact yet",
        "empty": "manifest.json is missing.*fledge import",
        "absent": "does not exist",
        "file": "is a file",
    }.items():
        with pytest.raises(InputError, match=words):
            artifact.open(tmp_path / place)


class Parents(Config):
    image: str | None = parent("vision-encoder", required=True)
    text: str | None = parent("text-encoder", "causal-lm", required=False)


class Clip(StageConfig):
    stage: Literal["align.clip"] = "align.clip"
    parents: Parents = Parents()


class Alone(StageConfig):
    stage: Literal["pretrain.alone"] = "pretrain.alone"


def test_parents_are_opened_by_role(tmp_path):
    vision, text = make(tmp_path / "v", "vision-encoder"), make(tmp_path / "t")
    both = artifact.open_parents(Clip(parents=Parents(image=str(vision.path), text=str(text.path))))
    assert {role: made.digest for role, made in both.items()} == {"image": vision.digest, "text": text.digest}
    assert list(artifact.open_parents(Clip(parents=Parents(image=str(vision.path))))) == ["image"]
    assert artifact.open_parents(Alone()) == {}
    with pytest.raises(InputError, match=r"align.clip needs parents.image \(a vision-encoder\)"):
        artifact.open_parents(Clip())
    with pytest.raises(InputError, match="parents.image .*t is a causal-lm, expected a vision-encoder"):
        artifact.open_parents(Clip(parents=Parents(image=str(text.path))))


# ---- writing --------------------------------------------------------------------------------------------------------


def test_an_older_artifact_is_replaced_and_nothing_else_is_left(tmp_path):
    make(tmp_path / "a")
    (tmp_path / ".tmp-a-00000000").mkdir()
    (tmp_path / ".tmp-other-00000000").mkdir()
    new = make(tmp_path / "a", step=41, config="stage: x.y\n")
    assert artifact.open(tmp_path / "a").digest == new.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-other-00000000", "a"]


def test_what_is_not_an_artifact_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    made = make(tmp_path / "a")
    (made.path / "notes.txt").write_text("mine")
    for name, words in {"thesis": "chapter1.tex", "file": "not only an artifact", "a": "notes.txt"}.items():
        with pytest.raises(InputError, match=words):
            make(tmp_path / name)
    assert (tmp_path / "thesis/chapter1.tex").read_text() == "years"
    assert (made.path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")


def test_a_failed_save_leaves_the_older_one(tmp_path):
    made = make(tmp_path / "a")

    def fail(folder: Path) -> None:
        save(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", save=fail, step=50)
    assert artifact.open(tmp_path / "a").digest == made.digest
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    """Cut off before any single rename or write, a folder either has no manifest or verifies."""
    order = []
    write_text, rename = files.write_text, os.rename
    monkeypatch.setattr(files, "write_text", lambda path, text: (order.append(path.name), write_text(path, text)))
    monkeypatch.setattr(files.os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    sync = files.sync
    monkeypatch.setattr(files, "sync", lambda path: (order.append(f"sync {path.name}"), sync(path)))
    make(tmp_path / "a")
    at = order.index("manifest.json")
    assert {"sync model.safetensors", "sync README.md", "sync config.yaml"} <= set(order[:at])
    assert order[at + 1].startswith("sync .tmp-a-") and order[at + 2 :] == ["rename", f"sync {tmp_path.name}"]


# ---- lineage --------------------------------------------------------------------------------------------------------


def family(root: Path) -> artifact.Artifact:
    clm = make(root / "clm", data={"source": "world", "digest": "ab" * 32})
    data = {"source": "world"}
    sft = make(root / "sft", "chat-model", "finetune.sft", parents={"model": clm}, data=data, step=60)
    reward = make(
        root / "rm", "reward-model", "align.reward", parents={"model": sft}, data=data, metrics={"scores": [SCORE]}
    )
    return make(root / "ppo", "chat-model", "align.ppo", parents={"policy": sft, "reward": reward}, step=None)


def test_the_lineage_survives_its_ancestors(tmp_path):
    family(tmp_path)
    digests = {name: artifact.open(tmp_path / name).digest for name in ("clm", "sft", "rm", "ppo")}
    for name in ("clm", "sft", "rm"):
        shutil.rmtree(tmp_path / name)
    ppo = artifact.open(shutil.move(tmp_path / "ppo", tmp_path / "moved"))
    line = artifact.lineage(ppo)
    assert line["digest"] == digests["ppo"]
    assert line["parents"]["policy"]["digest"] == digests["sft"]
    assert line["parents"]["reward"]["parents"]["model"]["parents"]["model"]["digest"] == digests["clm"]
    clm, sft, rm, me = (digests[name][:12] for name in ("clm", "sft", "rm", "ppo"))
    assert artifact.tree(ppo) == (
        f"ppo  chat-model  align.ppo  {me}\n"
        f"├─ policy: sft  chat-model  finetune.sft  step 60  {sft}\n"
        f"│  ├─ model: clm  causal-lm  pretrain.clm  step 40  {clm}\n"
        "│  │  └─ raw text: digest=abababababab, source=world\n"
        "│  └─ prompts and answers: source=world\n"
        f"└─ reward: reward  reward-model  align.reward  step 40  {rm}\n"
        f"   ├─ model: sft  chat-model  finetune.sft  step 60  {sft}\n"
        f"   │  ├─ model: clm  causal-lm  pretrain.clm  step 40  {clm}\n"
        "   │  │  └─ raw text: digest=abababababab, source=world\n"
        "   │  └─ prompts and answers: source=world\n"
        "   └─ preferences: source=world"
    )


def test_an_imported_one_has_an_origin(tmp_path):
    made = make(tmp_path / "a", "vision-encoder", origin={"source": "timm", "name": "vit_tiny"}, config="{}", step=None)
    assert made.name == "a"
    assert artifact.tree(made).splitlines()[1] == "└─ origin: name=vit_tiny, source=timm"


def test_describe_says_what_it_is(tmp_path):
    family(tmp_path)
    text = artifact.describe(artifact.open(tmp_path / "rm"))
    for words in (
        "reward-model",
        "align.reward",
        "bits per byte",
        "3.5 (trigram)",
        "2.125",
        "[2, 2.25]",
        "20 documents",
    ):
        assert words in text
    assert "lineage\n  reward  reward-model" in text and artifact.open(tmp_path / "rm").digest in text


@pytest.mark.parametrize("kind", artifact.KINDS)
def test_the_card_has_python_that_loads_it(tmp_path, kind):
    made = make(tmp_path / "a", kind, metrics={"scores": [{**SCORE, "note": "a | <b>"}]})
    card = (made.path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names = {
        "vision-encoder": ["timm.create_model", "local-dir:FOLDER"],
        "image-classifier": ["timm.create_model", "local-dir:FOLDER"],
        "text-encoder": ["AutoModel", "AutoModelForMaskedLM"],
        "causal-lm": ["AutoModelForCausalLM"],
        "chat-model": ["AutoModelForCausalLM", "apply_chat_template"],
        "reward-model": ["AutoModelForSequenceClassification"],
        "reward-ensemble": ["AutoModelForSequenceClassification", "members"],
        "dual-encoder": ["VisionTextDualEncoderModel"],
    }[kind]
    ast.parse(code)
    assert all(name in code for name in names)
    assert "fledge" not in code and str(tmp_path) not in card
    assert "a \\| &lt;b>" in card


# ---- loading --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3)
        self.head.weight = self.embed.weight


def test_load_state_reports_and_loads(tmp_path):
    source, model = Model(), Model()
    full = source.state_dict()
    assert artifact.load_state(model, full, where="x") == "x: loaded 2 of 2 tensors"
    assert model.embed.weight.equal(source.embed.weight) and model.head.weight is model.embed.weight
    one_name = {
        name: tensor for name, tensor in full.items() if name != "head.weight"
    }  # as transformers saves tied ones
    assert artifact.load_state(Model(), one_name) == "loaded 2 of 2 tensors"
    report = artifact.load_state(
        model, {"embed.weight": torch.ones(3, 2), "decoder.a": torch.ones(1)},
        expect_missing=["head.bias"], expect_unexpected=["decoder.*"],
    )  # fmt: skip
    assert report == "loaded 1 of 2 tensors; not given: head.bias; not used: decoder.a"
    assert model.head.weight.equal(torch.ones(3, 2)) and model.head.bias.equal(source.head.bias)


def test_load_state_is_strict():
    model = Model()
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in full.items()}
    cases = [
        ({"embed.weight": full["embed.weight"] + 1}, "head.bias is missing"),
        ({**full, "extra": torch.ones(1), "embed.weight": full["embed.weight"]}, "extra is left over"),
        ({**full, "head.bias": torch.ones(4)}, r"head.bias has shape \[4\], expected \[3\]"),
        ({**full, "embed.weight": full["embed.weight"] + 1}, "embed.weight and head.weight are tied but differ"),
    ]
    for given, words in cases:
        with pytest.raises(InputError, match=f"somewhere do not fit Model: .*{words}"):
            artifact.load_state(model, given, where="somewhere")
        assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_digest_is_that_of_its_content(tmp_path):
    def write(**content) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return artifact.tokenizer_digest(tmp_path)

    vocab = {"vocab": {"a": 0, "é": 1}}
    plain = write(model=vocab, padding=None, truncation=None)
    assert plain == write(padding={"length": 8}, model=vocab, truncation={"max_length": 8})
    assert plain != write(model={"vocab": {"a": 1, "é": 0}}, padding=None, truncation=None)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        artifact.tokenizer_digest(tmp_path)


def test_another_tokenizer_is_refused_by_both_names(tmp_path):
    a, b = (make(tmp_path / name, preprocessing={"tokenizer": "11" * 32}) for name in "ab")
    artifact.same_tokenizer(a, b)
    other = make(tmp_path / "c", "reward-model", preprocessing={"tokenizer": "22" * 32})
    with pytest.raises(InputError, match=r"a \(causal-lm, tokenizer 1{12}\) and .*c \(reward-model, tokenizer 2{12}\)"):
        artifact.same_tokenizer(a, other)
    unsaid = make(tmp_path / "d")  # falls back on the file itself
    artifact.same_tokenizer(unsaid, make(tmp_path / "e"))
    pictures = make(tmp_path / "f", "vision-encoder", save=lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(InputError, match="unknown"):
        artifact.same_tokenizer(pictures, pictures)

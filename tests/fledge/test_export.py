"""`fledge export`: every stage's artifact from any of its checkpoints, and the run's own folder stays as it is."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fledge import artifact, cli
from fledge.config import load
from fledge.errors import InputError
from fledge.export import export
from tests.fledge.test_resume import CASES, STEPS, placed, write_data

TRAINED = [name for name, case in CASES.items() if case.steps]


class Family:
    """Small data, and one finished run of each stage, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_data(root)

    def config(self, name: str) -> dict[str, Any]:
        case = CASES[name]
        parents = {role: str(self.run(parent) / "artifact") for role, parent in (case.parents or {}).items()}
        config = {
            "stage": case.stage,
            "name": name,
            "seed": 5,
            "out": str(self.root / "runs"),
            "track": {"wandb": "off"},
        }
        return {**config, **placed(case.config, self.root), **({"parents": parents} if parents else {})}

    def run(self, name: str) -> Path:
        folder = self.root / "runs" / name
        if not folder.exists():
            module = importlib.import_module(CASES[name].stage)
            module.main(load(module.Config, self.config(name)))
        return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def mae(family, tmp_path) -> Path:
    """A copy of the run, to be spoiled."""
    shutil.copytree(family.run("mae"), tmp_path / "mae")
    return tmp_path / "mae"


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", TRAINED)
def test_every_stage_is_exported_from_its_checkpoints(family, name, tmp_path, capsys):
    run = family.run(name)
    before = contents(run)
    own = artifact.open(run / "artifact")
    last = export(str(run), tmp_path / "last")
    earlier, later = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    assert later == STEPS
    assert cli.main(["export", f"{run}@{earlier}", str(tmp_path / "earlier")]) == 0
    said = capsys.readouterr().out
    assert f"from step {earlier} of {run}@{earlier}" in said and f"step {earlier} of {STEPS} is handed over" in said
    assert contents(run) == before

    kept = ("kind", "stage", "name", "seed", "architecture", "parents", "data")
    for made, step in ((last, STEPS), (artifact.open(tmp_path / "earlier"), earlier)):
        assert {key: made.manifest[key] for key in kept} == {key: own.manifest[key] for key in kept}
        assert (made.step, made.scores) == (step, [])
        assert made.checkpoint == {"step": step, "of": STEPS, "why": "exported"}
        assert f"{step} of {STEPS} (exported)" in artifact.describe(made)
        assert f"{step} of {STEPS} (exported)" in (made.path / "README.md").read_text()
        assert made.manifest["files"].keys() == own.manifest["files"].keys()
    same = ("model.safetensors", "config.json", "tokenizer.json", "config.yaml")
    changed = [f for f in same if last.manifest["files"].get(f) != own.manifest["files"].get(f)]
    assert changed == [] and last.preprocessing == own.preprocessing
    final, first = weights(last.path), weights(tmp_path / "earlier")
    assert final.keys() == first.keys() and not all(torch.equal(final[key], first[key]) for key in final)


def test_the_weights_are_those_of_the_checkpoint(family, tmp_path):
    run = family.run("mae")
    made = weights(export(f"{run}@9", tmp_path / "a").path)
    saved = load_file(run / "checkpoints/step_00000009/model.safetensors")
    assert len(made) > 20 and all(torch.equal(tensor, saved[f"encoder.{key}"]) for key, tensor in made.items())


def test_an_unfinished_run_with_a_broken_checkpoint(mae, tmp_path):
    """It is as a kill left it, and the disk has flipped a byte: the export takes the older one and moves nothing."""
    shutil.rmtree(mae / "artifact")
    newest = mae / "checkpoints/step_00000012/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    before = contents(mae)
    assert export(str(mae), tmp_path / "a").step == 9
    with pytest.raises(InputError, match=r"step_00000012 is broken: model.safetensors was changed"):
        export(f"{mae}@12", tmp_path / "b")
    assert contents(mae) == before


def test_the_best_of_a_run(family, tmp_path):
    module = importlib.import_module("pretrain.dino")
    given = family.config("dino") | {"name": "best", "out": str(tmp_path)}
    given["train"] = {**given["train"], "keep": 1, "eval_every": 2, "save_every": 100}
    given["train"]["select"] = {"metric": "eval/knn_top1", "mode": "min"}
    made = module.main(load(module.Config, given))
    note = json.loads((tmp_path / "best/best.json").read_text())
    curve = [json.loads(line) for line in (tmp_path / "best/metrics.jsonl").read_text().splitlines()]
    measured = {line["step"] + 1: line["eval/knn_top1"] for line in curve if "eval/knn_top1" in line}
    best = min(measured, key=lambda step: (measured[step], step))
    assert (note["step"], note["value"]) == (best, measured[best]) and best < STEPS
    assert made.step == best and made.checkpoint["of"] == STEPS and made.scores
    assert made.checkpoint["why"] == f"the best by eval/knn_top1, {measured[best]:.6g}"
    again = export(f"{tmp_path / 'best'}@best", tmp_path / "again")
    assert again.step == best and (tmp_path / "best" / note["checkpoint"]).is_dir()
    assert again.manifest["files"]["model.safetensors"] == made.manifest["files"]["model.safetensors"]
    assert export(str(tmp_path / "best"), tmp_path / "last").step == STEPS


def test_data_and_parents_that_moved_are_named_and_can_be_given(family, mae, tmp_path):
    shutil.copytree(family.root / "pictures", tmp_path / "moved")
    text = (mae / "config.yaml").read_text()
    (mae / "config.yaml").write_text(text.replace(str(family.root / "pictures"), str(tmp_path / "gone")))
    with pytest.raises(InputError, match="gone does not exist"):
        export(str(mae), tmp_path / "a")
    assert export(str(mae), tmp_path / "a", [f"data.path={tmp_path / 'moved'}"]).step == STEPS
    next((tmp_path / "moved").rglob("*.png")).unlink()
    with pytest.raises(InputError, match="was trained with something else .data data"):
        export(str(mae), tmp_path / "b", [f"data.path={tmp_path / 'moved'}"])


def test_what_cannot_be_exported(family, mae, tmp_path, monkeypatch):
    probe = family.run("classify")
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys/x.txt").write_text("x")
    before = contents(tmp_path)
    for run, folder, overrides, says in [
        (tmp_path / "nowhere", "a", [], "nowhere is no folder"),
        (f"{mae}@seven", "a", [], "'seven' is no step"),
        (f"{mae}@best", "a", [], "was not trained with train.select"),
        (f"{mae}@7", "a", [], "no checkpoint of step 7; it has 9, 12"),
        (mae / "artifact", "a", [], "is no run's folder"),
        (mae, "mae/artifact", [], "lies inside the run"),
        (mae, "mae", [], "lies inside the run"),
        (mae, "somebodys", [], "is not only an artifact"),
        (mae, "a", ["optim.lr=1"], "was trained with something else .optim.lr 0.01 -> 1"),
        (mae, "a", ["train.stepz=1"], "did you mean steps"),
        (probe, "a", [], "classify/checkpoints: no whole checkpoint; it has none"),
    ]:
        with pytest.raises(InputError, match=says):
            export(str(run), tmp_path / folder, overrides)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        export(str(mae), tmp_path / "a")
    assert contents(tmp_path) == before


def test_a_checkpoint_of_adapters_holds_no_base(family, tmp_path):
    """It is a small part of the parent that it began from, whose weights it does not repeat."""
    run, parent = family.run("sft_lora"), family.run("clm")
    saved = load_file(run / "checkpoints/step_00000012/model.safetensors")
    assert len(saved) == 2 * 4 * 3 and all("lora_" in key for key in saved)  # A, B and magnitude of 2 · 4 layers
    folders = (one / "checkpoints/step_00000012" for one in (run, parent))
    mine, his = (sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in folders)
    assert mine < his / 3
    made = export(str(run), tmp_path / "made").path
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= artifact.open(made).manifest[
        "files"
    ].keys()
    before, after = weights(parent / "artifact"), weights(made)
    assert before.keys() == after.keys() and torch.equal(
        before["transformer.wte.weight"], after["transformer.wte.weight"]
    )

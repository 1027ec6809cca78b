"""What the documents show is true: their files run, their configs load, their links lead somewhere."""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

from fledge import artifact, cli, files, recipe, sweep
from fledge import config as configs
from fledge.data import chats, preferences
from fledge.errors import InputError
from tests.test_configs import departures, explained, missing

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, what else stands on the opening line, text) of each code block."""
    return re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", (ROOT / page).read_text(), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if not link.startswith(("http://", "https://", "mailto:"))]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


# ------------------------------------------------------------------------------------------------ CONTRIBUTING.md


def module_of(path: Path, name: str, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_a_method_runs_as_it_stands(elsewhere, monkeypatch, capsys):
    """Its file, its config and its test: trained for a few steps, handed over, loaded by timm."""
    for _, name, content in blocks("CONTRIBUTING.md"):
        if name:
            path = elsewhere / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    method = module_of(elsewhere / "pretrain/rotation.py", "pretrain.rotation", monkeypatch)
    tests = module_of(elsewhere / "tests/pretrain/test_rotation.py", "test_rotation", monkeypatch)
    ran = [getattr(tests, name)() for name in dir(tests) if name.startswith("test_")]
    assert len(ran) == 2

    config = "configs/pretrain/rotation_world.yaml"
    assert cli.main(["run", config, "train.steps=3", "train.batch=8", "train.device=cpu"]) == 0
    assert "(not measured)" in capsys.readouterr().out
    assert timm.create_model("local-dir:runs/rotation/artifact", pretrained=True).num_classes == 0

    tree = configs.read(config)
    made = configs.load(method.Config, config)
    lines = Path(config).read_text().splitlines()
    assert not missing(made, tree.data)
    assert [key for key in departures(made, None) if not explained(tree, key, lines)] == []


# ------------------------------------------------------------------------------------------------ docs/data.md


def sections(folder: Path) -> list[tuple[str, dict]]:
    """(stage, YAML) of each snippet of docs/data.md, with the JSON lines that the page shows beside small pictures."""
    for language, name, content in blocks("docs/data.md"):
        if language == "jsonl":
            (folder / name).write_text(content)
    for name in ("cat", "dog"):
        for place in (f"photos/{name}.jpg", f"photos/{name}s/{name}.png", f"photos/{name}s/other.png"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (len(place), len(name), ord(name[0]))).save(folder / place)
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("One document.\n\nAnother one.\n")
    return [(name, yaml.safe_load(text)) for language, name, text in blocks("docs/data.md") if language == "yaml"]


def test_every_snippet_of_the_data_page_loads_and_reads_what_it_shows(elsewhere):
    seen = set()
    for stage, data in sections(elsewhere):
        cls = recipe.import_stage(stage, "").Config
        parents = {role: "somewhere" for role, wanted in configs.roles(cls).items() if wanted.required}
        config = configs.load(cls, {"stage": stage, "parents": parents, **data})
        if stage == "finetune.classify":
            continue  # the picture beside the folders is for CLIP: here they would be two classes
        config.data.check()
        assert config.data.fingerprint()
        if stage == "finetune.sft":
            everything = config.data.model_copy(update={"validation_fraction": 0.0, "test_fraction": 0.0})
            seen |= {record["messages"][-1]["content"] for record in chats.conversations(everything, "train")}
        elif stage == "align.reward":
            everything = config.data.model_copy(update={"validation_fraction": 0.0, "test_fraction": 0.0})
            seen |= {record["chosen"][-1]["content"] for record in preferences.pairs(everything, "train")}
        elif stage == "align.clip":
            seen |= set(config.data.open().captions)
    assert seen == {
        "Shakespeare.", "Paris.", "Red.", "Hello, nice to see you.", "You are welcome.",
        "a cat on a wall", "a dog at the sea",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ docs/configs.md


def page(language: str) -> str:
    (content,) = [content for found, _, content in blocks("docs/configs.md") if found == language]
    return content


def test_the_recipe_of_the_configs_page_loads(elsewhere):
    shutil.copytree(ROOT / "configs", elsewhere / "configs")
    Path("configs/recipes/mine.yaml").write_text(page("yaml"))
    job = recipe.load("configs/recipes/mine.yaml")
    assert [(stage.name, stage.config.stage) for stage in job.stages] == [
        ("mae", "pretrain.mae"),
        ("probe", "finetune.classify"),
    ]
    assert job.stages[0].config.optim.lr == 1e-3


def test_the_overrides_of_the_configs_page_are_accepted(monkeypatch):
    commands = re.findall(r"^(?:fledge (?:run|plan)|python -m pretrain.mae) (\S+)([^#\n]*)", page("bash"), re.M)
    assert len(commands) == 5
    for file, overrides in commands:
        recipe.load(ROOT / file if "/" in file else file, overrides.split())
    for override in ("seed=1", "optim.betas=[0.9, 0.95]", "evaluation=null", "data={source: folder, path: photos}"):
        assert f"`{override}`" in (ROOT / "docs/configs.md").read_text()
        recipe.load(ROOT / "configs/pretrain/mae_world.yaml", [override, "model.in_chans=3", "data.channels=3"])


def test_the_errors_of_the_configs_page_are_those_that_are_told(elsewhere):
    Path("mae.yaml").write_text("stage: pretrain.mae\ndata: {source: world}\noptim:\n  lrr: 1\nseed: one\n")
    with pytest.raises(InputError) as caught:
        recipe.load("mae.yaml")
    assert str(caught.value) + "\n" == page("text")


def test_the_schema_of_the_configs_page_is_written(elsewhere):
    exec(page("python"), {})
    schema = json.loads(Path("mae.schema.json").read_text())
    assert schema["properties"]["optim"] and schema["additionalProperties"] is False


# ------------------------------------------------------------------------------------------------ docs/handoff.md


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="this system has no sha256sum")
def test_the_manifest_is_as_the_handoff_page_says(elsewhere):
    """Fields, digest and seal of a real one, by the page's own words and command."""
    text = (ROOT / "docs/handoff.md").read_text()
    made = artifact.write(
        elsewhere / "artifact", kind="causal-lm", config="stage: pretrain.clm", architecture={},
        save=lambda to: [(to / name).write_text(name) for name in ("b.json", "a.json", "é.txt")],
    )  # fmt: skip
    fields = {name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert fields == set(made.manifest)
    assert all(f"`{kind}`" in text for kind in artifact.KINDS)
    assert all(f"`{suffix}`" in text for suffix in files.PICKLES)
    command = next(content for _, _, content in blocks("docs/handoff.md") if "sha256sum" in content)
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == made.digest
    lines = (made.path / "manifest.json").read_text().splitlines(True)
    unsealed = "".join(line for line in lines if not line.startswith(' "seal"'))
    assert hashlib.sha256(unsealed.encode()).hexdigest() == made.manifest["seal"]


# ------------------------------------------------------------------------------------------------ commands


SPEAKING = [
    *PAGES,
    *(path for part in ("pretrain", "finetune", "align", "configs") for path in (ROOT / part).rglob("*.*")),
]


def test_every_config_that_is_named_exists():
    told = {name for path in SPEAKING if path.suffix in (".md", ".py", ".yaml")
            for name in re.findall(r"configs/[a-z]+/[a-z0-9_]+\.yaml", path.read_text())}  # fmt: skip
    assert len(told) > 15
    made_up = {"configs/pretrain/rotation_world.yaml"}  # of the example in CONTRIBUTING.md
    assert not [name for name in told - made_up if not (ROOT / name).exists()]


# ------------------------------------------------------------------------------------------------ docs/tracking.md


def test_the_sweeps_of_the_tracking_page_are_accepted():
    commands = re.findall(r"^fledge (?:run|plan) (\S+) (--set [^#\n]+)", (ROOT / "docs/tracking.md").read_text(), re.M)
    count = []
    for file, options in commands:
        sets = re.findall(r"--set (\S+)", options)
        count.append(len(sweep.load(ROOT / file if "/" in file else file, sets).combinations))
    assert count == [4, 2, 3]

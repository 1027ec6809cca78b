"""Recipes with two stand-in stages: order, merging, decisions, reuse, and every mistake before anything runs."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Literal

import pytest

from fledge import artifact, recipe
from fledge import config as configs
from fledge.config import Config, DataConfig, StageConfig, bookkeeping, hardware, parent
from fledge.errors import InputError
from fledge.evals.score import Score
from fledge.files import sha256
from fledge.track import Run, TrackConfig

ran: list[str] = []  # names of the stages whose main was called
crash: set[str] = set()  # names of the stages that are interrupted in the middle


class Text(DataConfig):
    path: str | None = hardware(None)
    times: int = 1

    def fingerprint(self) -> str:
        return "none" if self.path is None else sha256(Path(self.path))

    def check(self) -> None:
        if self.path is not None and not Path(self.path).is_file():
            raise InputError(f"{self.path} does not exist")


class Optim(Config):
    lr: float = 0.1


class See(StageConfig):
    stage: Literal["pretrain.see"] = "pretrain.see"
    data: Text = Text()
    optim: Optim = Optim()
    workers: int = hardware(0)
    remark: str = bookkeeping("")
    track: TrackConfig = TrackConfig()


class Parents(Config):
    image: str | None = parent("vision-encoder", required=True)
    text: str | None = parent("text-encoder", required=False)


class Join(StageConfig):
    stage: Literal["align.join"] = "align.join"
    parents: Parents = Parents()
    optim: Optim = Optim()
    track: TrackConfig = TrackConfig()


def main(kind):
    """A stage that learns nothing: its weights are a function of its config and parents."""

    def stage(config):
        parents = artifact.open_parents(config)
        with Run.open(config, parents) as run:
            ran.append(run.name)
            if run.name in crash:
                raise KeyboardInterrupt
            weights = json.dumps([configs.science(config), {r: p.digest for r, p in parents.items()}])
            score = Score(
                "accuracy", after=0.5, n=10, low=0.4, high=0.6, before=0.1, baseline=0.7, baseline_name="luck"
            )
            return run.publish(
                kind, lambda to: (to / "model.safetensors").write_text(weights), [score], architecture={"name": "none"}
            )

    return stage


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """pretrain.see and align.join, as if they were files."""
    for name, cls, writes in (("pretrain.see", See, "vision-encoder"), ("align.join", Join, "dual-encoder")):
        module = types.ModuleType(name)
        module.Config, module.main, module.WRITES = cls, main(writes), writes
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("FLEDGE_DATA", raising=False)
    ran.clear()
    crash.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe of three stages, written child first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("some words")
    (tmp_path / "see.yaml").write_text("stage: pretrain.see\ndata: {path: words.txt}\noptim: {lr: 1}\n")
    (tmp_path / "r.yaml").write_text(
        """title: Three stages
stages:
  both: {stage: align.join, set: {track.wandb: off}, parents: {image: one}}
  one: {stage: pretrain.see, config: see.yaml, set: {optim.lr: 2, track: {wandb: off}}}
  two: {stage: pretrain.see, config: see.yaml, set: {track.wandb: off}}
"""
    )
    return tmp_path


def run(*overrides, **options):
    """Names of the stages that really ran."""
    ran.clear()
    recipe.run("r.yaml", overrides, "out", **options)
    return list(ran)


def actions(*overrides):
    job = recipe.load("r.yaml", overrides, "out")
    return {stage.name: decision for stage, decision in zip(job.stages, recipe.decisions(job), strict=True)}


def fails(*overrides, text=None, folder=Path()):
    if text is not None:
        (folder / "r.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        recipe.load("r.yaml", overrides, "out")
    assert not ran and not Path("out").exists()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ order and merging


def test_parents_run_first_and_feed_their_children(folder, capsys):
    assert run() == ["one", "both", "two"]
    both = artifact.open("out/both/artifact", "dual-encoder")
    assert both.parents["image"]["digest"] == artifact.open("out/one/artifact").digest
    said = capsys.readouterr().out
    assert "── one  (pretrain.see, 1 of 3)" in said
    row = next(line for line in said.splitlines() if line.startswith("one    accuracy"))
    for cell in ("0.7 (luck)", "0.1", "0.5", "[0.4, 0.6]", "10 examples", "out/one/artifact"):
        assert cell in row
    assert "! one, accuracy: does not beat its baseline (luck)" in said
    assert "report: out/report.html" in said and Path("out/report.html").exists()


def test_the_config_file_then_set_then_overrides(folder):
    jobs = {stage.name: stage.config for stage in recipe.load("r.yaml", ["two.optim.lr=3"], "out").stages}
    assert (jobs["one"].optim.lr, jobs["two"].optim.lr, jobs["both"].optim.lr) == (2.0, 3.0, 0.1)
    assert jobs["one"].name == "one" and jobs["one"].out == "out" and jobs["one"].track.group == "Three stages"
    assert jobs["both"].parents.image == "out/one/artifact"


def test_runs_lie_under_the_recipes_name_unless_told_otherwise(folder):
    assert recipe.load("r.yaml").stages[0].dir == Path("runs/r/one")


def test_parents_can_be_rewired_and_taken_from_a_folder(folder):
    run(only="one")
    job = recipe.load("r.yaml", ["both.parents.image=two"], "out")
    assert [stage.name for stage in job.stages] == ["two", "both", "one"]
    assert job.stages[1].parents["image"].stage == "two"
    job = recipe.load("r.yaml", ["both.parents.image=out/one/artifact"], "elsewhere")
    assert job.stages[0].config.parents.image == "out/one/artifact"


def test_one_stage_is_a_file_too(folder):
    made = recipe.run("see.yaml", ["see.optim.lr=5", "track.wandb=off"], "out")
    assert list(made) == ["see"] and "lr: 5.0" in Path("out/see/config.yaml").read_text()
    assert Path("out/see/report.html").exists()


def test_the_place_of_data(folder, monkeypatch):
    monkeypatch.setenv("FLEDGE_DATA", "kept")  # so that it is restored
    (folder / "r.yaml").write_text("data: given\nstages: {one: {stage: pretrain.see}}")
    for environment, override, expected in (("set", (), "set"), ("", (), "given"), ("set", ("data=over",), "over")):
        os.environ["FLEDGE_DATA"] = environment
        recipe.load("r.yaml", override)
        assert Path(os.environ["FLEDGE_DATA"]).name == expected


# ------------------------------------------------------------------------------------------------ decisions


def test_what_is_finished_is_reused(folder):
    run()
    assert run() == []
    assert {d.action for d in actions().values()} == {"reuse"}


@pytest.mark.parametrize("override", ["one.workers=2", "one.remark=hello", "one.track.project=x"])
def test_hardware_and_bookkeeping_change_nothing(folder, override):
    run()
    assert run(override) == []


def test_a_changed_field_runs_the_stage_and_its_children_again(folder):
    run()
    would = actions("one.optim.lr=9")
    assert would["one"] == ("run", "changed: optim.lr 2.0 -> 9.0")
    assert would["both"].action == "run" and "parents.image" in would["both"].why
    assert would["two"].action == "reuse"
    before = Path("out/one/identity.json").read_text()
    assert run("one.optim.lr=9") == ["one", "both"]
    assert Path("out/one~1/identity.json").read_text() == before  # moved aside, not deleted
    assert artifact.open("out/one~1/artifact").digest != artifact.open("out/one/artifact").digest
    assert run() == ["one", "both"] and Path("out/one~2").exists()


def test_changed_data_is_named_and_a_moved_file_is_not_a_change(folder):
    run()
    Path("words.txt").rename("moved.txt")
    assert run("one.data.path=moved.txt", "two.data.path=moved.txt") == []
    Path("moved.txt").write_text("other words")
    would = actions("one.data.path=moved.txt", "two.data.path=moved.txt")
    assert would["one"].why.startswith("changed: data data ") and " -> " in would["one"].why


def test_a_changed_parent_is_named(folder):
    run()
    would = actions("both.parents.image=two")
    assert would["both"].action == "run" and would["both"].why.startswith("changed: parent image ")


def test_an_interrupted_recipe_goes_on(folder):
    crash.add("both")
    with pytest.raises(KeyboardInterrupt):
        run()
    assert ran == ["one", "both"]
    would = actions()
    assert [would[n].action for n in ("one", "both", "two")] == ["reuse", "resume", "run"]
    (Path("out/both/checkpoints/step_00000042")).mkdir(parents=True)
    assert actions()["both"].why == "from step 42"
    crash.clear()
    assert run() == ["both", "two"]


def test_fresh_moves_everything_aside(folder):
    run()
    assert run(fresh=True) == ["one", "both", "two"]
    assert Path("out/one~1").exists() and Path("out/both~1").exists()


def test_an_edited_artifact_is_set_aside_and_written_again(folder):
    run()
    digest = artifact.open("out/two/artifact").digest
    with open("out/two/artifact/model.safetensors", "a") as file:
        file.write("x")
    assert actions()["two"].action == "resume" and "model.safetensors" in actions()["two"].why
    assert run() == ["two"]
    assert artifact.open("out/two/artifact").digest == digest
    assert Path("out/two/artifact~1/model.safetensors").exists()


def test_a_folder_of_somebody_else_is_left_alone(folder):
    Path("out/one").mkdir(parents=True)
    Path("out/one/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="out/one exists and is no run of fledge"):
        run()
    assert Path("out/one/thesis.tex").read_text() == "years of work"


def test_only_one_stage(folder):
    with pytest.raises(InputError, match="its parent image is the stage one, which has not finished in out"):
        run(only="both")
    assert run(only="one") == ["one"]
    assert run(only="both") == ["both"]
    with pytest.raises(InputError, match="--only bth: expected one of one, both, two; did you mean both?"):
        run(only="bth")


def test_plan_prints_configs_and_decisions_and_writes_nothing(folder):
    text = recipe.plan("r.yaml", ["one.optim.lr=7"], "out")
    assert "# one\nstage: pretrain.see" in text and "lr: 7.0" in text
    assert [line.split()[:5] for line in text.splitlines()[-3:]] == [
        ["one", "pretrain.see", "–", "run", "not"],
        ["both", "align.join", "image:", "one", "run"],
        ["two", "pretrain.see", "–", "run", "not"],
    ]
    assert not Path("out").exists()


def test_differences_say_old_and_new():
    old = {"stage": "s", "config": {"a": {"b": 1, "gone": 0}, "c": [1]}, "parents": {"x": "0" * 64}, "data": {}}
    new = {"stage": "s", "config": {"a": {"b": 2}, "c": [1]}, "parents": {"x": "1" * 64}, "data": {"data": "d"}}
    assert [words for _, words in recipe.differences(old, new)] == [
        "a.b 1 -> 2",
        "a.gone 0 -> (absent)",
        "parent x 000000000000 -> 111111111111",
        "data data (absent) -> d",
    ]


# ------------------------------------------------------------------------------------------------ mistakes


def test_errors_of_all_stages_come_at_once_with_their_places(folder):
    said = fails("two.optm.lr=1", "one.optim.lr=x")
    assert 'override one.optim.lr=x  optim.lr  found "x" (text), expected a number' in said
    assert "override two.optm.lr=1  optm  unknown key; did you mean optim (a section)?" in said


def test_an_error_in_set_names_the_line_of_the_recipe(folder):
    text = "stages:\n  one:\n    stage: pretrain.see\n    set:\n      optim.lrr: 1\n      data:\n        times: x\n"
    said = fails(text=text, folder=folder)
    assert "r.yaml:5  optim.lrr  unknown key; did you mean lr" in said
    assert 'r.yaml:7  data.times  found "x" (text), expected a whole number' in said


@pytest.mark.parametrize(
    "stages, says",
    [
        ("a: {stage: align.join, parents: {image: b}}\n  b: {stage: align.join, parents: {image: a}}",
         "r.yaml:2  stages.a  its parents form a circle: a -> b -> a"),
        ("a: {stage: align.join, parents: {image: a}}", "its parents form a circle: a -> a"),
        ("a: {stage: pretrain.se}", "r.yaml:2  stage  pretrain.se does not exist, expected one of"),
        ("a: {stage: os.path}", "'os.path' is no stage, expected a module of pretrain, finetune, align"),
        ("a: {stage: pretrain}", "'pretrain' is no stage"),
        ("a: {stage: align.join.x}", "'align.join.x' is no stage"),
        ("a: {stage: 3}", "r.yaml:2  stages.a.stage  found 3 (whole number), expected text"),
        ("a: {stage: align.rlhf}", "align.rlhf is no stage: it has no Config"),
        ("a: {stag: pretrain.see}", "r.yaml:2  stages.a.stag  unknown key; did you mean stage (text)?"),
        ("a: {stage: align.join, parents: {image: bee}}\n  bees: {stage: pretrain.see}",
         "a.parents.image  'bee' is neither a stage of this recipe nor a folder, expected one of bees"),
        ("a: {stage: align.join}", "parents.image  required, expected the path of an artifact of kind vision-encoder"),
        ("a: {stage: align.join, parents: {image: b, txt: b}}\n  b: {stage: pretrain.see}",
         "r.yaml:2  parents.txt  unknown key; did you mean text"),
        ("a: {stage: align.join, parents: {image: b, text: b}}\n  b: {stage: pretrain.see}",
         "r.yaml:2  a.parents.text  b writes a vision-encoder, expected a text-encoder"),
        ("a b: {stage: pretrain.see}", "stages.a b  expected letters"),
        ("a: {stage: pretrain.see, config: nope.yaml}", "nope.yaml: cannot be read: No such file"),
        ("a: {stage: align.join, config: see.yaml}", "see.yaml:1  stage  found \"pretrain.see\" (text)"),
        ("a: {stage: pretrain.see, set: {out: x}}", "out  is decided by the recipe"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_before_anything_runs(folder, stages, says):
    assert says in fails(text=f"stages:\n  {stages}\n", folder=folder)


@pytest.mark.parametrize(
    "override, says",
    [
        ("tow.optim.lr=1", "override tow.optim.lr=1  tow  no stage of this recipe"),
        ("optim.lr=1", "expected name.section.key=value with a name of both, one, two"),
        ("one=1", "no stage of this recipe, expected name.section.key=value"),
        ("one.name=x", "override one.name=x  name  is decided by the recipe"),
        ("both.parents.image=tow", "'tow' is neither a stage of this recipe nor a folder"),
        ("both.parents.image=null", "parents.image  required"),
    ],
)
def test_a_wrong_override_is_refused(folder, override, says):
    assert says in fails(override)


def test_missing_data_of_any_stage_stops_the_recipe_before_the_first(folder):
    with pytest.raises(InputError, match="stage two, data: nowhere.txt does not exist"):
        run("two.data.path=nowhere.txt")
    assert not ran


def test_a_folder_of_another_kind_is_refused_at_once(folder):
    run()
    ran.clear()
    with pytest.raises(
        InputError, match="parents.image out/both/artifact is a dual-encoder, expected a vision-encoder"
    ):
        recipe.load("r.yaml", ["both.parents.image=out/both/artifact"], "other")


def test_a_file_that_is_neither(folder):
    (folder / "x.yaml").write_text("a: 1")
    with pytest.raises(InputError, match="neither `stages:`"):
        recipe.load("x.yaml")
    with pytest.raises(InputError, match="nope.yaml: no such file"):
        recipe.load("nope.yaml")
    with pytest.raises(InputError, match="is a recipe, expected the config of one stage"):
        recipe.load("r.yaml", module=sys.modules["pretrain.see"])

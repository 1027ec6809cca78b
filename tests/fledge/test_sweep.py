"""Sweeps: what combinations share, what they are called, what happens to the rest when one fails."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fledge import cli, preempt, recipe, sweep
from fledge.errors import InputError, RunError
from tests import launch

SEE = """
stage: pretrain.mae
data: {path: pictures}
augment: {size: 16}
model: {img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}
decoder: {embed_dim: 8, depth: 1, num_heads: 2}
optim: {warmup: 0}
train: {batch: 4, steps: 2, precision: fp32, device: cpu}
track: {wandb: "off"}
"""
# Three stages in a row and one beside them.
RECIPE = """
title: Four
stages:
  a: {stage: pretrain.mae, config: mae.yaml}
  b: {stage: pretrain.mae, config: mae.yaml, parents: {init: a}}
  c: {stage: pretrain.mae, config: mae.yaml, parents: {init: b}}
  d: {stage: pretrain.mae, config: mae.yaml}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    Path("pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (i * 30, 9, 90)).save(f"pictures/{i}.png")
    Path("mae.yaml").write_text(SEE)
    Path("four.yaml").write_text(RECIPE)
    return tmp_path


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "text, values, words",
    [
        ("optim.lr=1e-3,2e-3", (1e-3, 2e-3), ("0.001", "0.002")),
        ("seed=0,1,2", (0, 1, 2), ("0", "1", "2")),
        ("a=[0.9, 0.95],[0.9, 0.99]", ([0.9, 0.95], [0.9, 0.99]), ("0.9-0.95", "0.9-0.99")),
        ('a="1,2",x', ("1,2", "x"), ("1-2", "x")),
        ("a=null,off,true", (None, "off", True), ("null", "off", "true")),
        ("a= ../x , -1, 1e30", ("../x", -1, 1e30), ("..-x", "-1", "1e30")),
    ],
)
def test_values_are_yaml_and_words_name_folders(text, values, words):
    found = sweep.parse(text)
    assert (found.values, found.words) == (values, words)


def test_values_that_read_alike_are_told_apart_in_names():
    words = sweep.parse('a=[1, 2],"1 2",-1,1').words
    assert len(set(words)) == 4 and all(sweep.re.fullmatch("[A-Za-z0-9._-]+", word) for word in words)


@pytest.mark.parametrize(
    "sets, overrides, says",
    [
        (["seed"], [], "expected a key and its values"),
        (["=1"], [], "expected a key and its values"),
        (["seed="], [], "no value"),
        (["seed=1,2,1"], [], "the value 1 stands there twice"),
        (["seed=[1"], [], "not valid YAML"),
        (["seed=1,2", "seed=3"], [], "--set seed: given twice"),
        (["seed=1,2"], ["seed=3"], "--set seed: given twice"),
        (["name=x,y"], [], "leave it out"),
        (["seed=1,2", "train.steps=1,2,3,4,5,6", "optim.lr=" + ",".join(map(str, range(1, 11)))], [],
         "120 combinations, more than 100"),
        (["optim.lrr=1,2"], [], "override optim.lrr=1  optim.lrr  unknown key; did you mean lr"),
        (["seed=1,x"], [], "found \"x\" (text), expected a whole number"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_before_anything_runs(sets, overrides, says, capsys):
    args = [part for text in sets for part in ("--set", text)]
    for command in ("plan", "run"):
        assert cli.main([command, "mae.yaml", *overrides, *args, "--out", "o"]) == 2
        assert says in capsys.readouterr().err and not Path("o").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["four.yaml", "--set", "e.seed=1,2"], "no stage of this recipe"),
        (["four.yaml", "--set", "data=x,y"], "give it once, without --set"),
        (["four.yaml", "--set", "a.seed=1,2", "--only", "a"], "--only runs one stage"),
        (["four.yaml", "--jobs", "2"], "it belongs to --set"),
    ],
)
def test_what_does_not_go_together(argv, says, capsys, monkeypatch):
    monkeypatch.delenv("FLEDGE_DATA", raising=False)
    assert cli.main(["run", *argv]) == 2
    assert says in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what is shared


def folders(*sets: str) -> dict[tuple[str, ...], dict[str, str]]:
    """values -> {stage: its folder below the sweep's}."""
    found = sweep.load("four.yaml", sets, out="o")
    return {
        c.values: {name: str(stage.dir.relative_to("o")) for name, stage in c.stages.items()}
        for c in found.combinations
    }


def test_a_stage_lies_in_the_folder_of_the_settings_that_reach_it():
    assert folders("b.optim.lr=1,2", "d.seed=7") == {
        (lr, "7"): {
            "a": "a",
            "b": f"b.optim.lr-{lr}/b",
            "c": f"b.optim.lr-{lr}/c",
            "d": "d.seed-7/d",
        }
        for lr in ("1", "2")
    }
    assert folders("seed=0,1")[("1",)] == {name: f"seed-1/{name}" for name in "abcd"}


def test_parents_are_those_of_the_combination_and_every_stage_is_there_once():
    found = sweep.load("four.yaml", ["a.seed=1,2", "c.optim.lr=1,2,3"], ["a.train.steps=3"], "o")
    names = [stage.name for stage in found.job.stages]
    assert len(names) == len(set(names)) == 2 + 2 + 6 + 1  # a, b, c, d
    for combination in found.combinations:
        b, c = combination.stages["b"], combination.stages["c"]
        assert c.config.parents.init == str(b.dir / "artifact") and names.index(b.name) < names.index(c.name)
        assert c.config.optim.lr == json.loads(combination.values[1]) and c.config.track.group == "Four"
        assert c.config.track.label == c.name == f"{combination.folder.name}/c"
        assert combination.stages["a"].config.train.steps == 3


def test_a_parent_can_be_swept():
    wired = folders("c.parents.init=a,d,null")
    assert [place["c"] for place in wired.values()] == [f"c.parents.init-{name}/c" for name in ("a", "d", "null")]
    stages = {
        c.values[0]: c.stages["c"] for c in sweep.load("four.yaml", ["c.parents.init=d,null"], out="o").combinations
    }
    assert stages['"d"'].config.parents.init == "o/d/artifact" and stages["null"].config.parents.init is None


def test_of_a_stages_file_every_setting_is_its_own():
    (one, two) = sweep.load("mae.yaml", ["optim.lr=1,2"], out="o").combinations
    assert str(one.stages["mae"].dir) == "o/optim.lr-1/mae" and str(two.stages["mae"].dir) == "o/optim.lr-2/mae"
    assert one.stages["mae"].config.track.group == "mae"


def test_a_long_name_stays_a_name():
    (one,) = sweep.load("mae.yaml", [f"data.path={'p' * 300}"], out="o").combinations
    assert len(one.folder.name) <= sweep.LONGEST


# ------------------------------------------------------------------------------------------------ running


class Finished:
    """A stage that took `polls` looks to end."""

    def __init__(self, code: int, polls: int):
        self.code, self.polls, self.signals = code, polls, []

    def poll(self):
        self.polls -= 1
        return self.code if self.polls < 0 else None

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self):
        return self.code


def scheduled(jobs: int, fails: set[str] = frozenset(), polls=lambda name: 1, reused: set[str] = frozenset()):
    """(order of starts, most at once, failed)."""
    stages = sweep.load("four.yaml", ["b.optim.lr=1,2"], out="o").job.stages
    started, alive, most = [], [], 0
    done = set(reused)

    def start(stage, place):
        nonlocal most
        alive[:] = [process for process in alive if process.polls >= 0]
        process = Finished(1 if stage.name in fails else 0, polls(stage.name))
        alive.append(process)
        most = max(most, len(alive))
        parents = {wire.stage for wire in stage.parents.values() if wire.stage}
        assert parents <= done
        started.append(stage.name)
        return process

    failed = sweep._all(stages, done, jobs, start)
    return started, most, failed


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sweep, "POLL", 0)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_parents_first_and_never_more_than_jobs_at_once(jobs, quick):
    started, most, failed = scheduled(jobs, polls=lambda name: len(name) % 3)
    assert sorted(started) == sorted(["a", "b.optim.lr-1/b", "b.optim.lr-1/c", "b.optim.lr-2/b", "b.optim.lr-2/c", "d"])
    assert most <= jobs and not failed and (most > 1 or jobs == 1)


def test_a_failure_ends_only_what_is_raised_from_it(quick):
    started, _, failed = scheduled(1, fails={"b.optim.lr-1/b"}, reused={"a"})
    assert failed == ["b.optim.lr-1/b"] and sorted(started) == [
        "b.optim.lr-1/b",
        "b.optim.lr-2/b",
        "b.optim.lr-2/c",
        "d",
    ]


@pytest.mark.parametrize("error, number", [(KeyboardInterrupt, signal.SIGINT), (RunError, signal.SIGTERM)])
def test_an_interrupt_is_handed_on_and_waited_for(error, number, monkeypatch):
    stages = sweep.load("four.yaml", ["a.seed=1,2"], out="o").job.stages
    processes = []

    def start(stage, place):
        processes.append(Finished(0, 10**6))
        return processes[-1]

    def stop(seconds):
        raise error

    monkeypatch.setattr(sweep.time, "sleep", stop)
    with pytest.raises(error):
        sweep._all(stages, set(), 2, start)
    assert [process.signals for process in processes] == [[number]] * 2


def test_a_sweep_runs_side_by_side_reuses_and_fails_in_part(capfd, monkeypatch):
    """Two stages: the shared one once, the other one for each of two rates, of which the last explodes."""
    monkeypatch.setenv("PYTHONPATH", str(launch.ROOT))
    Path("two.yaml").write_text(
        "stages:\n  a: {stage: pretrain.mae, config: mae.yaml}\n"
        "  b: {stage: pretrain.mae, config: mae.yaml, parents: {init: a}}\n"
    )
    command = ["two.yaml", "--out", "o", "--set"]
    assert cli.main(["run", *command, "b.optim.lr=1e-3,1e30", "--jobs", "2"]) == 1
    said = capfd.readouterr()
    assert "1 of 3 stages failed: b.optim.lr-1e30/b" in said.err
    rows = [line.split() for line in said.out.splitlines() if line.startswith(("b.optim.lr ", "0.001 ", "1e+30 "))]
    assert rows == [["b.optim.lr", "b"], ["0.001", "finished"], ["1e+30", "failed"]]
    assert "lower optim.lr" in Path("o/logs/sweep/b.optim.lr-1e30_b.log").read_text()
    assert Path("o/b.optim.lr-0.001/report.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in Path("o").glob("**/artifact/manifest.json")}
    assert len(before) == 2
    assert cli.main(["plan", *command, "b.optim.lr=1e-3,2e-3"]) == 0
    table = [line.split() for line in capfd.readouterr().out.splitlines()[2:5]]
    assert [(row[0], "reuse" in row) for row in table] == [
        ("a", True), ("b.optim.lr-0.001/b", True), ("b.optim.lr-0.002/b", False),
    ]  # fmt: skip
    assert cli.main(["run", *command, "b.optim.lr=1e-3"]) == 0
    assert "2 stages, 2 of them finished before" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_sweep_that_is_stopped_leaves_nobody_behind(monkeypatch, capfd):
    monkeypatch.setattr(preempt, "_asked", None)  # and so again afterwards: the signal comes to this process
    monkeypatch.setenv("PYTHONPATH", str(launch.ROOT))

    def stop():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = [path.read_text().count("\n") for path in Path("o").glob("seed-*/mae/metrics.jsonl")]
            if len(found) == 2 and min(found) > 1:
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code = cli.main(["run", "mae.yaml", "--out", "o", "--set", "seed=0,1", "--jobs", "2", "train.steps=1000000"])
    thread.join()
    assert code == 75, capfd.readouterr()
    assert {path.parts[1] for path in Path("o").glob("seed-*/mae/checkpoints/step_*")} == {"seed-0", "seed-1"}
    job = recipe.load("mae.yaml", ["seed=0", "train.steps=1000000"], "o/seed-0")
    assert recipe.decide(job.stages[0].config, {}).action == "resume"


def test_one_of_several_ranks_starts_no_sweep(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without a launcher"):
        sweep.run(sweep.load("mae.yaml", ["seed=0,1"]))

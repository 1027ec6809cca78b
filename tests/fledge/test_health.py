"""What a run does about numbers that are not finite, about a rank that hangs, and about ranks that drift apart."""

import copy
import ctypes
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fledge import checkpoint, distributed, health
from fledge.errors import RunError
from fledge.health import PATIENCE, Watchdog, checksums
from fledge.stream import DataStream
from fledge.track import Run
from fledge.train import TrainConfig, fit
from tests.fledge.test_checkpoint import flip, same
from tests.fledge.test_train import Line, Toy, fitted, line_rows, optimiser, without_times

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


class Odd(Line):
    """Infinite at the steps ``bad``."""

    def __init__(self, bad):
        super().__init__()
        self.bad = set(bad)

    def forward(self, batch, step):
        out = super().forward(batch, step)
        return out | {"small": out["small"] * (float("inf") if step in self.bad else 1)}


def odd(bad=()) -> Odd:
    torch.manual_seed(0)
    return Odd(bad)


def last(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return {f"{group}/{n}": t for group in ("model", "optim") for n, t in found.tensors(group).items()}


def there(path: Path) -> Path:
    """What a save writes beside the steps, once it is there."""
    until = time.monotonic() + 30
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.001)
    return path


def nonfinite(logged: list[dict]) -> dict[int, int]:
    return {r["step"]: r["train/nonfinite"] for r in logged if "train/nonfinite" in r}


def trained(logged: list[dict]) -> list[dict]:
    return without_times([r for r in logged if "train/loss" in r])


# ------------------------------------------------------------------------------------------------------------ policies


@pytest.mark.parametrize("bad", [{0}, {3}, {2, 3, 7}], ids=str)
def test_a_skipped_step_is_a_step_that_was_left_out(tmp_path, bad):
    """Weights, optimiser and curve are bit for bit those of a stream that has nothing for these steps."""
    objective, stream, logged = fitted(tmp_path / "a", 8, objective=odd(bad), on_nonfinite="skip", save_every=3)
    true, _, curve = fitted(tmp_path / "b", 8, objective=odd(), skipped=bad, save_every=3)
    assert objective.steps == true.steps == 8 - len(bad)
    assert same(last(tmp_path / "a/toy"), last(tmp_path / "b/toy"))
    assert trained(logged) == trained(curve)
    assert nonfinite(logged) == {step: i + 1 for i, step in enumerate(sorted(bad))}
    assert stream.observed == [step for step in range(8) if step not in bad]


def test_skipping_ends_after_many_in_a_row_also_when_resumed_between(tmp_path):
    bad = {1, *range(4, 40)}
    words = f"step {4 + PATIENCE - 1}: .*that makes {PATIENCE} such steps in a row"
    with pytest.raises(RunError, match=words):
        fitted(tmp_path / "whole", 40, objective=odd(bad), on_nonfinite="skip")
    fitted(tmp_path / "parts", 8, objective=odd(bad), on_nonfinite="skip")
    with pytest.raises(RunError, match=words):
        fitted(tmp_path / "parts", 40, objective=odd(bad), on_nonfinite="skip")
    few = set(range(4, 4 + PATIENCE - 1))
    _, _, logged = fitted(tmp_path / "few", 20, objective=odd(few), on_nonfinite="skip")
    assert nonfinite(logged)[4 + PATIENCE - 2] == PATIENCE - 1


@pytest.mark.parametrize(
    "bad, left_out", [({4}, {3, 4}), ({3}, {3}), ({4, 7}, {3, 4, 6, 7}), ({5, 6}, {3, 4, 5, 6})], ids=str
)
@pytest.mark.parametrize("workers", [0, 2])
def test_rolling_back_leaves_out_all_that_led_there(tmp_path, bad, left_out, workers):
    more = {"on_nonfinite": "roll_back", "save_every": 3, "workers": workers}
    objective, stream, logged = fitted(tmp_path / "a", 9, objective=odd(bad), **more)
    true, _, curve = fitted(tmp_path / "b", 9, objective=odd(), skipped=left_out, save_every=3)
    assert same(last(tmp_path / "a/toy"), last(tmp_path / "b/toy"))
    assert trained(logged) == trained(curve)
    assert [r["step"] for r in logged] == list(range(9)) and set(nonfinite(logged)) == left_out


def test_rolling_back_once_for_each_checkpoint(tmp_path):
    """4 and 5 both lead back to the checkpoint of step 3, and the first time did not help."""
    with pytest.raises(RunError, match="step 5: .*had gone back to step 3 once already"):
        fitted(tmp_path / "a", 9, objective=odd({4, 5}), on_nonfinite="roll_back", save_every=3)
    assert checkpoint.newest(tmp_path / "a/toy/checkpoints").step == 3
    with pytest.raises(RunError, match="step 1: .*no checkpoint yet"):
        fitted(tmp_path / "b", 9, objective=odd({1}), on_nonfinite="roll_back", save_every=3)


def test_a_run_that_dies_inside_of_what_it_leaves_out_goes_on_leaving_it_out(tmp_path):
    """The checkpoint of step 4 is broken when it is needed: back to 2, and 4 is saved again among what is left out."""
    more = {"on_nonfinite": "roll_back", "save_every": 2, "eval_every": 1, "steps": 8}
    folder = tmp_path / "a"
    seen = []

    def evaluate(step):
        seen.append(step)
        if seen.count(4) == 1 and step == 4:
            flip(there(folder / "toy/checkpoints/step_00000004/model.safetensors"))
        if seen.count(4) == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.warns(RuntimeWarning, match="step_00000004 is broken"), pytest.raises(KeyboardInterrupt):
        fitted(folder, objective=odd({5}), evaluate=evaluate, **more)
    assert seen == [0, 1, 2, 3, 4, 2, 3, 4]
    assert checkpoint.newest(folder / "toy/checkpoints").state["nonfinite"]["left_out"] == [2, 6]
    fitted(folder, objective=odd({5}), **more)
    fitted(tmp_path / "b", objective=odd(), skipped={2, 3, 4, 5}, steps=8, save_every=2)
    assert same(last(folder / "toy"), last(tmp_path / "b/toy"))


HOLE = 12
"""The sample that is not a number: in steps 2 and 8 on rank 1, in step 5 on rank 0."""


def rows_with_a_hole(ids, seeds):
    rows = line_rows(ids, seeds)
    rows["x"][torch.tensor(ids) == HOLE] = float("nan")
    return rows


def fit_on_rank(policy: str, rows=rows_with_a_hole, objective=None, steps: int = 9, **more) -> torch.nn.Module:
    """`fitted`, on every rank of a job."""
    distributed.setup("cpu")
    config = TrainConfig(batch=4, steps=steps, precision="fp32", on_nonfinite=policy, save_every=2, **more)
    torch.manual_seed(0)
    objective = objective or Line()
    stream = DataStream(13, rows, batch=4, seed=1)
    with Run.open(Toy(out="runs")) as run:
        fit(objective, stream, optimiser(objective, 0.05), config, run, steps=steps, seed=2)
    return objective


def a_hole_on_one_rank(policy: str) -> None:
    """What each rank ends with: the error or the weights."""
    try:
        objective = fit_on_rank(policy)
        told = {"steps": objective.steps.item(), "sums": checksums(checkpoint.module_tensors(objective))}
    except RunError as error:
        told = {"error": str(error)}
    Path(f"{distributed.rank()}.json").write_text(json.dumps(told))


@forking
@pytest.mark.parametrize("policy", ["stop", "skip", "roll_back"])
def test_a_nan_on_one_rank_is_met_by_all_in_the_same_step(forks, tmp_path, policy):
    stream = DataStream(13, line_rows, batch=4, seed=1)
    bad = {step: stream.ids(step).index(HOLE) // 2 for step in range(9) if HOLE in stream.ids(step)}
    assert bad == {2: 1, 5: 0, 8: 1}
    forks.start("tests.fledge.test_health:a_hole_on_one_rank", {"policy": policy}, world=2, folder=tmp_path).wait()
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    if policy == "stop":
        assert told[0]["error"].startswith("toy: step 2: square is nan. Nothing was updated")
        assert checkpoint.newest(tmp_path / "runs/toy/checkpoints").step == 2
    else:
        left_out = {"skip": {2, 5, 8}, "roll_back": {2, 4, 5, 8}}[policy]
        assert told[0]["steps"] == 9 - len(left_out)


# ------------------------------------------------------------------------------------------------------------ watchdog


def hang(how: str) -> None:
    """Rank 1 stops in its third step."""

    def rows(ids, seeds):
        rows.calls += 1
        if rows.calls == 3 and distributed.rank() == 1:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        return line_rows(ids, seeds)

    rows.calls = 0
    fit_on_rank("stop", rows, watchdog=1.5)


@forking
@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_a_rank_that_hangs_is_ended_with_its_stacks(forks, tmp_path, how):
    job = forks.start("tests.fledge.test_health:hang", {"how": how}, world=2, folder=tmp_path)
    until = time.monotonic() + 60
    while not job.poll() and job.codes[0] is None and time.monotonic() < until:
        time.sleep(0.02)
    assert job.codes[0] == 1, job.output()
    if how == "asleep":
        job.wait(30, check=False)
        assert job.codes[1] == 1
    job.end()
    logs = tmp_path / "runs/toy/logs"
    kept = {path.name: path.read_text() for path in logs.iterdir()}
    assert set(kept) == {"stacks_rank0.txt"} | ({"stacks_rank1.txt"} if how == "asleep" else set())
    for rank, text in enumerate(kept[name] for name in sorted(kept)):
        assert text.startswith(f"fledge (rank {rank}): step 2 has not ended within train.watchdog (1.5 s)")
        assert " in fit\n" in text and "most recent call first" in text
        assert (" in all_reduce" if rank == 0 else " in rows\n") in text
        said = (tmp_path / f"rank{rank}.log").read_text()
        assert "Stacks of all threads are in" in said and " in fit\n" in said
    assert checkpoint.newest(tmp_path / "runs/toy/checkpoints").step == 2


def hold_the_lock(folder: str) -> None:
    """No Python thread can run, so that no Python watchdog can bark."""
    health.GRACE = 0.5
    with Watchdog(0.5, Path(folder)):
        ctypes.PyDLL(None).sleep(60)


@forking
def test_a_library_that_holds_the_interpreters_lock_is_ended_too(forks, tmp_path):
    job = forks.start("tests.fledge.test_health:hold_the_lock", {"folder": str(tmp_path)}, folder=tmp_path)
    job.wait(timeout=30, check=False)
    assert job.codes == [1] and "hold_the_lock" in job.output()


def test_the_watchdog_is_quiet_while_it_is_fed_and_after(tmp_path, monkeypatch):
    barks: list[str] = []
    monkeypatch.setattr(Watchdog, "_bark", lambda self: barks.append(self.what))
    with Watchdog(0.6, tmp_path) as watchdog:
        for step in range(8):
            watchdog.beat(f"step {step}")
            time.sleep(0.1)
    time.sleep(0.8)
    with Watchdog(None, tmp_path) as watchdog:
        watchdog.beat("nothing")
    assert barks == [] and list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- drift


def test_a_checksum_shows_every_bit():
    g = torch.Generator().manual_seed(0)
    tensors = {
        "float32": torch.randn(3, 4, generator=g).T,
        "bfloat16": torch.randn(5, generator=g).bfloat16(),
        "float64": torch.randn(2, generator=g, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor(2**62),
        "nan": torch.tensor(float("nan")),
        "empty": torch.empty(0),
    }
    before = checksums(tensors)
    assert checksums(copy.deepcopy(tensors)) == before and checksums({}) == {}
    for name, tensor in tensors.items():
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        for at in range(len(flat)):
            for bit in range(8 if name != "bool" else 1):
                changed = flat.clone()
                changed[at] ^= 1 << bit
                other = changed.view(tensor.dtype).view(tensor.shape)
                assert checksums({name: other})[name] != before[name], (name, at, bit)


class Drifting(Line):
    def after_step(self, step, means):
        super().after_step(step, means)
        if step == 4 and distributed.rank() == 1:
            self.layer.weight.data[0, 1] = torch.nextafter(self.layer.weight.data[0, 1], torch.tensor(9.0))


def drift(every: int) -> None:
    torch.manual_seed(0)  # from some weights the next updates round the bit away
    with pytest.raises(RunError) as error:
        fit_on_rank("stop", line_rows, Drifting(), drift_every=every)
    Path(f"{distributed.rank()}.txt").write_text(str(error.value))


@forking
def test_ranks_that_drift_apart_are_found(forks, tmp_path):
    """By one bit of one weight of one rank."""
    forks.start("tests.fledge.test_health:drift", {"every": 3}, world=2, folder=tmp_path).wait()
    told = {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)}
    assert len(told) == 1
    assert "after step 5 the ranks' parameters are not the same any more: layer.weight of rank 1 differs" in told.pop()
    assert checkpoint.newest(tmp_path / "runs/toy/checkpoints").step == 4


def test_looking_for_drift_changes_nothing_on_one_process(tmp_path):
    _, _, with_it = fitted(tmp_path / "a", drift_every=1, watchdog=60.0)
    _, _, without = fitted(tmp_path / "b")
    assert without_times(with_it) == without_times(without)

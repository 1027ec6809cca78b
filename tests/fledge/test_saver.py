"""Saving beside the loop: what is saved is what was there when it was asked for, and errors come in time, on all ranks.

What a save writes, and what faults and kills leave of it, is in test_checkpoint.py and test_faults.py.
"""

import atexit
import json
import os
import random
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch

from fledge import checkpoint, distributed, files
from fledge.checkpoint import newest
from fledge.errors import RunError
from fledge.saver import Saver
from fledge.track import Run
from tests.fledge.test_checkpoint import bits, same, save_small
from tests.fledge.test_faults import curve
from tests.fledge.test_health import fit_on_rank, last, there
from tests.fledge.test_train import fitted, line_rows, selected

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Until it is set, no save writes anything."""
    opened = threading.Event()
    plain = checkpoint.save_file

    def waiting(*args):
        assert opened.wait(30)
        plain(*args)

    monkeypatch.setattr(checkpoint, "save_file", waiting)
    return opened


def test_later_changes_are_not_saved(tmp_path, gate):
    """Of tensors of the CPU too, of views, and of the copies' memory, which is used again."""
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "row": base[1], "turned": base.T, "one": torch.tensor(7), "none": torch.empty(0, 3)}
    with Saver(tmp_path) as saver:
        for step in (1, 2, 3):
            base += step
            true = {name: bits(tensor) for name, tensor in tensors.items()}
            saver.save(step, {"all": tensors}, {"step": step}, keep=1)
            base.neg_()
            tensors["one"].zero_()
            gate.set()
            saver.wait()
            gate.clear()
            assert {name: bits(tensor) for name, tensor in newest(tmp_path).tensors("all").items()} == true
            base.neg_()
            tensors["one"].fill_(7 + step)


def test_a_save_draws_no_random_number(tmp_path):
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    save_small(tmp_path, 1)
    save_small(tmp_path, 2, keep=1)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == numpy.random.get_state()[1].tolist()


def test_one_save_at_a_time(tmp_path, gate):
    with Saver(tmp_path) as saver:
        saver.save(1, {"all": {"x": torch.ones(1)}}, {}, keep=2)
        second = threading.Thread(target=saver.save, args=(2, {"all": {"x": torch.zeros(1)}}, {}, 2))
        second.start()
        second.join(0.2)
        assert second.is_alive() and not list(tmp_path.glob("step_*"))
        gate.set()
        second.join(30)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000001", "step_00000002"]
    assert newest(tmp_path).tensors("all")["x"].item() == 0


def test_what_is_published_is_there_before_anything_is_pruned(tmp_path):
    seen = []
    with Saver(tmp_path) as saver:
        for step in (1, 2, 3):
            look = lambda: seen.append(sorted(int(p.name[5:]) for p in tmp_path.glob("step_*")))  # noqa: E731
            saver.save(step, {}, {}, keep=1, spare={2}, published=look)
    assert seen == [[1], [1, 2], [2, 3]]


def test_a_failed_save_is_told_once_and_the_next_one_works(tmp_path, monkeypatch):
    with Saver(tmp_path) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            saver.save(1, {"all": {"x": torch.ones(1)}}, {}, keep=1)
            until = time.monotonic() + 30
            while not saver.failed and time.monotonic() < until:
                time.sleep(0.001)
            with pytest.raises(RunError, match="step 1 could not be written .*No space left"):
                saver.wait()
        assert not saver.failed
        saver.save(2, {"all": {"x": torch.ones(1)}}, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_another_error_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with (
        pytest.raises(KeyError, match="of the loop"),
        pytest.warns(RuntimeWarning, match="a save has failed: .*step 1"),
        Saver(tmp_path) as saver,
    ):
        saver.save(1, {"all": {"x": torch.ones(1)}}, {}, keep=1)
        raise KeyError("of the loop")


def test_saves_that_are_slower_than_steps_change_nothing(tmp_path, monkeypatch):
    """The same curve and bits, with dropout."""
    fitted(tmp_path / "a", 9, save_every=1, keep=3)
    plain = files.sha256

    def slow(path: Path) -> str:
        time.sleep(0.02)
        return plain(path)

    monkeypatch.setattr(files, "sha256", slow)
    _, _, logged = fitted(tmp_path / "b", 9, save_every=1, keep=3)
    assert curve(tmp_path / "a/toy") == curve(tmp_path / "b/toy")
    names = [sorted(path.name for path in (tmp_path / f"{one}/toy/checkpoints").iterdir()) for one in "ab"]
    assert names[0] == names[1] == [f"step_{step:08d}" for step in (7, 8, 9)]
    assert same(last(tmp_path / "a/toy"), last(tmp_path / "b/toy"))
    assert [r["step"] for r in logged if "time/save" in r] == list(range(1, 9))
    assert all(r["time/save"] > 0.02 for r in logged if r["step"] > 1)  # it waited for the one before


def test_the_best_is_named_when_it_is_there(tmp_path, gate, monkeypatch):
    """best.json never names a checkpoint that is not whole."""
    named = []
    plain = Run.note_best

    def note(run, best):
        if best is not None:
            named.append((best["step"], (run.dir / f"checkpoints/step_{best['step']:08d}/manifest.json").exists()))
        plain(run, best)

    monkeypatch.setattr(Run, "note_best", note)
    gate.set()
    selected(tmp_path)
    assert named and all(whole for _, whole in named) and named[-1][0] == 4


def failing_on_rank_0(at: int) -> None:
    """The second save fails on rank 0; every rank ends with the same words, in the step after it."""
    plain, written = checkpoint.save_file, []

    def full(*args):
        if len(written) >= at:
            raise OSError(28, "No space left on device")
        written.append(plain(*args))

    checkpoint.save_file = full
    seen = []

    def rows(ids, seeds):
        seen.append(1)
        time.sleep(0.05)  # a step is slower than a save
        return line_rows(ids, seeds)

    try:
        fit_on_rank("stop", rows, steps=40)
        told = ""
    except RunError as error:
        told = str(error)
    Path(f"{distributed.rank()}.json").write_text(json.dumps([told, len(seen)]))


def ended_by_an_error() -> None:
    """Says at the very end which threads are left; what is registered first is called last."""
    tasks = Path("/proc/self/task")
    atexit.register(lambda: print("left:", *(thread.joinpath("comm").read_text() for thread in tasks.iterdir())))
    failing_on_rank_0(3)


@forking
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system has no /proc")
def test_no_thread_of_the_group_outlives_an_error(forks, tmp_path):
    """One that finds the interpreter gone aborts the process, now and then, and its exit code is lost."""
    job = forks.start("tests.fledge.test_saver:ended_by_an_error", {}, world=2, folder=tmp_path).wait()
    assert job.output().count("left: ") == 2 and "gloo" not in job.output()


@forking
def test_an_error_of_the_thread_reaches_every_rank_by_the_next_step(forks, tmp_path):
    forks.start("tests.fledge.test_saver:failing_on_rank_0", {"at": 3}, world=2, folder=tmp_path).wait()
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    words, steps = told[0]
    assert (
        words.startswith("checkpoint of step 4 could not be written to runs/toy/checkpoints: ") and "No space" in words
    )
    assert steps in (5, 6)
    assert newest(there(tmp_path / "runs/toy/checkpoints")).step == 2

"""Disks that fill up, fail or cannot be written, and processes that die inside a save: what was whole stays whole.

Faults of single files are in test_checkpoint.py and test_artifact.py, kills at random moments in test_resume.py.
"""

import contextlib
import errno
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fledge import artifact, checkpoint, files
from fledge.errors import InputError, RunError
from fledge.track import Run
from tests.fledge import test_artifact
from tests.fledge.test_checkpoint import flip, same, save, save_small, small
from tests.fledge.test_health import last, there
from tests.fledge.test_train import Toy, fitted, without_times

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
CALLS = [
    (os, "open"), (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (Path, "mkdir"), (Path, "open"),
    (checkpoint, "save_file"), (files, "write_text"),
]  # fmt: skip
"""What a save asks of the system."""


# ------------------------------------------------------------------------------------------------------ faults of files

FAULTS = {"flip": flip, "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]), "remove": Path.unlink}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happens to: 6 steps, checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    fitted(folder, 6, save_every=2)
    return folder / "toy"


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_from_the_checkpoint_before_a_broken_one(tmp_path, whole, fault):
    """For each file of the newest checkpoint: it is named, and the run ends in the same bits."""
    names = sorted(path.name for path in (whole / "checkpoints/step_00000006").iterdir())
    assert names == ["manifest.json", "model.safetensors", "optim.safetensors", "state.json", "stream.safetensors"]
    for name in names:
        folder = tmp_path / name
        shutil.copytree(whole.parent, folder)
        FAULTS[fault](folder / "toy/checkpoints/step_00000006" / name)
        with pytest.warns(RuntimeWarning, match=f"step_00000006 is broken: .*{name}"):
            fitted(folder, 6, save_every=2)
        assert same(last(folder / "toy"), last(whole))
        assert curve(folder / "toy") == curve(whole)


def curve(run: Path) -> list[dict]:
    from fledge.track import read_metrics

    return without_times(read_metrics(run / "metrics.jsonl"))


@pytest.mark.parametrize("fault", FAULTS)
def test_an_artifact_of_which_any_file_is_broken_is_refused(tmp_path, fault):
    made = test_artifact.make(tmp_path / "a")
    names = [*made.manifest["files"], files.MANIFEST]
    assert sorted(path.name for path in made.path.iterdir()) == sorted(names)
    for name in names:
        copy = tmp_path / name / "a"
        shutil.copytree(made.path, copy)
        FAULTS[fault](copy / name)
        with pytest.raises(InputError, match=name):
            artifact.open(copy)


# -------------------------------------------------------------------------------------------------------------- disks


def calls_that(act, when, monkeypatch, calls=CALLS) -> list[str]:
    """Do ``act(name)`` before each of the calls for which ``when(number)``; the names of the calls so far."""
    made: list[str] = []

    def watched(name, function):
        def call(*args, **kwargs):
            made.append(name)
            if when(len(made)):
                act(name)
            return function(*args, **kwargs)

        return call

    for place, name in calls:
        monkeypatch.setattr(place, name, watched(name, getattr(place, name)))
    return made


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_an_error_of_any_call_of_a_save(tmp_path, number, lasting):
    """Folder and cause are named, what was whole is whole, and the same save succeeds when the fault is gone."""
    cause = os.strerror(number)

    def fail(name):
        raise OSError(number, cause)

    refused = 0
    for at in range(1, 200):
        root = tmp_path / str(at)
        save_small(root, 1, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            made = calls_that(fail, lambda n, at=at: n >= at if lasting else n == at, patch)
            try:
                save_small(root, 2, keep=1)
            except RunError as error:
                refused += 1
                words = f"checkpoint of step 2 could not be written to {root}: [Errno {number}] {cause}"
                assert str(error).startswith(words) and "start the run again" in str(error)
        if len(made) < at:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = checkpoint.newest(root)
            assert found is not None and same(found.tensors("model"), small(found.step)["model"])
            save_small(root, 2, keep=1)
        assert checkpoint.newest(root).step == 2
        assert [path.name for path in root.iterdir()] == ["step_00000002"]
    assert 15 < refused < at < 199


@contextlib.contextmanager
def little_disk(folder: Path, size: str = "512k") -> Iterator[Path]:
    """A file system of its own of so many bytes, where that can be had."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mountable() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None


needs_root = pytest.mark.skipif(not mountable(), reason="mounting a little disk needs root")


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"0" * 4096):
            pass
    return ballast


@needs_root
def test_a_disk_that_fills_up_while_training(tmp_path, whole):
    """The run ends with one clear error; with room again, the same run goes on and ends in the same bits."""
    with little_disk(tmp_path / "disk") as disk:

        def evaluate(step):
            if step == 4:
                there(disk / "toy/checkpoints/step_00000004")
                fill(disk)
            return {}

        with pytest.raises(RunError, match=rf"step \d .*could not be written to {disk}/toy.*No space left on device"):
            fitted(disk, 6, save_every=2, evaluate=evaluate, eval_every=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoint.newest(disk / "toy/checkpoints").step == 4
        (disk / "ballast").unlink()
        fitted(disk, 6, save_every=2)
        assert same(last(disk / "toy"), last(whole))
        assert curve(disk / "toy")[-2:] == curve(whole)[-2:]


@needs_root
def test_a_disk_too_small_for_the_tensors(tmp_path):
    """The error comes from safetensors, out of the middle of a write."""
    with little_disk(tmp_path / "disk") as disk:
        save_small(disk, 1)
        with pytest.raises(RunError, match=f"step 2 could not be written to {disk}: .*No space left"):
            save(disk, 2, {"model": {"weight": torch.ones(500_000)}}, {}, keep=1)
        assert [path.name for path in disk.iterdir()] == ["step_00000001"]
        assert checkpoint.newest(disk).step == 1


@needs_root
def test_a_disk_that_becomes_read_only(tmp_path):
    with little_disk(tmp_path / "disk") as disk:
        save_small(disk, 1)
        flip(save_small(disk, 2) / "state.json")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RunError, match=f"step 3 could not be written to {disk}: .*Read-only file system"):
            save_small(disk, 3)
        with pytest.raises(RunError, match=f"checkpoints in {disk} cannot be read or set aside: .*Read-only"):
            checkpoint.newest(disk)
        with pytest.raises(RunError, match=f"artifact {disk}/a could not be written: .*Read-only"):
            test_artifact.make(disk / "a")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        with pytest.warns(RuntimeWarning, match="step_00000002 is broken"):
            assert checkpoint.newest(disk).step == 1


@pytest.mark.skipif(mountable() or os.name != "posix", reason="root may write everywhere")
def test_a_folder_without_write_access(tmp_path):
    root = tmp_path / "checkpoints"
    save_small(root, 1)
    root.chmod(0o555)
    with pytest.raises(RunError, match=f"step 2 could not be written to {root}: .*Permission denied"):
        save_small(root, 2)
    assert checkpoint.newest(root).step == 1
    root.chmod(0o755)


def test_a_failed_save_harms_neither_the_run_nor_the_older_checkpoint(tmp_path, whole, monkeypatch):
    def full(name):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        plain, written = checkpoint.save_file, []
        patch.setattr(
            checkpoint, "save_file", lambda *args: full("") if len(written) == 3 else written.append(plain(*args))
        )
        with pytest.raises(RunError, match="step 4 could not be written .*No space left"):
            fitted(tmp_path, 6, save_every=2)
    fitted(tmp_path, 6, save_every=2)
    assert same(last(tmp_path / "toy"), last(whole)) and curve(tmp_path / "toy") == curve(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_metrics_that_cannot_be_written(tmp_path):
    """The error that is told is the first one, not what closing the run adds."""
    with (
        pytest.raises(RunError, match=f"numbers of step 3 could not be written to {tmp_path}/toy: .*No space left"),
        Run.open(Toy(out=str(tmp_path))) as run,
    ):
        run._close_metrics()
        run._file = open("/dev/full", "a")  # noqa: SIM115
        run.log(3, {"train/loss": 1.0})


def test_an_artifact_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    """At whichever call that writes it fails: the older one is there, or, after the last rename, the new one."""
    steps = []
    for at in range(1, 40):
        folder = tmp_path / str(at)
        test_artifact.make(folder / "a", step=1)

        def fail(name):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            writing = [(os, "fsync"), (os, "rename"), (Path, "mkdir"), (files, "write_text")]
            calls = calls_that(fail, lambda n, at=at: n == at, patch, writing)
            try:
                test_artifact.make(folder / "a", step=2)
            except RunError as error:
                assert f"artifact {folder / 'a'} could not be written: [Errno 5]" in str(error)
        steps.append(artifact.open(folder / "a").step)
        if len(calls) < at:
            break
    assert steps == sorted(steps) and steps.count(1) > 8 and steps[-1] == 2


# --------------------------------------------------------------------------------------------------------------- death


def tear(path: Path) -> None:
    """Half of what was written."""
    os.truncate(path, path.stat().st_size // 2)


def die_at(at: int, when: str) -> None:
    """End this process, as SIGKILL would, before, after or (of a write) in the middle of its ``at``-th call."""
    count = 0

    def dying(name, function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            mine = count == at
            if mine and when == "before":
                os._exit(9)
            result = function(*args, **kwargs)
            if mine and when == "torn" and name in ("save_file", "write_text"):
                tear(args[1] if name == "save_file" else args[0])
            if mine and when != "before":
                os._exit(9)
            return result

        return call

    for place, name in CALLS:
        setattr(place, name, dying(name, getattr(place, name)))


def die_everywhere(root: str, keep: int = 1) -> None:
    """A child for each call of a save: it dies there. At every such moment some checkpoint is whole."""
    seen, deaths = set(), 0
    for when in ("before", "after", "torn"):
        for at in range(1, 200):
            folder = Path(root) / f"{when}-{at}"
            for step in range(1, keep + 1):
                save_small(folder, step, keep=keep)
            child = os.fork()
            if child == 0:
                die_at(at, when)
                save_small(folder, keep + 1, keep=keep)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a death breaks nothing, so there is nothing to warn of
                found = checkpoint.newest(folder)
            assert found is not None and found.step >= keep, (when, at)
            assert found.state == {"seen": found.step}
            assert same(found.tensors("model"), small(found.step)["model"])
            assert not list(folder.glob(".*"))
            save_small(folder, keep + 2, keep=keep)
            assert checkpoint.newest(folder).step == keep + 2
            shutil.rmtree(folder)
            if code == 0:
                break
            assert code == 9
            seen.add(found.step)
            deaths += 1
        assert at > 20
    assert seen == {keep, keep + 1} and deaths > 60


@forking
def test_death_at_every_call_of_a_save(forks, tmp_path):
    """With one checkpoint kept, so that the old one goes as soon as the new one stands."""
    args = {"root": str(tmp_path / "root")}
    forks.start("tests.fledge.test_faults:die_everywhere", args, folder=tmp_path).wait()

"""wandb is told the same, each step once over all attempts, and never stands in the way.

There is no server here: numbers are read from wandb's own offline files, and what goes to a server alone (artifacts) is
told to a stand-in.
"""

import os
import struct
import subprocess
import sys
import textwrap
import zlib
from collections import Counter
from pathlib import Path

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from fledge import artifact
from fledge.config import StageConfig
from fledge.errors import InputError
from fledge.records import read_metrics
from fledge.track import Run, TrackConfig
from fledge.wandb_sink import Wandb, wandb_mode

CANARY = "0123456789abcdef0123456789abcdefcafe5eed"


class Toy(StageConfig):
    stage: str = "pretrain.toy"
    track: TrackConfig = TrackConfig(wandb="off")


def open_run(folder: Path, **track) -> Run:
    return Run.open(Toy(out=str(folder), track=TrackConfig(**{"wandb": "off", **track})), {})


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """An account without any key."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_mode_follows_the_key(nobody, monkeypatch):
    assert wandb_mode("auto") == "offline" and wandb_mode("off") == "off"
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        wandb_mode("online")
    (nobody / ".netrc").write_text("machine example.org login user password x\n")
    assert wandb_mode("auto") == "offline"
    (nobody / ".netrc").write_text(f"machine api.wandb.ai login user password {CANARY}\n")
    assert wandb_mode("auto") == "online" and wandb_mode("offline") == "offline"
    (nobody / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "off"


# ------------------------------------------------------------------------------------------------ numbers


class FakeRun:
    """Takes the place of wandb's run, and fails when it is told to."""

    def __init__(self, resumed=False, starting_step=0):
        self.told, self.broken, self.summary = [], False, {}
        self.resumed, self.starting_step = resumed, starting_step

    def log(self, values, step):
        if self.broken:
            raise ConnectionError("gone")
        self.told.append((step, values))

    def finish(self, exit_code):
        self.told.append("finished")

    @property
    def steps(self):
        return [step for step, _ in self.told]


@pytest.fixture
def attempted(tmp_path, monkeypatch):
    """attempted(mode, fake) -> Run: an attempt at one run, told to `fake`; None: wandb cannot be started."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    count = 0

    def attempted(mode, fake):
        def init(self, config):
            nonlocal count
            if fake is None:
                raise ConnectionError("gone")
            if self.mode == "offline":
                count += 1
                (self.folder / f"wandb/offline-run-{count}-{self.id}").mkdir(parents=True)
            return fake

        monkeypatch.setattr(Wandb, "_init", init)
        return open_run(tmp_path, wandb=mode)

    return attempted


def steps(run: Run, first: int, last: int) -> None:
    for step in range(first, last):
        run.log(step, {"x": float(step)})


def test_offline_a_resumed_run_is_told_anew_and_its_earlier_folder_set_aside(attempted):
    steps(attempted("offline", FakeRun()), 0, 6)  # killed: never closed
    run = attempted("offline", again := FakeRun())
    run.truncate(4)
    run.samples("s", [{"x": 1}])
    steps(run, 4, 8)
    run.log(7, {"eval/y": 1.0})  # a second line of one step is told too
    assert again.steps == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7] and again.told[1] == (1, {"x": 1.0})
    assert sorted(p.name[:-13] for p in (run.dir / "wandb").iterdir()) == ["offline-run-2", "superseded-offline-run-1"]
    run.truncate(6)  # rolled back: told is told
    assert again.steps[-1] == 7


def test_offline_what_has_been_synced_is_not_told_again(attempted):
    run = attempted("offline", FakeRun())
    steps(run, 0, 6)
    (folder,) = (run.dir / "wandb").iterdir()
    (folder / f"run-{run._wandb.id}.wandb.synced").touch()
    for _ in range(2):  # the second of these was never synced
        run = attempted("offline", again := FakeRun())
        run.truncate(4)
        run.samples("s", [{"x": 1}])
        steps(run, 4, 8)
        assert again.steps == [6, 6, 7]
    names = sorted(p.name[:-13] for p in (run.dir / "wandb").iterdir())
    assert names == ["offline-run-1", "offline-run-3", "superseded-offline-run-2"]


@pytest.mark.parametrize(
    "there, told", [((True, 3), [3, 4, 5, 6]), ((False, 0), [0, 1, 2, 3, 4, 5, 6]), ((True, 6), [6])]
)
@pytest.mark.parametrize("before", ["online", "offline"])
def test_online_the_server_says_how_far_it_is(attempted, before, there, told):
    first = attempted(before, FakeRun())
    steps(first, 0, 6)
    run = attempted("online", again := FakeRun(*there))
    run.truncate(4)
    steps(run, 4, 7)
    assert again.steps == told and run._wandb.id == first._wandb.id
    assert not list(run.dir.glob("wandb/offline-*"))
    run = attempted("offline", last := FakeRun())  # and what it has been told stands
    run.truncate(7)
    steps(run, 7, 9)
    assert last.steps == [7, 8]


def test_numbers_that_are_not_finite_are_told_again_as_such(attempted):
    run = attempted("offline", FakeRun())
    run.log(0, {"a": float("nan"), "b": float("-inf"), "c": 1})
    run = attempted("offline", again := FakeRun())
    run.truncate(1)
    ((step, values),) = again.told
    assert step == 0 and repr(values) == "{'a': nan, 'b': -inf, 'c': 1.0}"


def test_where_wandb_cannot_be_started_what_was_told_stays(attempted, capsys):
    run = attempted("offline", FakeRun())
    steps(run, 0, 3)
    run = attempted("online", None)
    run.truncate(2)
    steps(run, 2, 5)
    assert [p.name[:13] for p in (run.dir / "wandb").iterdir()] == ["offline-run-1"]
    assert capsys.readouterr().out.count("could not start") == 2


def test_a_failing_wandb_costs_a_sentence_and_nothing_else(attempted, capsys):
    fake = FakeRun()
    fake.broken = True
    run = attempted("online", fake)
    run.log(0, {"x": 0.0})
    run.log(1, {"x": 1.0})
    run.close()
    assert [r["step"] for r in read_metrics(run.dir / "metrics.jsonl")] == [0, 1]
    said = capsys.readouterr().out
    assert said.count("wandb") == 1 and "ConnectionError: gone" in said


# ------------------------------------------------------------------------------------------------ offline


def records(path: Path) -> list[Record]:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB, each piece with crc, length and type) behind a
    head of seven bytes, holding one protobuf message a record. What a kill tore off at the end is left out."""
    data, at, parts, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        crc, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        if kind == 0 or len(piece) < length:
            break
        assert crc == zlib.crc32(bytes([kind]) + piece) or crc, "a damaged record"
        parts += piece
        if kind in (1, 4):  # the whole, or the last of its pieces
            found.append(Record.FromString(parts))
            parts = b""
        at += 7 + length
    return found


def told(folder: Path) -> Counter[tuple[int, str]]:
    """How often each key was told for each step, over all attempts of a run."""
    count: Counter[tuple[int, str]] = Counter()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                count.update((int(items["_step"]), key) for key in items)
    return count


def attempt(folder: Path, body: str) -> subprocess.CompletedProcess:
    """One process that opens the run with wandb offline and a key in its environment and arguments, and does `body`."""
    script = f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parents[2]), str(Path(__file__).parent)]!r}
        from PIL import Image
        import test_wandb_sink as t
        run = t.open_run({str(folder)!r}, wandb="offline", tags=["a"], group="g")
        assert run._wandb.run is not None
        def steps(first, last):
            for step in range(first, last):
                run.log(step, {{"train/loss": 1.0 / (step + 1), "odd": float("nan")}})
        def media():
            run.picture("p", Image.new("RGB", (4, 4)), "caption")
            run.samples("s", [{{"prompt": "x", "score": 1.0}}])
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    """
    code = textwrap.dedent(script) + body
    environ = {**os.environ, "WANDB_API_KEY": CANARY, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "--token", CANARY]
    return subprocess.run(command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def test_offline_every_step_is_there_once_over_all_attempts_and_no_secret(nobody):
    """Killed twice, resumed from an earlier step each time, once rolled back; pictures in between."""
    killed = [
        attempt(nobody / "runs", "steps(0, 9); media(); steps(9, 12); kill()"),
        attempt(nobody / "runs", "run.truncate(8); steps(8, 10); media(); steps(10, 20); kill()"),
    ]
    assert [done.returncode for done in killed] == [-9, -9], [done.stderr for done in killed]
    last = attempt(
        nobody / "runs",
        "run.truncate(16); steps(16, 24); run.truncate(22); steps(22, 30); media(); run.close('finished')",
    )
    assert last.returncode == 0, last.stderr

    count = told(nobody / "runs/toy")
    assert set(count.values()) == {1}  # also those where the roll-back went over them again
    assert {step for step, key in count if key == "train/loss"} == set(range(30))
    keys = {key for _, key in count}
    assert "odd" in keys and {"media/p/path", "media/s/path"} <= keys
    assert [r["step"] for r in read_metrics(nobody / "runs/toy/metrics.jsonl")] == list(range(30))

    files = [path for path in (nobody / "runs").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".wandb"]) == 3
    ids = {record.run.run_id for path in files if path.suffix == ".wandb"
           for record in records(path) if record.HasField("run")}  # fmt: skip
    assert len(ids) == 1
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert not [done for done in (*killed, last) if CANARY in done.stdout + done.stderr]


# ------------------------------------------------------------------------------------------------ artifacts


class Online(FakeRun):
    """Remembers the artifacts that it is given, which are wandb's own."""

    def __init__(self):
        super().__init__()
        self.logged, self.used = [], []

    def log_artifact(self, made, aliases):
        if self.broken:
            raise ValueError("no such project")
        self.logged.append((made, aliases))

    def use_artifact(self, parent):
        if self.broken:
            raise ValueError("no such project")
        self.used.append(parent)


def published(
    folder: Path, parents: dict, mode: str, broken: bool = False, **track
) -> tuple[artifact.Artifact, Online]:
    """A run that hands over, told to a stand-in of `mode`."""
    online = Online()
    online.broken = broken
    with Run.open(Toy(out=str(folder), track=TrackConfig(wandb="off")), parents) as run:
        run._wandb = Wandb(run.dir, TrackConfig(**track), run.name, run.say)
        run._wandb.run, run._wandb.mode = online, mode
        made = run.publish(
            "causal-lm", lambda to: (to / "model.safetensors").write_text(str(folder)), [], architecture={}
        )
    return made, online


def test_online_an_artifact_names_its_parents_and_keeps_its_weights(tmp_path):
    grand, first = published(tmp_path / "a", {}, "online")
    made, second = published(tmp_path / "b", {"init": grand}, "online")
    (card, aliases), (child, _) = first.logged[0], second.logged[0]
    assert isinstance(card, wandb.Artifact) and card.type == "causal-lm" and card.name == "toy"
    assert grand.digest[:12] in aliases and card.metadata["digest"] == grand.digest
    assert set(card.manifest.entries) == {"manifest.json", "README.md", "config.yaml"}
    # wandb tells versions apart by their content: what the child uses is what its parent logged, and not its own.
    (used,) = second.used
    assert used.digest == card.digest != child.digest and not first.used


def test_online_weights_go_along_by_choice(tmp_path):
    made, online = published(tmp_path, {}, "online", upload_weights=True)
    assert set(online.logged[0][0].manifest.entries) == {*made.manifest["files"], "manifest.json"}
    assert "model.safetensors" in made.manifest["files"]


def test_offline_no_artifact_is_asked_for(tmp_path):
    grand, _ = published(tmp_path / "a", {}, "offline")
    _, offline = published(tmp_path / "b", {"init": grand}, "offline")
    assert not offline.logged and not offline.used and offline.told == ["finished"]


def test_an_artifact_that_is_refused_costs_a_sentence_and_the_run_goes_on(tmp_path, capsys):
    grand, _ = published(tmp_path / "a", {}, "online")
    made, online = published(tmp_path / "b", {"init": grand}, "online", broken=True)
    said = capsys.readouterr().out
    assert "did not take the parent toy (ValueError: no such project)" in said and "did not take the artifact" in said
    assert online.told == ["finished"] and artifact.open(made.path).digest == made.digest

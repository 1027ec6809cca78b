"""The run folder: what is on the disk after a kill, after a resume, and with a secret in the environment."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fledge import track
from fledge.config import Config, DataConfig, StageConfig, bookkeeping, hardware, parent
from fledge.errors import InputError
from fledge.evals.score import Score
from fledge.track import TrackConfig

ROOT = Path(__file__).parents[2]
CANARY = "0123456789abcdef0123456789abcdefcafe5eed"


class Data(DataConfig):
    content: str = "abc"
    place: str = hardware("here")

    def fingerprint(self) -> str:
        return self.content


class Parents(Config):
    encoder: str | None = parent("vision-encoder", required=False)


class Toy(StageConfig):
    stage: str = "pretrain.toy"
    width: int = 8
    remark: str = bookkeeping("")
    data: Data = Data()
    parents: Parents = Parents()
    track: TrackConfig = TrackConfig(wandb="off")


def open_run(folder: Path, **changes) -> track.Run:
    return track.Run.open(Toy(out=str(folder), **changes), {})


def metrics(run: track.Run) -> list[dict]:
    return track.read_metrics(run.dir / "metrics.jsonl")


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    run = open_run(tmp_path)
    run.log(0, {"train/loss": 0.1 + 0.2, "n": 3})
    assert json.loads((run.dir / "metrics.jsonl").read_text()) == {"step": 0, "train/loss": 0.1 + 0.2, "n": 3}


def test_numbers_that_json_lacks_are_null_and_named(tmp_path):
    run = open_run(tmp_path)
    run.log(4, {"a": math.nan, "b": -math.inf, "c": 1.5})
    refuse = lambda word: pytest.fail(f"{word} is not JSON")  # noqa: E731
    line = json.loads((run.dir / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 4, "a": None, "b": None, "c": 1.5, "nonfinite": {"a": "nan", "b": "-inf"}}


def test_truncate_drops_what_happens_again(tmp_path):
    run = open_run(tmp_path)
    for step in range(6):
        run.log(step, {"x": step / 7})
    run.truncate(4)
    run.log(4, {"x": -1.0})
    assert [(r["step"], r["x"]) for r in metrics(run)] == [(s, s / 7) for s in range(4)] + [(4, -1.0)]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "x": 0.', b'{"step": 2, "x": 0.5}', b"\xff\xfe{", b'{"step": 2, "a\xc3']
)
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, torn):
    run = open_run(tmp_path)
    for step in range(2):
        run.log(step, {"x": 1.0})
    run.close()
    with open(run.dir / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [r["step"] for r in metrics(run)] == [0, 1]
    again = open_run(tmp_path)
    again.log(2, {"x": 2.0})
    assert [(r["step"], r["x"]) for r in metrics(again)] == [(0, 1.0), (1, 1.0), (2, 2.0)]


def test_a_bad_line_before_the_last_is_named(tmp_path):
    run = open_run(tmp_path)
    run.close()
    (run.dir / "metrics.jsonl").write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2"):
        open_run(tmp_path)


def test_only_science_data_and_parents_move_a_run_aside(tmp_path, capsys):
    open_run(tmp_path).close()
    open_run(tmp_path, remark="other", data=Data(place="there")).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy"]
    open_run(tmp_path, width=9).close()
    open_run(tmp_path, width=9, data=Data(content="abd")).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy", "toy~1", "toy~2"]
    assert json.loads((tmp_path / "toy~1" / "identity.json").read_text())["config"]["width"] == 8
    assert "kept as" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_processes_do_not_work_on_one_run(tmp_path):
    """Neither goes on in it nor moves it aside; the lock of one that was killed is nobody's."""
    open_run(tmp_path).close()
    code = f"import pathlib, fledge.track as t; held = t.hold(pathlib.Path({str(tmp_path / 'toy')!r}))"
    code += "; print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert other.stdout and other.stdout.readline() == b"1\n"
        for width in (8, 9):
            with pytest.raises(InputError, match=f"another process works on this run .process {other.pid} on "):
                open_run(tmp_path, width=width)
    finally:
        other.kill()
        other.communicate()
    open_run(tmp_path).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy"]


def test_pictures_keep_their_order_and_replace_themselves(tmp_path):
    run = open_run(tmp_path)
    run.picture("b", Image.new("RGB", (4, 4)), "first")
    run.samples("a", [{"prompt": "x", "score": math.inf, "n": 2}, {"prompt": "y", "more": None}], "second")
    run.picture("b", Image.new("RGB", (5, 4)), "third")
    index = json.loads((run.dir / "media" / "index.json").read_text())
    assert [(e["file"], e["kind"], e["caption"]) for e in index] == [
        ("b.png", "picture", "third"),
        ("a.json", "samples", "second"),
    ]
    assert Image.open(run.dir / "media" / "b.png").size == (5, 4)
    rows = json.loads((run.dir / "media" / "a.json").read_text())
    assert rows == [{"prompt": "x", "score": "inf", "n": 2}, {"prompt": "y", "more": None}]
    with pytest.raises(ValueError, match="media name"):
        run.picture("../escape", Image.new("RGB", (4, 4)))


def test_status_adds_up_over_attempts(tmp_path):
    with open_run(tmp_path) as run:
        status = json.loads((run.dir / "status.json").read_text())
        assert status["state"] == "running"
        status["seconds"] = 100.0
        track.write_json(run.dir / "status.json", status)
    with pytest.raises(RuntimeError), open_run(tmp_path) as run:
        raise RuntimeError("no")
    status = json.loads((run.dir / "status.json").read_text())
    assert status["state"] == "failed" and 0 <= status["seconds"] < 100
    attempts = json.loads((run.dir / "environment.json").read_text())["attempts"]
    assert len(attempts) == 2 and attempts[0]["packages"]["torch"]


def test_going_on_with_other_versions_is_said_once_and_recorded(tmp_path, monkeypatch, capsys):
    here = track.environment()
    now = {"torch": "2.0"}

    def environment():
        return {**here, "packages": {**here["packages"], **now}}

    monkeypatch.setattr(track, "environment", environment)
    open_run(tmp_path).close()
    now["torch"] = "2.1"
    open_run(tmp_path).close()  # nothing was saved yet: it starts anew, bit for bit
    assert "other versions" not in capsys.readouterr().out
    (tmp_path / "toy/checkpoints/step_00000004").mkdir(parents=True)
    now |= {"torch": "2.2", "timm": None}
    for _ in range(3):
        open_run(tmp_path).close()
    said = capsys.readouterr().out
    assert said.count("goes on with other versions") == 1 and "torch 2.1 -> 2.2" in said and "-> absent" in said
    attempts = json.loads((tmp_path / "toy/environment.json").read_text())["attempts"]
    assert [attempt["bitwise"] for attempt in attempts] == [True, True, False, False, False]
    assert ["torch 2.1 -> 2.2" in attempt.get("changed", []) for attempt in attempts] == [False] * 2 + [True] + [
        False
    ] * 2


@pytest.mark.parametrize("number", [0, 2])
def test_a_run_of_another_format_is_refused_by_name_and_left_alone(tmp_path, number):
    open_run(tmp_path).close()
    path = tmp_path / "toy/identity.json"
    written = json.loads(path.read_text())
    assert written["format"] == track.FORMAT == 1
    path.write_text(json.dumps(written | {"format": number}))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=f"toy has format {number}; this version of fledge reads format 1"):
        open_run(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    del written["format"]  # as the first versions wrote it
    path.write_text(json.dumps(written))
    open_run(tmp_path).close()
    assert not (tmp_path / "toy~1").exists() and json.loads(path.read_text())["format"] == 1


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("fledge.distributed.is_main", lambda: False)
    monkeypatch.setattr("fledge.distributed.barrier", lambda: None)
    run = open_run(tmp_path / "runs")
    run.log(0, {"x": 1.0})
    run.truncate(0)
    run.picture("a", Image.new("L", (2, 2)))
    run.samples("b", [{"x": 1}])
    run.close()
    assert not (tmp_path / "runs").exists()


def test_a_sentence_says_what_is_not_beaten():
    score = Score("accuracy", 0.5, 200, 0.4, 0.6, before=0.2, baseline=0.55, baseline_name="raw pixels")
    assert track.sentence(score) == (
        "accuracy 0.5 [0.4, 0.6] over 200 examples, before 0.2, raw pixels 0.55, "
        "DOES NOT BEAT ITS BASELINE (RAW PIXELS)"
    )

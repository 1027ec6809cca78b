"""The commands: exit codes, messages, speed of the light ones, and the same from Python."""

import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Literal

import pytest

import fledge
from fledge import artifact, cli
from fledge.config import StageConfig
from fledge.errors import InputError, RunError
from fledge.track import Run

ROOT = Path(__file__).parents[2]


class Echo(StageConfig):
    """A stage that does what its config says."""

    stage: Literal["pretrain.echo"] = "pretrain.echo"
    then: Literal["finish", "fail", "crash", "interrupt"] = "finish"


def main(config):
    with Run.open(config, {}) as run:
        if config.then == "fail":
            raise RunError("the loss is not finite")
        if config.then == "crash":
            raise KeyError("a bug")
        if config.then == "interrupt":
            raise KeyboardInterrupt
        return run.publish(
            "vision-encoder", lambda to: (to / "model.safetensors").write_text("x"), [], architecture={"name": "none"}
        )


@pytest.fixture(autouse=True)
def echo(monkeypatch, tmp_path):
    module = types.ModuleType("pretrain.echo")
    module.Config, module.main, module.WRITES = Echo, main, "vision-encoder"
    monkeypatch.setitem(sys.modules, "pretrain.echo", module)
    monkeypatch.setattr(main, "__module__", "pretrain.echo", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.yaml").write_text("stage: pretrain.echo\n")


def test_run_plan_show(capsys):
    assert cli.main(["run", "echo.yaml", "--out", "o", "seed=3"]) == 0
    assert "report: o/echo/report.html" in capsys.readouterr().out
    assert cli.main(["run", "--out", "o", "echo.yaml", "seed=3"]) == 0
    assert "echo: reuse" in capsys.readouterr().out
    assert cli.main(["plan", "echo.yaml", "--out", "o", "seed=4"]) == 0
    assert "changed: seed 3 -> 4" in capsys.readouterr().out
    for folder in ("o/echo", "o/echo/artifact"):
        assert cli.main(["show", folder]) == 0
        said = capsys.readouterr().out
        assert "vision-encoder" in said and "every digest verified" in said
    assert cli.main(["run", "echo.yaml", "seed=3", "--fresh", "--out", "o"]) == 0
    assert Path("o/echo~1").is_dir()


@pytest.mark.parametrize(
    "then, code, says",
    [
        ("finish", 0, ""),
        ("fail", 1, "fledge: the loss is not finite"),
        ("interrupt", 130, "fledge: interrupted; the same command goes on where it was"),
        ("explode", 2, "expected one of 'finish', 'fail', 'crash' or 'interrupt'"),
    ],
)
@pytest.mark.parametrize("entry", ["fledge run", "bare"])
def test_exit_codes(then, code, says, entry, capsys):
    if entry == "bare":
        assert cli.stage_main(Echo, main, ["echo.yaml", f"then={then}", "--out", "o"]) == code
    else:
        assert cli.main(["run", "echo.yaml", f"then={then}", "--out", "o"]) == code
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert cli.main(["plan", "echo.yaml", f"then={then}", "--out", "o"]) == (2 if code == 2 else 0)
    assert {0: "reuse", 1: "resume", 130: "resume", 2: ""}[code] in capsys.readouterr().out


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        cli.main(["run", "echo.yaml", "then=crash"])


@pytest.mark.parametrize(
    "argv",
    [["run", "nope.yaml"], ["run", "echo.yaml", "sed=1"], ["show", "nope"], ["import", "vision", "x", "y"],
     ["generate", "nope", "x"], ["plan", "nope"]],
)  # fmt: skip
def test_wrong_input_is_2(argv, capsys):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith("fledge: ")


@pytest.mark.parametrize(
    "argv", [["run"], ["fly"], ["run", "echo.yaml", "--nope"], ["generate", "x", "y", "--top-k", "0"], []]
)
def test_wrong_usage_is_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


def test_one_process_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["plan", "echo.yaml", "sed=1"]) == 2
    assert capsys.readouterr().err == ""


def test_from_python():
    made = fledge.run("echo.yaml", "seed=5", out="o")
    assert fledge.artifact.open("o/echo/artifact").digest == made["echo"].digest
    assert fledge.artifact is artifact and made["echo"].seed == 5
    with pytest.raises(fledge.InputError, match="sed"):
        fledge.run("echo.yaml", "sed=1")
    assert issubclass(InputError, ValueError)


def cpu_seconds(args: list[str]) -> tuple[float, subprocess.CompletedProcess]:
    """CPU time of a command: unlike the clock's, it does not depend on who else is computing."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # noqa: E731
    before = used()
    done = subprocess.run([sys.executable, "-m", "fledge.cli", *args], capture_output=True, text=True, cwd=ROOT)
    return used() - before, done


def test_help_answers_at_once():
    seconds, done = cpu_seconds(["--help"])
    assert done.returncode == 0 and all(c in done.stdout for c in ("run", "plan", "show", "import", "generate"))
    assert seconds < 0.5
    assert cpu_seconds(["--version"])[1].stdout.strip() == f"fledge {fledge.__version__}"


def test_a_wrong_key_is_told_within_four_seconds(tmp_path):
    path = tmp_path / "mae.yaml"
    path.write_text("stage: pretrain.mae\ndata: {source: world}\noptim:\n  lrr: 1\n")
    seconds, done = cpu_seconds(["run", str(path)])
    assert done.returncode == 2
    assert (
        done.stderr
        == f"fledge: 1 error in the config\n  {path}:4  optim.lrr  unknown key; did you mean lr (a number)?\n"
    )
    assert seconds < 4

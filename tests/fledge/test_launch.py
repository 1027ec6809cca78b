"""`fledge launch`: what it would start, what it does when a rank fails, and a run that is told to stop and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from fledge import cli, launch
from fledge.launch import Failure, Launcher, Plan
from tests import network
from tests.fledge.test_resume import CASES, assert_same_run, curve, logged, placed, write_data
from tests.launch import ROOT, environment, free_port
from tests.slurm import Slurm
from tests.slurm import missing as missing_slurm

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stage at toy size, mae.yaml, beside its data."""
    root = tmp_path_factory.mktemp("launch")
    write_data(root)
    config = {"stage": "pretrain.mae", "seed": 5, **placed(CASES["mae"].config, root), "track": {"wandb": "off"}}
    config["train"] |= {"steps": STEPS, "save_every": 8, "eval_every": 0}  # a line a step
    (root / "mae.yaml").write_text(yaml.safe_dump(config))
    (root / "two.yaml").write_text(
        "stages:\n  first: {stage: pretrain.mae, config: mae.yaml}\n"
        "  second: {stage: pretrain.mae, config: mae.yaml, parents: {init: first}}\n"
    )
    return root


@pytest.fixture(scope="module")
def truth(folder, forks):
    """World size -> the run that nothing happens to."""
    made = {}

    def run(world):
        if world not in made:
            argv = ["run", str(folder / "mae.yaml"), "--out", "runs"]
            place = folder / f"truth{world}"
            forks.start("tests.resume_driver:command", {"argv": argv}, world=world, folder=place).wait()
            made[world] = place / "runs" / "mae"
        return made[world]

    return run


def python(*argv, cwd=None, inside=(), **env):
    """A module as a process of its own; `inside` stands before the command."""
    quiet = environment(**{"GLOO_SOCKET_IFNAME": "lo", **env})
    return subprocess.Popen(
        [*inside, sys.executable, "-m", *map(str, argv)],
        env=quiet, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def fledge(*argv, **more):
    return python("fledge.cli", *argv, **more)


def ended(process, code=0):
    said, complained = process.communicate(timeout=180)
    assert process.returncode == code, said + complained
    return said, complained


# ------------------------------------------------------------------------------------------------ what would start


def dry(folder, capsys, *options):
    assert cli.main(["launch", str(folder / "mae.yaml"), *options, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_one_machine(folder, capsys):
    said = dry(folder, capsys, "--procs", "2", "--out", "my runs", "seed=7").split(" ", 1)[1]
    assert said == (
        "-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=0 "
        f"-m fledge.cli run {folder}/mae.yaml seed=7 --out 'my runs'\n"
    )


def test_several_machines(folder, capsys):
    options = ["--procs", "4", "--nodes", "3", "--node-rank", "2", "--rdzv", "first:29400", "--rdzv-timeout", "9"]
    said = dry(folder, capsys, *options)
    assert "--nnodes=3 --node-rank=2 --rdzv-backend=c10d --rdzv-endpoint=first:29400 --rdzv-id=mae-0" in said
    assert "--rdzv-conf=is_host=false,join_timeout=9,read_timeout=9 --nproc-per-node=4" in said


@pytest.mark.parametrize(
    "options, says",
    [
        (["--gpus", "1", "--procs", "1"], "give one of them"),
        (["--procs", "1", "--nodes", "2"], "need --rdzv HOST:PORT"),
        (["--procs", "1", "--nodes", "2", "--rdzv", "first", "--node-rank", "0"], "expected HOST:PORT"),
        (["--procs", "1", "--nodes", "2", "--rdzv", "first:1"], "--node-rank: expected 0 to 1"),
        (["--procs", "1", "--nodes", "2", "--rdzv", "first:1", "--node-rank", "2"], "--node-rank: expected 0 to 1"),
        (["--gpus", "4096"], "this machine has"),
        (["--slurm"], "--gpus N, or --procs N"),
        (["--slurm", "--procs", "1", "--sbatch", "account=x\n#SBATCH --uid=0"], "--sbatch: expected"),
        (["--slurm", "--procs", "1", "--sbatch", "signal=KILL"], "--sbatch: expected"),
        (["--procs", "1", "sed=1"], "did you mean seed"),
    ],
)
def test_wrong_options_start_nothing(folder, options, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    assert cli.main(["launch", str(folder / "mae.yaml"), *options]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- SLURM


def test_the_batch_file(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", "canary-canary")
    options = ["--slurm", "--gpus", "8", "--nodes", "2", "--sbatch", "partition=gpu", "--out", str(tmp_path / "o")]
    said = dry(folder, capsys, *options, "--max-restarts", "3")
    assert [line for line in said.splitlines() if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=mae", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8",
        "#SBATCH --signal=USR2@90", "#SBATCH --requeue", "#SBATCH --open-mode=append",
        f"#SBATCH --output={tmp_path}/o/logs/mae/slurm-%j.log", "#SBATCH --partition=gpu",
    ]  # fmt: skip
    assert "canary" not in said and "localhost" not in said and not (tmp_path / "o").exists()


def test_a_secret_does_not_reach_the_batch_file(folder, capsys, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "canary-canary")
    options = ["--slurm", "--procs", "1", "track.project=canary-canary", "--dry-run"]
    assert cli.main(["launch", str(folder / "mae.yaml"), *options]) == 2
    said = capsys.readouterr()
    assert "the value of $A_TOKEN is part of the command" in said.err and "canary" not in said.out + said.err


def test_a_recipe_as_dependent_jobs(folder, capsys, monkeypatch, tmp_path):
    """A job for each stage, submitted behind its parents; each runs its stage alone, with logs of its own."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    count = f'echo "$@" >> {tmp_path}/asked; echo $((70 + $(wc -l < {tmp_path}/asked)));'
    (stubs / "sbatch").write_text(f"#!/bin/sh\n{count}\n")
    (stubs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    wish = ["launch", str(folder / "two.yaml"), "--slurm", "--per-stage", "--procs", "2", "--out", str(tmp_path / "o")]
    assert cli.main([*wish, "--dry-run"]) == 0
    assert "# sbatch --dependency=afterok:<first> --kill-on-invalid-dep=yes\n" in capsys.readouterr().out
    assert cli.main(wish) == 0 and "submitted job 72" in capsys.readouterr().out
    first, second = (tmp_path / "o/logs" / f"two-{stage}" / "job.sbatch" for stage in ("first", "second"))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"--parsable {first}", f"--parsable --dependency=afterok:71 --kill-on-invalid-dep=yes {second}"]
    assert f"--out {tmp_path}/o --only second" in second.read_text()
    for wrong, says in [
        (["--procs", "2"], "goes with --slurm"),
        (["--slurm", "--procs", "2", "--only", "first"], "--only"),
    ]:
        assert cli.main(["launch", str(folder / "two.yaml"), "--per-stage", *wrong]) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["launch", str(folder / "mae.yaml"), "--only", "first"]) == 2
    assert "--only and --per-stage are for recipes" in capsys.readouterr().err


def in_slurm(folder, capsys, monkeypatch, place, *options, srun=0, hosts="echo node7; echo node8"):
    """Run the batch file with stand-ins for SLURM's commands: its exit code, what srun got, what scontrol got."""
    stubs = place / "stubs"
    stubs.mkdir()
    told = f'printf "%s\\n" "$@" > {place}'
    scontrol = f'if [ "$1" = show ]; then {hosts}; else {told}/scontrol; fi'
    for name, text in {"scontrol": scontrol, "srun": f"{told}/srun\nexit {srun}"}.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}\n")
        (stubs / name).chmod(0o755)
    (place / "job").write_text(dry(folder, capsys, "--slurm", "--procs", "2", "--nodes", "2", *options))
    slurm = {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = subprocess.run(["bash", str(place / "job")], env=os.environ | slurm, capture_output=True, text=True)
    got = [(place / name).read_text().splitlines() if (place / name).exists() else [] for name in ("srun", "scontrol")]
    return done, *got


def test_the_batch_file_starts_a_launcher_on_each_machine(folder, capsys, monkeypatch, tmp_path):
    sly = "data.path=$(touch pwned) `touch pwned`'; touch pwned \"#"
    done, srun, scontrol = in_slurm(folder, capsys, monkeypatch, tmp_path, sly)
    assert done.returncode == 0 and not done.stderr and not scontrol
    assert srun[1:5] == ["-m", "fledge.cli", "launch", str(folder / "mae.yaml")] and srun[5] == sly
    assert srun[-2:] == ["--rdzv", "node7:32345"] and not list(Path().glob("**/pwned"))
    parsed = cli._parse(cli.parser(), srun[3:])
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert launch.plan(parsed).node == 1 and launch.plan(parsed).world == 4


@pytest.mark.parametrize("code, requeued", [(75, True), (1, False), (2, False)])
def test_the_batch_file_asks_for_a_requeue_on_75_alone(folder, capsys, monkeypatch, tmp_path, code, requeued):
    done, _, scontrol = in_slurm(folder, capsys, monkeypatch, tmp_path, srun=code)
    assert done.returncode == code and scontrol == (["requeue", "12345"] if requeued else [])


@pytest.mark.parametrize("hosts", ["exit 1", "true"])
def test_no_head_node_no_start(folder, capsys, monkeypatch, tmp_path, hosts):
    """A fallback to localhost would make every machine a world of its own."""
    done, srun, _ = in_slurm(folder, capsys, monkeypatch, tmp_path, hosts=hosts)
    assert done.returncode == 1 and not srun


# -------------------------------------------------------------------------------------------------------- restarts


class Scripted(Launcher):
    """Attempts that end with these codes, having reached these steps."""

    def __init__(self, folder, attempts, **more):
        stage = types.SimpleNamespace(name="mae", dir=folder)
        super().__init__(Plan("mae.yaml", **more), types.SimpleNamespace(stages=[stage]), "mae", folder / "logs")
        self.attempts = attempts

    def attempt(self, tries):
        code, step = self.attempts[tries]
        self.tried = tries + 1
        if step:
            (self.job.stages[0].dir / "checkpoints" / f"step_{step:08}").mkdir(parents=True, exist_ok=True)
        return code


@pytest.mark.parametrize(
    "limit, attempts, code, tried",
    [
        (0, [(1, 10)], 1, 1),  # never
        (1, [(1, 10), (1, 20), (1, 30), (0, 40)], 0, 4),  # restarts with progress are free
        (1, [(1, 0), (1, 0)], 1, 2),
        (2, [(1, 10), (1, 10), (1, 10), (1, 10), (0, 0)], 1, 4),
        (2, [(1, 0), (1, 0), (1, 10), (1, 10), (0, 0)], 0, 5),  # progress begins the count anew
        (5, [(2, 0)], 2, 1),  # wrong input stays wrong
        (5, [(75, 10)], 75, 1),  # whoever stopped it wants the machine
        (5, [(130, 10)], 130, 1),
    ],
)
def test_restarts_count_while_nothing_is_gained(tmp_path, limit, attempts, code, tried):
    launcher = Scripted(tmp_path, attempts, max_restarts=limit)
    assert launcher.run() == code and launcher.tried == tried


def test_an_artifact_is_progress(tmp_path):
    job = types.SimpleNamespace(stages=[types.SimpleNamespace(name="a", dir=tmp_path)])
    before = launch.progress(job)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").touch()
    assert launch.stalled(3, before, launch.progress(job)) == 0
    assert launch.stalled(3, before, before) == 4


def test_who_failed_first():
    ranks = [
        {"rank": 0, "code": 1, "ended": 2.0},
        {"rank": 1, "code": 75, "ended": 0.5},
        {"rank": 2, "code": 3, "ended": 1.0},
        {"rank": 3},
    ]
    assert launch.first_failure(ranks, "") == Failure(2, 3)
    words = "Root Cause (first observed failure):\n[0]:\n  time : now\n  host : x\n  rank      : 3 (local_rank: 3)\n"
    assert launch.first_failure(ranks, words + "  exitcode  : -9 (pid: 1)\n") == Failure(3, -9)
    assert launch.first_failure(ranks, words + "  exitcode  : 1 (pid: 1)\n") == Failure(2, 3)


# ------------------------------------------------------------------------------------------------------ world size


def test_fewer_processes_than_asked_for_are_refused(folder, tmp_path):
    run = fledge("run", folder / "mae.yaml", "--out", tmp_path, FLEDGE_WORLD_SIZE="2")
    assert "launched for 2 processes, but 1 joined" in ended(run, 2)[1]


# -------------------------------------------------------------------------------------------------- told to stop


def go_on(forks, folder, place, truth, world, **args):
    """Start, have it stopped, start again; the same run as one that nobody stopped. Where it stopped."""
    argv, run = ["run", str(folder / "mae.yaml"), "--out", "runs"], place / "runs" / "mae"
    job = forks.start("tests.resume_driver:command", {"argv": argv, **args}, world=world, folder=place)
    job.wait(check=False)
    assert job.codes == [75] * world, job.output()
    assert "stopped by" in job.output() and "the same command goes on where it was" in job.output()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    assert steps[-1] == len([record for record in curve(run) if "train/loss" in record])
    forks.start("tests.resume_driver:command", {"argv": argv}, world=world, folder=place).wait()
    assert_same_run(run, truth(world))
    return steps[-1]


@pytest.mark.parametrize("world, number", [(1, "SIGUSR2"), (1, "SIGTERM"), (2, "SIGUSR2")])
def test_stopped_while_training(folder, truth, forks, tmp_path, world, number):
    """With two ranks only one of them gets the signal."""
    assert go_on(forks, folder, tmp_path, truth, world, stop="in training", at=5, number=number) == 6


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_inside_a_save_is_not_lost(folder, truth, forks, tmp_path, world):
    assert go_on(forks, folder, tmp_path, truth, world, stop="inside a save", at=8) == 9


def test_a_signal_inside_the_last_save(folder, truth, forks, tmp_path):
    assert go_on(forks, folder, tmp_path, truth, 1, stop="inside a save", at=STEPS) == STEPS


@pytest.mark.parametrize("world", [1, 2])
def test_stopped_after_training(folder, truth, forks, tmp_path, world):
    """Where there is nothing to save, a run leaves at once."""
    assert go_on(forks, folder, tmp_path, truth, world, stop="evaluation") == STEPS
    assert (tmp_path / "runs" / "mae" / "artifact").exists()


# -------------------------------------------------------------------------------------------------- the real thing

BREAK = """
import os, time
if os.environ.get("RANK") == "1" and os.environ["FLEDGE_LOGS"].endswith("attempt-1"):
    from fledge import track
    def log(self, step, values):
        if {when}:
            {act}
    track.Run.log = log
"""
SLOW = """
import os, time
if "RANK" in os.environ:
    from fledge import track
    log = track.Run.log
    track.Run.log = lambda *args: (log(*args), time.sleep(0.1))
"""
TEXTS = (".json", ".jsonl", ".log", ".yaml", ".html", ".sbatch", ".txt")


def test_launch_is_stopped_and_goes_on(folder, truth, tmp_path):
    command = ["launch", folder / "mae.yaml", "--procs", "2", "--out", "runs"]
    run = tmp_path / "runs" / "mae"
    (tmp_path / "sitecustomize.py").write_text(BREAK.format(when="step > 4", act="time.sleep(0.2)"))
    process = fledge(*command, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    while logged(run) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR2)
    said, _ = ended(process, 75)
    assert "stopped by SIGUSR2, saved at step" in said
    ended(fledge(*command, cwd=tmp_path))
    assert_same_run(run, truth(2))
    noted = json.loads((run / "environment.json").read_text())["attempts"]
    assert [attempt["logs"] for attempt in noted] == [str(tmp_path / f"runs/logs/mae/attempt-{k}") for k in (1, 2)]
    assert all(attempt["world_size"] == 2 and sum(attempt["hosts"].values(), []) == [0, 1] for attempt in noted)
    notes = [launch.records(Path(attempt["logs"])) for attempt in noted]
    assert [[note["code"] for note in ranks] for ranks in notes] == [[75, 75], [0, 0]]


def test_a_rank_fails_and_the_run_goes_on(folder, truth, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        BREAK.format(when="step == 13", act="raise ValueError('rank one broke')")
    )
    command = ["launch", folder / "mae.yaml", "--procs", "2", "--out", "runs", "--max-restarts", "1"]
    process = fledge(*command, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", A_TOKEN="canary-canary")
    said, complained = ended(process)
    assert complained.startswith("launch: rank 1 of 2 failed first: it ended with code 1")
    assert "ValueError: rank one broke" in complained
    assert "launch: restart 1\n" in said and "resumed at step 8" in said
    assert_same_run(tmp_path / "runs" / "mae", truth(2))
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.suffix in TEXTS]
    assert texts and not any("canary" in text for text in texts)


def test_a_machine_that_is_alone_says_where_it_waited(folder, tmp_path):
    where = f"127.0.0.1:{free_port()}"
    meet = ["--procs", "1", "--nodes", "2", "--rdzv", where, "--rdzv-timeout", "3", "--node-rank", "0"]
    _, complained = ended(fledge("launch", folder / "mae.yaml", *meet, "--out", tmp_path), 1)
    assert (
        complained.startswith(f"fledge: 2 machines did not meet at {where} within 3 s.")
        and "Traceback" not in complained
    )


def test_a_recipe_runs_under_the_same_processes(folder, truth, tmp_path):
    said, _ = ended(fledge("launch", folder / "two.yaml", "--procs", "2", "--out", tmp_path, "second.train.steps=5"))
    assert (tmp_path / "second" / "artifact" / "manifest.json").exists() and "report: " in said
    attempt = json.loads((tmp_path / "second" / "environment.json").read_text())["attempts"][0]
    assert attempt["world_size"] == 2 and attempt["logs"] == str(tmp_path / "logs" / "two" / "attempt-1")


# ------------------------------------------------------------------------------- the same run, however it is launched

TOPOLOGIES = ["torchrun", "accelerate", "fledge launch", "two nodes", "two namespaces"]  # and SLURM, below


def started(how, folder, place, request):
    """Two ranks, launched in this way: the processes to wait for, one a machine."""
    port, stage = str(free_port()), [folder / "mae.yaml", "--out", "runs"]
    if how == "torchrun":
        return [
            python(
                "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain.mae", *stage, cwd=place
            )
        ]
    if how == "accelerate":
        options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", f"--main_process_port={port}"]
        options += ["--mixed_precision=no", "--dynamo_backend=no", "-m", "pretrain.mae"]
        return [python("accelerate.commands.launch", *options, *stage, cwd=place)]
    if how == "fledge launch":
        return [fledge("launch", *stage, "--procs", "2", cwd=place)]
    here = [{}, {}]
    host = "127.0.0.1"
    if how == "two namespaces":
        machines = request.getfixturevalue("machines")
        here = [{"inside": machine.inside, "GLOO_SOCKET_IFNAME": machine.interface} for machine in machines]
        host = machines[0].address
    meet = ["--procs", "1", "--nodes", "2", "--rdzv", f"{host}:{port}", "--node-rank"]
    return [fledge("launch", *stage, *meet, rank, cwd=place, **here[rank]) for rank in (0, 1)]


@pytest.fixture
def machines():
    if reason := network.missing():
        pytest.skip(reason)
    with network.two_machines() as pair:
        yield pair


@pytest.mark.parametrize("how", TOPOLOGIES)
def test_the_same_run_however_it_is_launched(folder, truth, tmp_path, request, how):
    for process in started(how, folder, tmp_path, request):
        ended(process)
    run = tmp_path / "runs" / "mae"
    assert json.loads((run / "environment.json").read_text())["attempts"][0]["world_size"] == 2
    assert_same_run(run, truth(2))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := missing_slurm():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.long)])
def test_preempted_under_slurm(slurm, folder, truth, tmp_path, times):
    """Launched, stopped by SIGUSR2, put back into the queue by itself, and the same run in the end."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    command = ["launch", folder / "mae.yaml", "--slurm", "--procs", "2", "--out", "runs"]
    here = {**slurm.environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "A_TOKEN": "canary-canary"}
    said, _ = ended(fledge(*command, cwd=tmp_path, **here))
    job, run = said.split("submitted job ")[1].split()[0], tmp_path / "runs" / "mae"
    for stop in range(times):
        wait_for(lambda lines=5 * (stop + 1): logged(run) >= lines, 120)
        slurm.ask("scancel", "--signal=USR2", job)
        wait_for(lambda restarts=str(stop + 1): slurm.job(job)["Restarts"] == restarts, 120)
    wait_for(lambda: slurm.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 120)
    log = (tmp_path / f"runs/logs/mae/slurm-{job}.log").read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED" and slurm.job(job)["Restarts"] == str(times), log
    assert log.count("stopped by SIGUSR2, saved at step") == times == log.count("resumed at step")
    assert_same_run(run, truth(2))
    codes = [[note["code"] for note in launch.records(logs)] for logs in attempts(run)]
    assert codes == [[75, 75]] * times + [[0, 0]]
    assert not any("canary" in path.read_text() for path in (tmp_path / "runs").rglob("*") if path.suffix in TEXTS)


# ----------------------------------------------------------------------------------------------- somebody is killed


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say who started whom")
def test_whoever_is_killed_the_run_goes_on(folder, truth, tmp_path):
    """One rank, all of them, torchrun, then the launcher; after that, the same command. No rank outlives its launcher,
    or it would write into the folders of the next."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    command = ["launch", folder / "mae.yaml", "--procs", "2", "--out", "runs", "--max-restarts", "1"]
    run, logs = tmp_path / "runs" / "mae", tmp_path / "runs" / "logs" / "mae"
    launcher = fledge(*command, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")

    def ranks(attempt, lines):
        """The two processes of an attempt, once it is under way and so many lines are logged."""
        there = logs / f"attempt-{attempt}"
        wait_for(lambda: len(launch.records(there)) == 2 and said(there, attempt) and logged(run) >= lines, 120)
        return [note["pid"] for note in launch.records(there)]

    def said(there, attempt):
        return attempt == 1 or "resumed at step" in (there / "rank-0.log").read_text()

    os.kill(ranks(1, 9)[1], signal.SIGKILL)
    for pid in ranks(2, 17):
        os.kill(pid, signal.SIGKILL)
    orphans = ranks(3, 18)
    os.kill(parent(orphans[0]), signal.SIGKILL)
    wait_for(lambda: (logs / "attempt-4").exists(), 60)
    assert not any(running(pid) for pid in orphans)
    orphans = ranks(4, 18)
    launcher.kill()
    _, complained = launcher.communicate(timeout=60)
    wait_for(lambda: not any(running(pid) for pid in orphans), 10)
    ended(fledge(*command, cwd=tmp_path))
    assert complained.startswith("launch: rank 1 of 2 failed first: it was killed by SIGKILL")
    assert "torchrun was killed by SIGKILL" in complained
    assert_same_run(run, truth(2))
    assert [path.name for path in attempts(run)] == [f"attempt-{k}" for k in (1, 2, 3, 4, 5)]


def parent(pid):
    return int(re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])


def running(pid):
    """A zombie that nobody has buried yet has ended."""
    try:
        return not re.search(r"^State:\s*Z", Path(f"/proc/{pid}/status").read_text(), re.M)
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(done, seconds):
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def attempts(run):
    """The folder of the logs of each attempt."""
    return [Path(attempt["logs"]) for attempt in json.loads((run / "environment.json").read_text())["attempts"]]

"""`fledge launch`: torchrun on one machine or several, or a job for SLURM; started again after a failure.

The launcher reads the file first, so that a wrong config starts nothing. Then it runs torchrun, on every machine one,
whose ranks run `fledge run FILE`: a stage, or all stages of a recipe one after another. Each rank writes into

    OUT/logs/NAME/attempt-K/rank-R.log     what it said
    OUT/logs/NAME/attempt-K/rank-R.json    where it runs, and how it ended
    OUT/logs/NAME/attempt-K/node-N.*       what the launcher of machine N did, and torchrun's own words

which lies beside the runs, since one launch can be many of them and a run's folder may be moved aside.

Exit codes: those of `fledge run`. 75 (stopped by a signal, saved) is handed on, and never started again here: whoever
sent the signal wants the machines.
"""

import codecs
import contextlib
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.errors import InputError, Preempted, RunError

if TYPE_CHECKING:
    from fledge.recipe import Job

LOGS_VARIABLE, NODE_VARIABLE = "FLEDGE_LOGS", "FLEDGE_NODE"
POLL = 0.1  # seconds
GRACE = 30.0  # seconds that ranks have to end by themselves after Ctrl-C
# Wider than redact.NAME: a refusal by mistake costs an override, a name missed here stands in a file that stays.
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
SBATCH_OPTION = re.compile(r"[a-z][a-z-]*(=[A-Za-z0-9_.,:/@+%=-]+)?")
SBATCH_OURS = ("nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue", "open-mode", "job-name", "output")


@dataclass(frozen=True)
class Plan:
    """What is to be started."""

    file: str
    overrides: tuple[str, ...] = ()
    out: str | None = None
    procs: int = 1
    """Processes on each machine."""
    gpus: bool = False
    """Each process has a GPU of its own."""
    nodes: int = 1
    node: int = 0
    rdzv: str | None = None
    """HOST:PORT of the first machine."""
    rdzv_timeout: int = 300
    max_restarts: int = 0
    sbatch: tuple[str, ...] = ()
    only: str | None = None
    """Of a recipe, just this stage."""

    @property
    def world(self) -> int:
        return self.procs * self.nodes

    @property
    def work(self) -> list[str]:
        """What every rank runs, after `python -m`."""
        return ["fledge.cli", "run", self.file, *self.overrides, *self.where]

    @property
    def where(self) -> list[str]:
        return [*(["--out", self.out] if self.out else []), *(["--only", self.only] if self.only else [])]


def plan(args: Any) -> Plan:
    """The plan of a command line.

    Raises:
        InputError: the options do not go together, or ask for GPUs that are not here.
    """
    if args.gpus is not None and args.procs is not None:
        raise InputError("--gpus and --procs both say how many processes a machine runs; give one of them")
    if not args.slurm and args.nodes > 1 and args.rdzv is None:
        raise InputError("--nodes: several machines need --rdzv HOST:PORT, a name and a free port of the first of them")
    if args.slurm and args.gpus is None and args.procs is None:
        raise InputError("--slurm: say how many processes a machine runs: --gpus N, or --procs N without GPUs")
    if args.per_stage and (not args.slurm or args.only is not None):
        raise InputError("--per-stage: one job of SLURM's a stage; it goes with --slurm, and without --only")
    node = args.node_rank
    if node is None:
        node = 0 if args.nodes == 1 or args.slurm else int(os.environ.get("SLURM_NODEID", -1))
    if not 0 <= node < args.nodes:
        raise InputError(f"--node-rank: expected 0 to {args.nodes - 1}, another one on each machine")
    if args.rdzv is not None and not re.fullmatch(r"[\w.\-\[\]:]+:\d{1,5}", args.rdzv):
        raise InputError(f"--rdzv: expected HOST:PORT, such as node1:29400, not {args.rdzv!r}")
    for option in args.sbatch:
        if not SBATCH_OPTION.fullmatch(option) or option.partition("=")[0] in SBATCH_OURS:
            raise InputError(
                f"--sbatch: expected NAME or NAME=VALUE without spaces, and none of {SBATCH_OURS}; not {option!r}"
            )
    here = _gpus_here() if not args.slurm and args.procs is None else 0
    if args.gpus is not None and not args.slurm and args.gpus > here:
        raise InputError(f"--gpus {args.gpus}: this machine has {here}; --procs N starts processes without GPUs")
    wish = args.gpus or args.procs or here or 1
    return Plan(
        args.file,
        tuple(args.overrides),
        args.out,
        procs=wish,
        gpus=args.gpus is not None or here > 0,
        nodes=args.nodes,
        node=node,
        rdzv=args.rdzv,
        rdzv_timeout=args.rdzv_timeout,
        max_restarts=args.max_restarts,
        sbatch=tuple(args.sbatch),
        only=args.only,
    )


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def main(args: Any) -> int:
    """The command `fledge launch`: an exit code.

    Raises:
        InputError: the options or the file are wrong; nothing was started.
        RunError: the machines did not meet, or sbatch failed.
    """
    from fledge import recipe

    wish = plan(args)
    job = recipe.load(wish.file, wish.overrides, wish.out)
    if not job.is_recipe and (wish.only is not None or args.per_stage):
        raise InputError(f"{wish.file} is one stage; --only and --per-stage are for recipes")
    name = job.stages[0].name if not job.is_recipe else re.sub(r"[^A-Za-z0-9._-]", "-", Path(wish.file).stem)
    if args.per_stage:
        return _slurm_stages(wish, job, name, args.dry_run)
    if wish.only is not None:
        job, name = replace(job, stages=[recipe.stage_of(job, wish.only)]), f"{name}-{wish.only}"
    logs = job.out / "logs" / name
    if args.slurm:
        _slurm(wish, name, logs, [], args.dry_run)
        return 0
    if args.dry_run:
        print(shlex.join(torchrun(wish, f"{name}-0")))
        return 0
    return Launcher(wish, job, name, logs).run()


# ------------------------------------------------------------------------------------------------------- torchrun


def torchrun(wish: Plan, name: str) -> list[str]:
    """The command of one machine. Restarts are ours: torchrun's would count also those that made progress."""
    if wish.nodes == 1:
        meet = ["--standalone"]
    else:
        conf = {"is_host": str(wish.node == 0).lower()}
        conf |= dict.fromkeys(("join_timeout", "read_timeout"), str(wish.rdzv_timeout))
        meet = [
            f"--nnodes={wish.nodes}",
            f"--node-rank={wish.node}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={wish.rdzv}",
            f"--rdzv-id={name}",
            "--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in conf.items()),
        ]
        meet += [f"--local-addr={address}"] if (address := own_address(wish)) else []
    start = [sys.executable, "-m", "torch.distributed.run", *meet, f"--nproc-per-node={wish.procs}", "--max-restarts=0"]
    return [*start, "-m", *wish.work]


def own_address(wish: Plan) -> str | None:
    """The address that other machines reach this one by, or None.

    torchrun alone would tell them this machine's own name, which on Debian, for one, may stand for 127.0.1.1.
    """
    host, _, port = (wish.rdzv or "").rpartition(":")
    if wish.node == 0:
        return host.strip("[]")  # they come here by it
    with contextlib.suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing: only asks which way it would go
            return probe.getsockname()[0]


class Launcher:
    """Attempts until one ends well, is told to stop, or no longer gets further."""

    def __init__(self, wish: Plan, job: "Job", name: str, logs: Path) -> None:
        self.wish, self.job, self.name, self.logs = wish, job, name, logs
        self.asked: int | None = None  # the signal to hand on to the ranks

    def run(self) -> int:
        with self._listening():
            tries, stuck = 0, 0
            while True:
                before = progress(self.job)
                code = self.attempt(tries)
                if code in (0, 2, 130, Preempted.CODE):
                    return code
                stuck = stalled(stuck, before, progress(self.job))
                if self.wish.max_restarts == 0 or stuck > self.wish.max_restarts:
                    return code
                if self.asked is not None:  # it would be started again, but not now
                    return Preempted.CODE
                tries += 1
                again = f"restart {tries}" + (
                    f", {stuck} of {self.wish.max_restarts} without progress" if stuck else ""
                )
                say(again)
                if self.wish.node:
                    time.sleep(5)  # the first machine opens the new rendezvous

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM, SIGUSR2 and Ctrl-C are handed on to the ranks, which know what to do."""

        def handle(number: int, frame: Any) -> None:
            self.asked = number if number == signal.SIGINT else self.asked or number

        before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def attempt(self, tries: int) -> int:
        """Run torchrun once; the exit code of this machine's ranks."""
        from fledge.distributed import WORLD_VARIABLE

        folder = claim(self.logs, self.wish.node, {"nodes": self.wish.nodes, "procs": self.wish.procs, "tries": tries})
        log = folder / f"node-{self.wish.node}.log"
        environment = os.environ | {
            WORLD_VARIABLE: str(self.wish.world),
            LOGS_VARIABLE: str(folder.absolute()),
            NODE_VARIABLE: str(self.wish.node),
        }
        say(f"{self.wish.world} process{'es' if self.wish.world > 1 else ''}, logs in {folder}")
        line, theirs = socket.socketpair()
        with line, theirs, log.open("wb") as words:
            # Blocked signals are inherited: torchrun must not die of one that is sent to a whole job, and a rank that
            # gets one before it listens finds it pending.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
            try:
                process = subprocess.Popen(
                    torchrun(self.wish, f"{self.name}-{tries}"),
                    env=environment, stdin=theirs.fileno(), stdout=words, stderr=words, start_new_session=True,
                )  # fmt: skip
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            self._watch(process, folder)
            self._hang_up(line, folder)
        return self._outcome(process.returncode, folder, log.read_text(errors="replace"))

    def _hang_up(self, line: socket.socket, folder: Path) -> None:
        """End the ranks that torchrun left behind because it was killed itself, and wait until they are gone: the next
        attempt writes into the same folders. See `hold_the_line`."""
        with contextlib.suppress(OSError):  # they are gone already
            line.shutdown(socket.SHUT_WR)
        line.settimeout(GRACE)
        try:
            line.recv(1)  # nobody writes: it returns when the last of them has ended
        except TimeoutError:
            for record in self._mine(folder):
                if "code" not in record:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(record["pid"], signal.SIGKILL)

    def _mine(self, folder: Path) -> list[dict[str, Any]]:
        """What this machine's ranks have noted."""
        return [record for record in records(folder) if record["node"] == self.wish.node]

    def _watch(self, process: subprocess.Popen, folder: Path) -> None:
        """Until torchrun has ended: show what rank 0 says, hand signals on."""
        told: set[tuple[int, int]] = set()
        patience = 0.0
        with Follow(folder / "rank-0.log", show=self.wish.node == 0) as follow:
            while process.poll() is None:
                time.sleep(POLL)
                follow.more()
                if self.asked is not None:
                    self._hand_on(folder, told)
                if self.asked == signal.SIGINT:
                    patience += POLL
                    if GRACE <= patience < GRACE + POLL:
                        process.terminate()  # torchrun ends its ranks, the hard way if need be
            follow.more()

    def _hand_on(self, folder: Path, told: set[tuple[int, int]]) -> None:
        """Send what was asked to this machine's ranks, once to each, also to those that start later."""
        assert self.asked is not None
        number = signal.SIGINT if self.asked == signal.SIGINT else signal.SIGUSR2
        if sum(one == number for _, one in told) == self.wish.procs:
            return  # a thousand notes on a shared disk are not read for nothing
        for record in self._mine(folder):
            once = (record["pid"], number)
            if "code" not in record and once not in told:
                told.add(once)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record["pid"], number)

    def _outcome(self, code: int, folder: Path, words: str) -> int:
        """What this machine's attempt came to; a failure is told, with the words of the rank that failed first."""
        if code == 0:
            return 0
        mine = self._mine(folder)
        codes = {record.get("code") for record in mine}
        if len(mine) == self.wish.procs and codes <= {0, Preempted.CODE}:
            return Preempted.CODE
        if self.asked == signal.SIGINT:
            return 130
        if self.asked is not None and Preempted.CODE in codes and codes <= {0, Preempted.CODE, None}:
            return Preempted.CODE  # a rank without a code waited for one that had left, and was ended
        if not mine:
            raise RunError(_not_met(self.wish, words, folder / f"node-{self.wish.node}.log"))
        if code < 0:
            killed = f"torchrun was killed by {signal.Signals(-code).name}, and its ranks were ended"
            print(f"launch: {killed}", file=sys.stderr, flush=True)
            return 1
        first = first_failure(records(folder), words)
        print(explain(first, folder, self.wish.world), file=sys.stderr, flush=True)
        return first.code if first.code in (2, 130) else 1


def say(text: str) -> None:
    print(f"launch: {text}", flush=True)


def _not_met(wish: Plan, words: str, log: Path) -> str:
    if wish.nodes > 1 and re.search(r"Rendezvous\w*Error|DistNetworkError|DistStoreError|timed? ?out", words):
        return (
            f"{wish.nodes} machines did not meet at {wish.rdzv} within {wish.rdzv_timeout} s. Is the launch running on "
            "every one of them, each with its own --node-rank, and can all of them reach that host and port? "
            f"torchrun's own words: {log}"
        )
    return f"torchrun ended before a rank had started:\n{ending(words)}\nall of it: {log}"


# ------------------------------------------------------------------------------------------------------- progress


def progress(job: "Job") -> dict[str, int]:
    """How far each stage has come: the step of its newest checkpoint, and one more once its artifact is there."""
    far = {}
    for stage in job.stages:
        names = [path.name[5:] for path in stage.dir.glob("checkpoints/step_*")]
        step = max((int(name) for name in names if name.isdigit()), default=-1)
        far[stage.name] = step + (stage.dir / "artifact" / "manifest.json").exists()
    return far


def _moved(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    return any(after[name] > before[name] for name in before)


def stalled(count: int, before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Failures in a row without progress: one more, or none if some stage has got further."""
    return 0 if _moved(before, after) else count + 1


# ------------------------------------------------------------------------------------------------------------ logs


def claim(logs: Path, node: int, what: Mapping[str, Any]) -> Path:
    """This machine's folder of a new attempt. Machines that share the disk and fail together count alike."""
    from fledge.track import environment, write_json

    numbers = [int(path.parent.name[8:]) for path in logs.glob(f"attempt-*/node-{node}.json")]
    folder = logs / f"attempt-{max(numbers, default=0) + 1}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        here = {"host": socket.gethostname(), "started": time.time(), **what, **environment()}
        write_json(folder / f"node-{node}.json", here)
    except OSError as error:
        raise InputError(f"--out: cannot write to {folder}: {error.strerror}; choose another folder") from error
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of an attempt have noted, in the order of ranks."""
    from fledge.track import read_json

    found = [read_json(path, {}) for path in folder.glob("rank-*.json")]
    return sorted(found, key=lambda record: record["rank"])


@dataclass(frozen=True)
class Failure:
    rank: int
    code: int
    """Negative: the signal that killed it."""


def first_failure(ranks: Sequence[Mapping[str, Any]], words: str) -> Failure:
    """Which rank failed first. One that was killed leaves no note, but torchrun names it as the root cause; all other
    errors are then its consequences."""
    root = re.search(r"Root Cause.*?rank\s*: (\d+)[^\n]*\s*exitcode\s*: (-\d+)", words, re.DOTALL)
    if root:
        return Failure(int(root[1]), int(root[2]))
    failed = [record for record in ranks if record.get("code") not in (None, 0, Preempted.CODE)]
    if failed:
        first = min(failed, key=lambda record: record["ended"])
        return Failure(first["rank"], first["code"])
    return Failure(next((record["rank"] for record in ranks if "code" not in record), 0), 1)


def explain(failure: Failure, folder: Path, world: int) -> str:
    """The failure in words, with the end of its log."""
    log = folder / f"rank-{failure.rank}.log"
    how = f"ended with code {failure.code}"
    if failure.code < 0:
        name = signal.Signals(-failure.code).name
        how = f"was killed by {name}" + (" (often: no memory left)" if name == "SIGKILL" else "")
    said = ending(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else "(it said nothing)"
    return f"launch: rank {failure.rank} of {world} failed first: it {how}. The end of {log}:\n{said}"


def ending(text: str, most: int = 60) -> str:
    """The last lines; from the first traceback on, if there is one among them."""
    lines = text.rstrip().splitlines()[-most:]
    begins = next((i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")), None)
    return "\n".join(lines[begins:] if begins is not None else lines[-20:])


class Follow:
    """Copy what is appended to a file to this process's output."""

    def __init__(self, path: Path, show: bool) -> None:
        self.path, self.show, self.at = path, show, 0
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def __enter__(self) -> "Follow":
        return self

    def __exit__(self, *error: object) -> None:
        self.more()

    def more(self) -> None:
        if not self.show or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            text = file.read()
        self.at += len(text)
        if text:
            sys.stdout.write(self.decode(text))
            sys.stdout.flush()


# -------------------------------------------------------------------------------------------------------- one rank


def as_rank(work: Callable[[], int]) -> int:
    """Do `work` as a rank of a launch: its words go into its log, and how it ends into a note beside it."""
    import faulthandler

    from fledge.track import write_json

    rank, folder = int(os.environ.get("RANK", "0")), Path(os.environ[LOGS_VARIABLE])
    handle = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    sys.stdout.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    hold_the_line()
    note = {"rank": rank, "node": int(os.environ.get(NODE_VARIABLE, "0")), "host": socket.gethostname()}
    note |= {"pid": os.getpid(), "started": time.time()}
    write_json(folder / f"rank-{rank}.json", note)
    try:
        code = work()
    except Exception:  # noqa: BLE001  (whatever it is: told in the log, and the note says who was first)
        note["ended"] = time.time()
        traceback.print_exc()
        code = 1
    write_json(folder / f"rank-{rank}.json", {"ended": time.time(), **note, "code": code})
    return code


def hold_the_line() -> None:
    """End this rank when its launcher is gone, even if that was killed: else it would train on, unseen, while somebody
    starts the same run again. The launcher holds the other end of the socket that is standard input here; nothing is
    ever sent."""
    if not stat.S_ISSOCK(os.fstat(0).st_mode):
        return
    line, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.register_at_fork(after_in_child=lambda: os.close(line))  # data workers end with their rank

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(line, 1)
        with contextlib.suppress(OSError):
            os.write(2, b"launch: the launcher is gone, and this rank with it\n")
        os._exit(1)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


# ----------------------------------------------------------------------------------------------------------- SLURM


def batch(wish: Plan, name: str, logs: Path) -> str:
    """The batch file: one launcher on each machine, which meet at the first; 75 puts the job back into the queue.

    Raises:
        InputError: the folder of the logs cannot be written into a batch file, or a secret would be.
    """
    output = str(logs.absolute() / "slurm-%j.log")
    if not re.fullmatch(r"[A-Za-z0-9_./+@=,-]+", str(logs.absolute())):
        raise InputError(f"--out: {logs.absolute()} has signs that sbatch would read in its own way; choose another")
    options = [f"job-name={name}", f"nodes={wish.nodes}", "ntasks-per-node=1"]
    options += [f"gpus-per-node={wish.procs}"] if wish.gpus else []
    options += ["signal=USR2@90", "requeue", "open-mode=append", f"output={output}", *wish.sbatch]
    many = ["--gpus" if wish.gpus else "--procs", str(wish.procs)]
    command = [sys.executable, "-m", "fledge.cli", "launch", wish.file, *wish.overrides, *many]
    command += wish.where
    command += ["--max-restarts", str(wish.max_restarts)]
    if wish.nodes > 1:
        command += ["--nodes", str(wish.nodes), "--rdzv-timeout", str(wish.rdzv_timeout)]
    meet = ' --rdzv "$head:$port"' if wish.nodes > 1 else ""
    text = "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{option}" for option in options),
            "",
            f"cd -- {shlex.quote(os.getcwd())} || exit 1",
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1',
            "head=${hosts%%$'\\n'*}",
            'if [ -z "$head" ]; then',
            '  echo "fledge: scontrol names no host of $SLURM_JOB_NODELIST" >&2',
            "  exit 1",
            "fi",
            "port=$((20000 + SLURM_JOB_ID % 20000))",
            f"srun {shlex.join(command)}{meet}",
            "code=$?",
            f'if [ "$code" -eq {Preempted.CODE} ]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )
    secrets = [key for key, value in os.environ.items() if SECRET.search(key) and len(value) >= 8 and value in text]
    if secrets:
        raise InputError(f"the value of ${secrets[0]} is part of the command; leave it to the environment")
    return text


def _slurm_stages(wish: Plan, job: "Job", name: str, dry_run: bool) -> int:
    """A job for each stage, which waits until those of its parents have ended well, requeued or not."""
    ids: dict[str, str] = {}
    for stage in job.stages:
        parents = dict.fromkeys(ids[wire.stage] for wire in stage.parents.values() if wire.stage is not None)
        after = [f"--dependency=afterok:{':'.join(parents)}", "--kill-on-invalid-dep=yes"] if parents else []
        own = f"{name}-{stage.name}"
        found = _slurm(replace(wish, only=stage.name), own, job.out / "logs" / own, after, dry_run)
        ids[stage.name] = found or f"<{stage.name}>"
    return 0


def _slurm(wish: Plan, name: str, logs: Path, options: Sequence[str], dry_run: bool) -> str:
    """Write the batch file and give it to sbatch: the job's number; a dry run prints both, and has none."""
    text = batch(wish, name, logs)
    if dry_run:
        print(text + (f"# sbatch {' '.join(options)}\n" if options else ""), end="")
        return ""
    from fledge.track import write_atomic

    path = logs / "job.sbatch"
    write_atomic(path, text)
    try:
        command = ["sbatch", "--parsable", *options, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(f"--slurm: there is no sbatch on this machine; the batch file is {path}") from None
    if done.returncode:
        raise RunError(f"sbatch did not take {path}: {done.stderr.strip()}")
    number = done.stdout.strip().partition(";")[0]  # NUMBER or NUMBER;CLUSTER
    say(f"submitted job {number} ({path})")
    return number

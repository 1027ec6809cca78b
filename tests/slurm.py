"""A real SLURM whose only node is this machine, from Debian's packages; no systemd, cgroups or accounting.

    python3 -m tests.slurm install     as root: apt-get install; starts no service
    python3 -m tests.slurm up DIR      start it; all it writes is below DIR; prints what to export
    python3 -m tests.slurm down DIR    cancel its jobs and end its daemons

Every command may be given again. It listens on ports and a socket of its own, so that it neither finds nor disturbs a
SLURM that is there already. Needs nothing but Python and root.
"""

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurm-client", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd")  # in the order in which they are started
PROGRAMS = (*DAEMONS, "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
PATIENCE = 60.0
CONFIG = """\
ClusterName=fledge
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Not only the life of a credential: also how long a requeued job waits before it may start again (default 120 s).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a SLURM of our own needs Linux and root"
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    return f"there is no {', '.join(lacking)} here: python3 -m tests.slurm install" if lacking else ""


def install() -> str:
    """Install what is lacking, without starting any service; why that was not possible, or nothing."""
    if not missing():
        return ""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("apt-get"):
        return "SLURM is installed by apt-get, as root, on Debian and what comes from it"
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_services():
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", "-qq", *command], env=quiet, capture_output=True, text=True)
            if done.returncode:
                return f"apt-get {shlex.join(command)}: {done.stderr.strip()[-500:]}"
    return missing()


@contextlib.contextmanager
def _no_services():
    """Debian's own switch: packages ask this program whether they may start their services."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


class Slurm:
    """One cluster, below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def up(self) -> "Slurm":
        """Start what does not run, and wait until the node takes jobs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not (self.folder / "slurm.conf").exists():
            self._configure()
        at = {name: self.folder / f"munge.{name}" for name in ("socket", "key", "pid", "log", "seed")}
        munged = ["--force", f"--socket={at['socket']}", f"--key-file={at['key']}", f"--pid-file={self._pid('munged')}"]
        munged += [f"--log-file={at['log']}", f"--seed-file={at['seed']}"]
        for name, options in zip(DAEMONS, (munged, [], []), strict=True):
            if not self.running(name):
                self._start(name, *options)
        self._until(lambda: self.ask("sinfo", "--noheader", "--format=%T") == "idle", "the node is not idle")
        return self

    def _configure(self) -> None:
        with contextlib.ExitStack() as stack:  # both at once, or they could be the same
            held = [stack.enter_context(socket.socket()) for _ in range(2)]
            for one in held:
                one.bind(("127.0.0.1", 0))
            ports = [one.getsockname()[1] for one in held]
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(folder=self.folder, host=host, ports=ports, cores=os.cpu_count())
        handle = os.open(self.folder / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        os.write(handle, secrets.token_bytes(1024))
        os.close(handle)
        (self.folder / "slurm.conf").write_text(text)

    def down(self) -> None:
        """Cancel all jobs, end the daemons in the reverse order; what they wrote stays."""
        if self.running("slurmctld"):
            self.ask("scancel", "--user=root")
            self._until(lambda: not self.ask("squeue", "--noheader", "--states=R,CG,S"), "its jobs do not end")
        for name in reversed(DAEMONS):
            self._end(name)

    def _end(self, name: str) -> None:
        pid = self.running(name)
        if not pid:
            return
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            self._until(lambda: not self.running(name), f"{name} does not end", 10)
            return
        os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> "Slurm":
        try:
            return self.up()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self.down()

    # -- talking to it

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints; nothing if it fails."""
        done = subprocess.run(
            _found(command), env=os.environ | self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(
            field.split("=", 1) for field in self.ask("scontrol", "show", "job", number).split() if "=" in field
        )

    def running(self, name: str) -> int:
        """The process of a daemon of ours; 0 if it does not run."""
        try:
            pid = int(self._pid(name).read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for one that has ended
        except (OSError, ValueError):
            return 0
        return pid if name.encode() in arguments else 0

    def _pid(self, name: str) -> Path:
        return self.folder / f"{name}.pid"

    def _start(self, *command: str) -> None:
        with (self.folder / "words").open("a") as words:  # not a pipe: a daemon would keep it open
            done = subprocess.run(
                _found(command), env=os.environ | self.environment, timeout=PATIENCE,
                stdin=subprocess.DEVNULL, stdout=words, stderr=words,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}; see {self.folder}/words and *.log")

    def _until(self, done, complaint: str, seconds: float = PATIENCE) -> None:
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() > until:
                raise TimeoutError(f"{complaint} after {seconds:g} s; see {self.folder}/*.log")
            time.sleep(0.1)


def _found(command: Sequence[str]) -> list[str]:
    program = shutil.which(command[0], path=PATH)
    assert program, f"there is no {command[0]}"
    return [program, *command[1:]]


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 1 with a reason."""
    top = argparse.ArgumentParser("python3 -m tests.slurm", description=(__doc__ or "").partition("\n")[0])
    top.add_argument("what", choices=["install", "up", "down"])
    top.add_argument("dir", nargs="?", type=Path, help="of up and down")
    args = top.parse_args(argv)
    if args.what != "install" and args.dir is None:
        top.error(f"{args.what} needs DIR")
    reason = install() if args.what == "install" else missing()
    if reason:
        print(f"no SLURM: {reason}", file=sys.stderr)
        return 1
    if args.what == "up":
        print(
            "\n".join(f"export {name}={shlex.quote(value)}" for name, value in Slurm(args.dir).up().environment.items())
        )
    if args.what == "down":
        Slurm(args.dir).down()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

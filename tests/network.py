"""Two machines on one: network namespaces joined by a cable, for tests."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A network namespace. Its only way out is ``interface``."""

    name: str
    interface: str
    address: str

    @property
    def inside(self) -> list[str]:
        """What stands before a command that is to run there."""
        return ["ip", "netns", "exec", self.name]


def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        return "network namespaces need Linux, root and iproute2's ip"
    name = f"fledge-{os.getpid()}-probe"
    done = _ip("netns", "add", name)
    if done.returncode == 0:
        done = _ip("-n", name, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
        _ip("netns", "delete", name)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Each with an address of its own in 10.213.57.0/24, which no other process of this machine sees."""
    pair = [Machine(f"fledge-{os.getpid()}-{i}", f"veth{i}", f"10.213.57.{i + 1}") for i in (0, 1)]
    first, second = pair
    try:
        for machine in pair:
            _must("netns", "add", machine.name)
        cable = [first.interface, "type", "veth", "peer", "name", second.interface, "netns", second.name]
        _must("-n", first.name, "link", "add", *cable)
        for machine in pair:
            _must("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", machine.interface)
            for link in ("lo", machine.interface):
                _must("-n", machine.name, "link", "set", link, "up")
        yield pair
    finally:
        for machine in pair:
            _ip("netns", "delete", machine.name)  # and the cable with it


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def _must(*words: str) -> None:
    done = _ip(*words)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")

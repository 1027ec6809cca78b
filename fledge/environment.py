"""Where a run is worked on: versions, cores, device, git. No environment variables and no arguments: they may hold
secrets.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

PACKAGES = ("fledge", "torch", "torchvision", "accelerate", "timm", "transformers", "trl", "peft", "tokenizers")
PACKAGES += ("safetensors", "numpy", "pillow", "pydantic", "wandb")


def environment() -> dict[str, Any]:
    """Versions, cores, device and git revision. No environment variables and no arguments: they may hold secrets."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": _device(),
        "git": _git(),
    }


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What could change bits between two environments: `torch 2.13.0 -> 2.14.0`, one text each."""
    old, new = ({**e.get("packages", {}), "python": e.get("python"), "device": e.get("device")} for e in (before, now))
    names = dict.fromkeys([*old, *new])
    return [f"{n} {old.get(n) or 'absent'} -> {new.get(n) or 'absent'}" for n in names if old.get(n) != new.get(n)]


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _device() -> str:
    torch = sys.modules.get("torch")  # whoever trains has imported it; nobody else should wait for it
    if torch is None:
        return "cpu"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return "mps" if torch.backends.mps.is_available() else f"cpu ({torch.get_num_threads()} threads)"


def _git() -> dict[str, Any] | None:
    """The revision of the working folder, and whether it had changes; None outside a repository."""

    def ask(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    revision = ask("rev-parse", "HEAD")
    return {"revision": revision, "changed": bool(ask("status", "--porcelain", "-uno"))} if revision else None

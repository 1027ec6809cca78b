"""A run folder as it lies on the disk, finished or not, and what the page derives from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fledge import svg
from fledge.evals.score import Score
from fledge.progress import clock
from fledge.track import figure, read_json, read_metrics


@dataclass
class View:
    """What a run's folder says."""

    dir: Path
    config: str = ""
    departures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{dotted key: {"value", "default"}}; empty where the run is of a version that did not write them."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    media: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> View:
        text = folder / "config.yaml"
        return cls(
            dir=folder,
            config=text.read_text(encoding="utf-8") if text.exists() else "",
            departures=read_json(folder / "departures.json", {}),
            metrics=read_metrics(folder / "metrics.jsonl"),
            status=read_json(folder / "status.json", {}),
            attempts=read_json(folder / "environment.json", {}).get("attempts", []),
            identity=read_json(folder / "identity.json", {}),
            manifest=read_json(folder / "artifact" / "manifest.json", {}),
            media=read_json(folder / "media" / "index.json", []),
        )

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def anchor(self) -> str:
        return f"run-{self.name}"

    @property
    def stage(self) -> str:
        return self.status.get("stage") or self.identity.get("stage") or self.manifest.get("stage") or ""

    @property
    def kind(self) -> str:
        return self.manifest.get("kind", "")

    @property
    def digest(self) -> str:
        return self.manifest.get("digest", "")

    @property
    def seconds(self) -> float:
        return float(self.status.get("seconds", 0.0))

    @property
    def measured(self) -> dict[str, Any]:
        """What the artifact says was measured, scores and all."""
        return self.manifest.get("metrics", {})

    @cached_property
    def scores(self) -> list[Score]:
        return [Score.from_dict(s) for s in self.measured.get("scores", [])]

    @cached_property
    def parents(self) -> dict[str, dict[str, Any]]:
        """Role -> what is known of the parent; an unfinished run knows the digests only."""
        return self.manifest.get("parents") or {
            role: {"digest": digest} for role, digest in self.identity.get("parents", {}).items()
        }

    def series(self, key: str) -> list[svg.Point]:
        """(step, value) where `key` was logged; null where it was not finite."""
        return [(r["step"], r[key]) for r in self.metrics if key in r]

    def known(self, key: str) -> list[float]:
        """The finite values of `key`."""
        return [y for _, y in self.series(key) if y is not None]

    def logged(self) -> list[str]:
        return [k for k in dict.fromkeys(k for r in self.metrics for k in r) if k not in ("step", "nonfinite")]

    def state(self) -> str:
        """finished in 1:10 · going on (step 40) · failed at step 312"""
        state, step = self.status.get("state", "not started"), self.status.get("step") or self._last()
        if state == "finished":
            return f"finished in {clock(self.seconds)}"
        return (
            f"{'not finished' if state in ('running', 'stopped') else state}, step {step}, {clock(self.seconds)} so far"
        )

    def _last(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @cached_property
    def health(self) -> dict[str, str]:
        """What the steps took and how they went, in words, by the names of `HEALTH`; only what was logged."""
        step, data = self.known("time/step"), self.known("time/data")
        found = {
            "step": duration(statistics.median(step)) if step else "",
            "speed": self._speed(),
            "data wait": f"{sum(data) / sum(step):.1%}" if sum(step) and data else "",
            "MFU": self._share("system/mfu"),
            "HFU": self._share("system/hfu"),
            "memory": f"{max(memory):.2f} GiB" if (memory := self.known("system/memory_gib")) else "",
            "gradient norm": self._norm(),
            "spikes": self._count("train/spikes"),
            "not finite": self._nonfinite(),
        }
        return {name: text for name, text in found.items() if text}

    def _speed(self) -> str:
        for unit in ("tokens", "rows"):
            if known := self.known(f"time/{unit}_per_second"):
                return f"{statistics.median(known):,.0f} {unit}/s"
        return ""

    def _share(self, key: str) -> str:
        known = self.known(key)
        return f"{statistics.median(known):.1%}" if known else ""

    def _norm(self) -> str:
        known = self.known("train/grad_norm")
        return f"{figure(statistics.median(known))}, most {figure(max(known))}" if known else ""

    def _count(self, key: str) -> str:
        known = self.known(key)
        return f"{known[-1]:.0f}" if known else ""

    def _nonfinite(self) -> str:
        """Steps that were not finite, and logged values that were not."""
        if not self.metrics:
            return ""
        steps, values = self._count("train/nonfinite") or "0", sum("nonfinite" in r for r in self.metrics)
        return steps + (f", and {values} logged step{'s' * (values != 1)} with gaps" if values else "")


HEALTH = {
    "step": "median time of a step",
    "speed": "median tokens or rows a second, of all ranks",
    "data wait": "share of the time that waited for data (for PPO: rolled out)",
    "MFU": "median share of the device's dense peak that the model's arithmetic used",
    "HFU": "the same with recomputed activations counted",
    "memory": "the most of one process: on a GPU what it had allocated, elsewhere its resident set",
    "gradient norm": "median, before clipping",
    "spikes": "steps whose loss or gradient norm lay more than 6 standard deviations above the 128 before",
    "not finite": "steps whose loss or gradient was not finite",
}
"""What `View.health` may say."""


def duration(seconds: float) -> str:
    """264 ms, 3.1 s"""
    return f"{seconds * 1000:,.3g} ms" if seconds < 0.9995 else f"{seconds:,.3g} s"


def runs_of(folder: Path) -> list[Path]:
    """The run folders in `folder` by the time they were started; runs that were set aside (NAME~1) are left out."""
    found = [p.parent for p in folder.glob("*/config.yaml") if "~" not in p.parent.name and p.parent.name[0] != "."]
    if not found and (folder / "config.yaml").exists():
        found = [folder]
    return sorted(found, key=lambda p: (read_json(p / "status.json", {}).get("started", 0.0), p.name))


def alike(views: Sequence[View]) -> list[list[View]]:
    """Runs of the same stage, where there are several of one."""
    groups: dict[str, list[View]] = {}
    for view in views:
        if view.stage:
            groups.setdefault(view.stage, []).append(view)
    return [group for group in groups.values() if len(group) > 1]

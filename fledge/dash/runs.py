"""The runs below a folder as the dashboard asks for them; a file is read again only when it has changed.

Nothing is kept that is not in the runs' own files, so what the page shows is metrics.jsonl as it stands: also after a
run went back to a checkpoint and dropped the steps behind it.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fledge import svg
from fledge.errors import InputError
from fledge.evals.score import Score
from fledge.records import read_json
from fledge.report import graph, page
from fledge.report.lineage import sources
from fledge.report.markup import digits
from fledge.report.view import View

DEEPEST = 6  # folders below the given one
MOST_POINTS = 500  # of one curve: a chart is not wider


class Curves:
    """A metrics.jsonl that may be growing."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.read = path, 0, 0
        self.points: dict[str, list[svg.Point]] = {}

    def follow(self) -> None:
        """Read what came since the last time, or everything if the run went back.

        Raises:
            InputError: a line is no record.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != self.file or now.st_size < self.read:  # going back replaces the file
                self.file, self.read, self.points = now.st_ino, 0, {}
            file.seek(self.read)
            data = file.read()
        whole = data.rfind(b"\n") + 1  # what follows is being written
        for line in data[:whole].splitlines():
            try:
                record = json.loads(line)
                step = record.pop("step")
            except (ValueError, KeyError, AttributeError):
                raise InputError(f"{self.path}: no record of a step: {line[:60]!r}") from None
            for key, value in record.items():
                if key != "nonfinite":
                    self.points.setdefault(key, []).append((step, value))
        self.read += whole

    def thinned(self) -> dict[str, Any]:
        """{key: {line: [[step, mean]], band: [[step, least, most]]}}, at most MOST_POINTS each."""
        found = {}
        for key, points in self.points.items():
            line, band = svg.thin(points, MOST_POINTS)
            found[key] = {"line": _short(line), "band": _short(band)}
        return found


def _short(rows: Any) -> list[list[float | None]]:
    """Six digits are more than a chart can show."""
    return [[None if value is None else float(f"{value:.6g}") for value in row] for row in rows]


class Runs:
    """All runs below a folder. Safe to ask from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, tuple[Any, Any]] = {}
        self._curves: dict[str, Curves] = {}
        self._lock = threading.Lock()

    def find(self) -> dict[str, Path]:
        """{place below the folder: the run's folder}, folder by folder. Runs that were set aside are left out."""
        found = {path.relative_to(self.folder).as_posix(): path for path in _runs_below(self.folder, DEEPEST)}
        ordered = sorted(found, key=lambda name: name.rpartition("/")[::2])
        return {self.folder.resolve().name if name == "." else name: found[name] for name in ordered}

    def listing(self) -> list[dict[str, Any]]:
        """What is known of each run, but for its curves."""
        with self._lock:
            return [self._about(name, path) for name, path in self.find().items()]

    def _about(self, name: str, path: Path) -> dict[str, Any]:
        status = self._json(path / "status.json", {})
        manifest = self._json(path / "artifact" / "manifest.json", {})
        identity = self._json(path / "identity.json", {})
        media = self._json(path / "media" / "index.json", [])
        folder, _, last = name.rpartition("/")
        return {
            "id": name,
            "name": last,
            "folder": folder,
            "group": status.get("group", ""),
            "stage": status.get("stage") or identity.get("stage", ""),
            "state": status.get("state", "not started"),
            "step": status.get("step"),
            "seconds": status.get("seconds", 0.0),
            "started": status.get("started", 0.0),
            "updated": status.get("updated", 0.0),
            "version": _stamp(path / "metrics.jsonl"),
            "digest": manifest.get("digest", ""),
            "scores": [_score(score) for score in manifest.get("metrics", {}).get("scores", [])],
            "media": [
                {"name": entry["name"], "kind": entry["kind"], "caption": entry["caption"], "version": stamp}
                for entry in media
                if (stamp := _stamp(path / "media" / entry["file"]))
            ],
        }

    def curves(self, run: str) -> dict[str, Any] | None:
        """{key: {line, band}}; None where there is no such run."""
        with self._lock:
            path = self.find().get(run)
            if path is None:
                return None
            curves = self._curves.setdefault(run, Curves(path / "metrics.jsonl"))
            curves.follow()
            return curves.thinned()

    def media(self, run: str, name: str) -> Path | None:
        """The file of a picture or table that the run itself has listed; no other file of any folder."""
        with self._lock:
            path = self.find().get(run)
            index = self._json(path / "media" / "index.json", []) if path is not None else []
        for entry in index:
            file = str(entry["file"])
            if path is not None and entry["name"] == name and file == Path(file).name:
                found = path / "media" / file
                return found if found.is_file() and not found.is_symlink() else None
        return None

    def page(self, run: str) -> str | None:
        """The report page of one run, as it stands now."""
        path = self.find().get(run)
        return None if path is None else page.page([View.read(path)], run)

    def lineage(self) -> str:
        """From pixels and text to the newest run, as SVG; a click leads to the run."""
        with self._lock:
            made = [(name, self._origin(name, path)) for name, path in self.find().items()]
        nodes: dict[str, graph.Node] = {}
        edges: list[tuple[str, str]] = []
        for name, origin in made:
            place = f"/run?id={quote(name, safe='')}"
            nodes.setdefault(origin["digest"], graph.Node(name, origin["below"], href=place))
        for _, origin in made:
            _ancestors(origin, nodes, edges)
        drawn = graph.draw(nodes, edges) if nodes else ""
        return re.sub(r' style="[^"]*"', "", drawn, count=1)  # the policy of the page allows no style in markup

    def _origin(self, name: str, path: Path) -> dict[str, Any]:
        """What a run's artifact says of its parents; before there is one, its identity knows their digests."""
        manifest = self._json(path / "artifact" / "manifest.json", None)
        if manifest is not None:
            scores = [_score(score) for score in manifest["metrics"].get("scores", [])]
            below = f"{scores[0]['metric']} {scores[0]['after']}" if scores else manifest["kind"]
            return {**manifest, "below": below}
        identity = self._json(path / "identity.json", {})
        parents = {
            role: {"digest": digest, "name": digest[:8], "kind": "", "stage": ""}
            for role, digest in identity.get("parents", {}).items()
        }
        state = self._json(path / "status.json", {}).get("state", "")
        return {"digest": name, "kind": "", "stage": identity.get("stage", ""), "parents": parents, "below": state}

    def _json(self, path: Path, default: Any) -> Any:
        stamp = _stamp(path)
        if stamp is None:
            return default
        if path not in self._read or self._read[path][0] != stamp:
            try:
                self._read[path] = stamp, read_json(path, default)
            except ValueError as error:
                raise InputError(f"{path}: cannot be read: {error}") from None
        return self._read[path][1]


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    """Run folders; what lies inside one (artifacts, checkpoints) is not looked at. Links are not followed."""
    if (folder / "config.yaml").is_file() and (folder / "identity.json").is_file():
        yield folder
    elif depth:
        with os.scandir(folder) as entries:
            inside = [e.name for e in entries if e.is_dir(follow_symlinks=False) and "~" not in e.name]
        for name in inside:
            if name[0] != ".":
                yield from _runs_below(folder / name, depth - 1)


def _stamp(path: Path) -> str | None:
    """Changes with the file; None where there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


def _score(found: dict[str, Any]) -> dict[str, Any]:
    """A score in words and figures as the report page has them."""
    score = Score.from_dict(found)
    show: Callable[[float | None], str] = digits(score.low, score.high)
    return {
        "metric": score.metric,
        "after": show(score.after),
        "interval": f"{show(score.low)} – {show(score.high)}",
        "before": show(score.before),
        "baseline": show(score.baseline),
        "baseline_name": score.baseline_name or "",
        "better": "higher" if score.higher_is_better else "lower",
        "n": f"{score.n:,} {score.unit}".strip(),
        "lacking": score.shortfall() or "",
    }


def _ancestors(child: dict[str, Any], nodes: dict[str, graph.Node], edges: list[tuple[str, str]]) -> None:
    """Add what `child` was raised from, down to its data; its manifest names them all."""
    parents = (child.get("parents") or {}).values()
    for parent in parents:
        nodes.setdefault(parent["digest"], graph.Node(parent["name"], parent["kind"], plain=True))
        edges.append((parent["digest"], child["digest"]))
        _ancestors(parent, nodes, edges)
    if not parents:
        for source in ["elsewhere"] if child.get("origin") else sources(child["kind"], child["stage"]):
            nodes.setdefault(source, graph.Node(source, source=True))
            edges.append((source, child["digest"]))

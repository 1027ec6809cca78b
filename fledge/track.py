"""What a run leaves behind while it works: its folder, its numbers, its pictures, and a line that says how far it is.

`metrics.jsonl` is the truth: one JSON object a line, flushed. wandb is told the same numbers where it can be reached
and never stands in the way. Only the main process writes; every method may be called on all of them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fledge.config import Config, bookkeeping, data_sections, departures, dump, science
from fledge.environment import changed_versions, environment
from fledge.errors import InputError, RunError
from fledge.progress import Progress
from fledge.records import encode, read_json, read_metrics, read_records, write_atomic, write_json
from fledge.wandb_sink import Wandb, wandb_mode

if TYPE_CHECKING:
    from PIL import Image

    from fledge.artifact import Artifact
    from fledge.checkpoint import Checkpoint
    from fledge.config import StageConfig
    from fledge.evals.score import Score

FORMAT = 1  # of a run's folder; one without a number is of the first
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class TrackConfig(Config):
    """Where the numbers go beside metrics.jsonl. Nothing here changes a result."""

    wandb: Literal["auto", "online", "offline", "off"] = bookkeeping("auto")
    """auto: online with a key (WANDB_API_KEY or netrc), offline without one. Never asks."""
    project: str = bookkeeping("fledge")
    """The wandb project."""
    group: str = bookkeeping("")
    """The wandb group; a recipe and a sweep set their own name."""
    tags: list[str] = bookkeeping([])
    """wandb tags."""
    label: str = bookkeeping("")
    """The name in wandb; by default the run's. A sweep puts its settings before it."""
    upload_weights: bool = bookkeeping(False)
    """Online: the weights of artifacts go to wandb too, not only manifest, model card and config."""


# --------------------------------------------------------------------------------------------------- identity


def identity(config: StageConfig, parents: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run this run: its science, its parents' digests by role, the content of its data. JSON."""
    data = {key: section.fingerprint() for key, section in data_sections(config).items()}
    found = {"stage": config.stage, "config": science(config), "parents": dict(parents), "data": data}
    if earlier := getattr(getattr(config, "train", None), "extend_from", None):
        from fledge import extend

        found["extends"] = extend.fingerprint(earlier, found)
    return found


def said(identity: Any) -> Any:
    """An identity without what is null: a field that came with a later version, and is off, makes no other run."""
    if isinstance(identity, dict):
        return {key: said(value) for key, value in identity.items() if value is not None}
    return [said(item) for item in identity] if isinstance(identity, list) else identity


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    write_json(folder / "identity.json", {"format": FORMAT, **identity})


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the run in `folder`, without the number of its format; None where there is none.

    Raises:
        InputError: it cannot be read, or another version of fledge with another format wrote it.
    """
    path = folder / "identity.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} exists and is no run of fledge: identity.json cannot be read ({error}); move it away, or choose "
            "another --out or name"
        ) from None
    found = found if isinstance(found, dict) else {}
    number = found.pop("format", 1)
    if number != FORMAT:
        raise InputError(
            f"run {folder} has format {number}; this version of fledge reads format {FORMAT}. Go on with the version "
            "that began it, or choose another --out or name"
        )
    return found


def hold(folder: Path) -> TextIO:
    """Keep others out of a run's folder until what this returns is closed, or the process ends.

    Raises:
        InputError: another process works there. Two would write into the same checkpoints and numbers.
    """
    file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115  (held for the whole run)
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such locks
        return file
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second run there", stacklevel=2)
            return file
        file.seek(0)
        who = file.read()
        file.close()
        raise InputError(
            f"{folder}: another process works on this run ({who or 'it does not say which'}); wait until it has ended, "
            "or stop it; or choose another --out or name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def set_aside(folder: Path) -> Path:
    """Rename a run's folder to the first free NAME~1, NAME~2 …; nothing is ever deleted."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}~{number}")).exists():
        number += 1
    os.rename(folder, kept)
    return kept


# -------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Export:
    """What a stage does instead of training: hand over, unmeasured, what a checkpoint holds."""

    checkpoint: Checkpoint
    target: Path
    """The artifact to write."""
    config: StageConfig
    """Of the run that the checkpoint is from; the stage itself works in a folder that is thrown away."""


_export: ContextVar[Export | None] = ContextVar("export", default=None)


@contextmanager
def exporting(export: Export) -> Iterator[None]:
    """Every run that is opened inside exports."""
    token = _export.set(export)
    try:
        yield
    finally:
        _export.reset(token)


class Run:
    """One stage's folder, OUT/NAME. Opened first thing in a stage's main; `publish` closes it.

    config.yaml  departures.json  metrics.jsonl  environment.json  status.json  wandb.json  best.json  media/
    checkpoints/  artifact/
    """

    def __init__(self, config: StageConfig, parents: Mapping[str, Artifact]):
        from fledge import distributed

        self.config, self.parents = config, dict(parents)
        self.name, self.dir = config.run_name, config.run_dir
        self.unit = "rows"
        self.main = distributed.is_main()
        self.export = _export.get()
        self.taken: dict[str, Any] | None = None
        """The checkpoint that is handed over, {step, of, why}, where that is not simply the last."""
        self._bar: Progress | None = None
        self._file: TextIO | None = None
        self._lock: TextIO | None = None
        self._wandb: Wandb | None = None
        self._status: dict[str, Any] = {}

    @classmethod
    def open(cls, config: StageConfig, parents: Mapping[str, Artifact] | None = None) -> Run:
        """Make the folder, or go on in it. Metrics that are there stay until `truncate` says where the run goes on."""
        run = cls(config, parents or {})
        if not NAME.fullmatch(run.name):
            raise InputError(f"name: {run.name!r}: expected a letter or digit, then letters, digits, dots, - and _")
        from fledge import distributed

        track: TrackConfig | None = getattr(config, "track", None)
        mode = wandb_mode(track.wandb) if track is not None else "off"
        topology = distributed.topology()
        # Nobody looks for checkpoints before it is settled whose they are.
        distributed.on_main(lambda: run._start(mode, topology))
        return run

    def _start(self, mode: str, topology: dict[str, Any]) -> None:
        me = json.loads(json.dumps(identity(self.config, {role: p.digest for role, p in self.parents.items()})))
        try:
            old = read_identity(self.dir)
            if old is not None and said(old) != said(me):
                with hold(self.dir):
                    kept = set_aside(self.dir)
                self.say(f"its config, data or parents changed; the earlier run is kept as {kept}")
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.dir)
            write_identity(self.dir, me)
            write_atomic(self.dir / "config.yaml", dump(self.config))
            write_json(self.dir / "departures.json", departures(self.config))
        except OSError as error:
            raise InputError(f"out: cannot write to {self.dir}: {error.strerror}; choose another folder") from error
        self._attempt(topology)
        _, whole = read_records(self.dir / "metrics.jsonl")
        self._open_metrics(whole)
        track = getattr(self.config, "track", None)
        if track is not None and mode != "off":
            self._wandb = Wandb(self.dir, track, self.name, self.say)
            self._wandb.start(mode, self.config.model_dump(mode="json"))

    def _attempt(self, topology: dict[str, Any]) -> None:
        """Note in environment.json and status.json that somebody started to work here, with what, where and when."""
        from fledge.launch import LOGS_VARIABLE

        now = time.time()
        attempts = read_json(self.dir / "environment.json", {"attempts": []})["attempts"]
        here: dict[str, Any] = {"started": now, **environment(), **topology}
        if logs := os.environ.get(LOGS_VARIABLE):  # of the ranks
            here["logs"] = logs
        here["bitwise"] = all(attempt.get("bitwise", True) for attempt in attempts)
        trained = attempts and any(self.dir.glob("checkpoints/step_*"))  # else there is nothing to go on from
        if trained and (others := changed_versions(attempts[-1], here)):
            self.say(
                f"goes on with other versions ({', '.join(others)}): close to an uninterrupted run, not bit for bit"
            )
            here |= {"bitwise": False, "changed": others}
        write_json(self.dir / "environment.json", {"attempts": [*attempts, here]})
        before = read_json(self.dir / "status.json", {})
        self._status = {"state": "running", "stage": self.config.stage, "started": before.get("started", now)}
        self._status |= {"updated": now, "seconds": before.get("seconds", 0.0), "step": before.get("step", 0)}
        self._status["group"] = getattr(getattr(self.config, "track", None), "group", "")
        self._clock = (time.monotonic(), self._status["seconds"])
        self._note()

    def _note(self, **changes: Any) -> None:
        began, before = self._clock
        self._status |= {"updated": time.time(), "seconds": round(before + time.monotonic() - began, 2)} | changes
        write_json(self.dir / "status.json", self._status)

    def note_engine(self, engine: str | None) -> None:
        """Note in this attempt of environment.json, and say, what really keeps the ranks' parameters together."""
        if not self.main:
            return
        path = self.dir / "environment.json"
        *before, here = read_json(path, {})["attempts"]
        write_json(path, {"attempts": [*before, {**here, "engine": engine}]})
        if engine is not None:
            self.say(f"{here['world_size']} processes, engine {engine}")

    @property
    def measures(self) -> bool:
        """Whether the stage measures what it hands over; an export does not."""
        return self.export is None

    def note_best(self, best: Mapping[str, Any] | None) -> None:
        """best.json says which checkpoint is the best so far. For people: a resumed run reads its checkpoint."""
        path = self.dir / "best.json"
        if not self.main or best is None and not path.exists():
            return
        if best is None:
            path.unlink()
        else:
            write_json(path, {**best, "checkpoint": f"checkpoints/step_{best['step']:08d}"})

    # -- numbers

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the numbers of `step`. The line is in the file when this returns.

        Raises:
            RunError: the disk does not take it.
        """
        if not self.main:
            return
        if self._file is None:
            raise ValueError(f"run {self.name} is closed")
        try:
            self._file.write(encode(step, values) + "\n")
            self._file.flush()
            if time.time() - self._status["updated"] > 5:
                self._note(step=int(step))
        except OSError as reason:
            raise RunError(
                f"the numbers of step {step} could not be written to {self.dir}: {reason}. The checkpoints are kept; "
                "make room or give write access and start the run again: it goes on from the last one"
            ) from reason
        if self._wandb is not None:
            self._wandb.send(step, values)

    def truncate(self, step: int, earlier: Path | None = None) -> None:
        """The run goes on at `step`: what was logged from there on happens again, so it is dropped.

        A run that begins where another one was has that one's numbers before `step`: `earlier` is its folder.
        """
        if not self.main:
            return
        path = self.dir / "metrics.jsonl"
        kept = [r for r in read_metrics((earlier or self.dir) / "metrics.jsonl") if r["step"] < step]
        self._close_metrics()
        write_atomic(path, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in kept))
        self._open_metrics()
        if self._wandb is not None:
            self._wandb.catch_up(kept)

    def _open_metrics(self, whole: int | None = None) -> None:
        """Open for appending; bytes after `whole` are a line that a kill tore."""
        path = self.dir / "metrics.jsonl"
        if whole is not None and path.exists():
            os.truncate(path, whole)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (held for the whole run)

    def _close_metrics(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    # -- words

    def progress(self, total: int, start: int = 0) -> Progress:
        """The line that says how far `total` steps are, begun at `start`; a stage says in `unit` what rows are."""
        self.finish_progress()
        self._bar = Progress(self.name, total, start, self.unit, show=self.main)
        return self._bar

    def say(self, text: str) -> None:
        """Print a sentence of this stage, once for all processes."""
        if not self.main:
            return
        line = f"{self.name}: {text}"
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    # -- pictures and samples

    def picture(self, name: str, image: Image.Image, caption: str = "") -> None:
        """Keep a picture under media/ for the report. The same name again replaces it."""
        if not self.main:
            return
        self._media(name, ".png", "picture", caption, lambda path: image.save(path, format="PNG"))
        if self._wandb is not None:
            self._wandb.media(name, lambda wandb: wandb.Image(image, caption=caption))

    def samples(self, name: str, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        """Keep a table of samples under media/: one dict a row, its keys the columns."""
        if not self.main:
            return
        table = [{str(k): _cell(v) for k, v in row.items()} for row in rows]
        text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self._media(name, ".json", "samples", caption, lambda path: path.write_text(text, encoding="utf-8"))
        if self._wandb is not None and table:
            columns = list(dict.fromkeys(k for row in table for k in row))
            data = [["" if row.get(k) is None else str(row[k]) for k in columns] for row in table]
            self._wandb.media(name, lambda wandb: wandb.Table(columns=columns, data=data))

    table = samples

    def _media(self, name: str, suffix: str, kind: str, caption: str, save: Callable[[Path], Any]) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"media name {name!r}: use letters, digits, dot, dash and underscore")
        folder = self.dir / "media"
        folder.mkdir(exist_ok=True)
        part = folder / f".{name}{suffix}.part"
        save(part)
        os.replace(part, folder / (name + suffix))
        entry = {"name": name, "file": name + suffix, "kind": kind, "caption": caption}
        index = read_json(folder / "index.json", [])
        known = any(old["file"] == entry["file"] for old in index)
        index = [entry if old["file"] == entry["file"] else old for old in index]
        write_json(folder / "index.json", index if known else [*index, entry])

    # -- the end

    def publish(
        self,
        kind: str,
        save: Callable[[Path], None],
        scores: Sequence[Score],
        *,
        architecture: dict,
        preprocessing: dict | None = None,
        data: dict | None = None,
        step: int | None = None,
        origin: dict | None = None,
        **metrics: Any,
    ) -> Artifact:
        """Write OUT/NAME/artifact, say the scores, and close the run. Every process gets the artifact."""
        from fledge import artifact, distributed

        path = self.export.target if self.export else self.dir / "artifact"
        config = self.export.config if self.export else self.config

        def hand_over() -> None:
            self.finish_progress()
            made = artifact.write(
                path, kind=kind, save=save, config=dump(config), parents=self.parents or None, origin=origin,
                architecture=architecture, step=self.taken["step"] if self.taken else step, seed=config.seed,
                checkpoint=self.taken,
                metrics={"scores": [s.to_dict() for s in scores], **metrics},
                preprocessing=preprocessing or {}, data=data or {},
            )  # fmt: skip
            for score in scores:
                self.say(sentence(score))
            if self._wandb is not None:
                self._wandb.summary({f"score/{s.metric}": s.after for s in scores})
                self._wandb.lineage(made, self.parents)
            self.close("finished", step=step)

        distributed.on_main(hand_over)
        return artifact.open(path, kind)

    def finish_progress(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self, state: str = "stopped", **status: Any) -> None:
        """Nothing more will be logged. A run that is never closed (killed) stays "running" in status.json."""
        self.finish_progress()
        if not self.main or self._file is None:
            return
        self._close_metrics()
        self._note(state=state, **status)
        if self._lock is not None:
            self._lock.close()
        if self._wandb is not None:
            self._wandb.finish(failed=state == "failed")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close("failed" if isinstance(error, Exception) else "stopped")
        except OSError:
            if error is None:
                raise  # else a full disk, of which the error that ended the run has more to say


def sentence(score: Score) -> str:
    """A score in one line, with what it does not beat."""
    interval = f"[{figure(score.low)}, {figure(score.high)}]"
    parts = [f"{score.metric} {figure(score.after)} {interval} over {score.n} {score.unit}"]
    if score.before is not None:
        parts.append(f"before {figure(score.before)}")
    if score.baseline is not None:
        parts.append(f"{score.baseline_name or 'baseline'} {figure(score.baseline)}")
    if lacking := score.shortfall():
        parts.append(lacking.upper())
    return ", ".join(parts)


def figure(value: float | None) -> str:
    """A number as people read it: four significant digits, no noise."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2e}"


def _cell(value: Any) -> Any:
    """A value of a sample table as JSON."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    with suppress(TypeError, ValueError):
        number = float(value)
        return number if math.isfinite(number) else repr(number)
    return str(value)

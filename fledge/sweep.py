"""Sweeps: `--set key=value,value,…`, one run of a recipe or a stage for each combination of the values.

    fledge run demo --set clip.optim.lr=1e-3,2e-3 --set clip.seed=0,1

A stage lies in a folder that is named after the settings that reach it: its own, and those of what it is raised from.
One that none reaches lies where it lies without a sweep. So nothing is trained twice for two combinations, nor what an
earlier run of the recipe has finished:

    OUT/mae/                                     no setting reaches it
    OUT/clip.optim.lr-0.001_clip.seed-0/clip/

Every stage that has to run is a process of its own, so one that fails ends only what is raised from it.
"""

import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fledge import config as configs
from fledge import recipe
from fledge.errors import InputError, RunError
from fledge.recipe import Job, Stage

MOST = 100  # combinations: more is a slip of the hand
LONGEST = 120  # characters of a folder's name
POLL = 0.1  # seconds


@dataclass(frozen=True)
class Setting:
    """One `--set`."""

    key: str
    values: tuple[Any, ...]
    words: tuple[str, ...]
    """The values as parts of a folder's name."""


@dataclass(frozen=True)
class Combination:
    """One value of every setting, and the stages with it; some may belong to other combinations too."""

    values: tuple[str, ...]
    folder: Path
    stages: dict[str, Stage]


@dataclass(frozen=True)
class Sweep:
    """What a file and its settings ask for."""

    settings: list[Setting]
    combinations: list[Combination]
    job: Job
    """Every stage of every combination once, parents first; its name is that of its folder under `out`."""


# ------------------------------------------------------------------------------------------------ reading


def parse(text: str) -> Setting:
    """`optim.lr=1e-3,2e-3`: the values are YAML; commas inside brackets and quotes belong to a value.

    Raises:
        InputError: no key, no value, or a value twice.
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not all(key.split(".")):
        raise InputError(f"--set {text}: expected a key and its values, for example optim.lr=1e-3,2e-3")
    found = configs.parse(f"[{values}]", f"--set {text}").data
    exact = [json.dumps(value) for value in found]
    if not found:
        raise InputError(f"--set {text}: no value; expected at least one, for example {key}=1,2")
    if twice := next((value for value in exact if exact.count(value) > 1), None):
        raise InputError(f"--set {text}: the value {twice} stands there twice")
    words = [_word(value) for value in found]
    if len(set(words)) < len(words):  # such as [1, 2] and "1-2"
        words = [f"{word}-{_short(value)}" for word, value in zip(words, exact, strict=True)]
    return Setting(key, tuple(found), tuple(words))


def _word(value: Any) -> str:
    """A value as a part of a folder's name: 0.001, 1e30, 0.9-0.95."""
    text = json.dumps(value)
    if isinstance(value, (int, float)):
        return text.replace("+", "")
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "none"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def load(file: str | Path, sets: Sequence[str], overrides: Sequence[str] = (), out: str | Path | None = None) -> Sweep:
    """Read the file once for each combination; every one of them is valid when this returns, and nothing has run.

    Raises:
        InputError: a key, a value or their number is wrong.
    """
    settings = [parse(text) for text in sets]
    _refuse(settings, overrides)
    combinations, stages, last = [], {}, None
    for picks in itertools.product(*(range(len(setting.values)) for setting in settings)):
        chosen = list(zip(settings, picks, strict=True))
        texts = [f"{setting.key}={json.dumps(setting.values[pick])}" for setting, pick in chosen]
        last = recipe.load(file, [*overrides, *texts], out)
        if last.is_recipe and (own := {"data", "title"} & {setting.key for setting in settings}):
            raise InputError(f"--set {own.pop()}: the same for the whole recipe, give it once, without --set")
        words = {setting.key: setting.words[pick] for setting, pick in chosen}
        placed = _placed(last, words, recipe.find(file).stem)
        values = tuple(json.dumps(setting.values[pick]) for setting, pick in chosen)
        combinations.append(Combination(values, last.out / _folder(words), placed))
        for stage in placed.values():
            stages.setdefault(stage.dir, stage)
    assert last is not None  # every setting has a value
    return Sweep(settings, combinations, Job(last.title, last.out, list(stages.values()), is_recipe=True))


def _refuse(settings: Sequence[Setting], overrides: Sequence[str]) -> None:
    keys = [setting.key for setting in settings]
    also = [text.partition("=")[0].strip() for text in overrides]
    for key in keys:
        if keys.count(key) > 1 or key in also:
            raise InputError(f"--set {key}: given twice; put all its values into one --set")
        if key in recipe.OWNED:
            raise InputError(f"--set {key}: says what and where a run is, no setting of it; leave it out")
    count = math.prod(len(setting.values) for setting in settings)
    if count > MOST:
        raise InputError(f"--set: {count} combinations, more than {MOST}; give fewer values, or several sweeps")


def _folder(words: Mapping[str, str]) -> str:
    """clip.optim.lr-0.001_seed-0; "" without settings."""
    text = "_".join(f"{key}-{word}" for key, word in words.items())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}-{_short(text)}"


def _placed(job: Job, words: Mapping[str, str], group: str) -> dict[str, Stage]:
    """The stages of one combination, each in the folder of the settings that reach it."""
    reach: dict[str, set[str]] = {}
    placed: dict[str, Stage] = {}
    for stage in job.stages:  # parents first
        raised_from = {role: wire.stage for role, wire in stage.parents.items() if wire.stage is not None}
        own = {key for key in words if not job.is_recipe or key == "seed" or key.partition(".")[0] == stage.name}
        reach[stage.name] = own.union(*(reach[parent] for parent in raised_from.values()))
        folder = _folder({key: word for key, word in words.items() if key in reach[stage.name]})
        name = f"{folder}/{stage.name}" if folder else stage.name
        change: dict[str, Any] = {"out": str(job.out / folder)}
        if raised_from:
            paths = {role: str(placed[parent].dir / "artifact") for role, parent in raised_from.items()}
            change["parents"] = stage.config.parents.model_copy(update=paths)  # type: ignore[attr-defined]
        if (track := getattr(stage.config, "track", None)) is not None:
            change["track"] = track.model_copy(update={"label": track.label or name, "group": track.group or group})
        wires = {
            role: wire._replace(stage=placed[raised_from[role]].name) if role in raised_from else wire
            for role, wire in stage.parents.items()
        }
        placed[stage.name] = Stage(name, stage.module, stage.config.model_copy(update=change), wires)
    return placed


def plan(sweep: Sweep) -> str:
    """For each stage of the sweep, once: run, resume or reuse, and why."""
    recipe.check(sweep.job.stages)
    count = f"{len(sweep.combinations)} combinations, {len(sweep.job.stages)} stages"
    return "\n".join([*recipe.plan_table(sweep.job), "", count])


# ------------------------------------------------------------------------------------------------ running


class Process(Protocol):
    """What is asked of a subprocess.Popen."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, sig: int, /) -> None: ...


Start = Callable[[Stage, int], Process]
"""Start a stage in the place 0 … jobs - 1."""


def run(sweep: Sweep, jobs: int = 1, fresh: bool = False) -> None:
    """Run what has to run, at most `jobs` stages at once, then say what each combination came to.

    Raises:
        InputError: data or parents are missing, or this is one of several ranks.
        RunError: stages failed; the others have run.
    """
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        raise InputError("--set starts processes of its own; run it without a launcher")
    stages = sweep.job.stages
    recipe.check(stages)
    decisions = recipe.decisions(sweep.job)
    done = {s.name for s, d in zip(stages, decisions, strict=True) if d.action == "reuse" and not fresh}
    recipe.say(f"{len(sweep.combinations)} combinations: {len(stages)} stages, {len(done)} of them finished before")
    failed = _all(stages, done, jobs, _starter(sweep.job.out / "logs" / "sweep", jobs, fresh))
    recipe.say("\n".join(["", *closing_table(sweep), ""]))
    for combination in sweep.combinations:
        recipe.say(f"report: {_report(combination, sweep.job.title)}")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(stages)} stages failed: {', '.join(failed)}. The same command tries them again, "
            "and what is raised from them"
        )


def _all(stages: Sequence[Stage], done: set[str], jobs: int, start: Start) -> list[str]:
    """Run all stages whose parents have finished until none is left; the names of those that failed."""
    waiting = [stage for stage in stages if stage.name not in done]
    running: dict[int, tuple[Stage, Process]] = {}
    failed: list[str] = []
    try:
        while True:
            for place in (place for place in range(jobs) if place not in running):
                stage = next((s for s in waiting if _parents(s) <= done), None)
                if stage is not None:
                    waiting.remove(stage)
                    running[place] = stage, start(stage, place)
            if not running:
                return failed
            time.sleep(POLL)
            for place, (stage, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[place]
                    if code == 0:
                        done.add(stage.name)
                    else:
                        failed.append(stage.name)
                    if jobs > 1:
                        recipe.say(f"{stage.name}: {'finished' if code == 0 else f'failed with exit code {code}'}")
    except (
        BaseException
    ) as reason:  # Ctrl-C or a signal: the stages save what they save then, and nobody is left behind
        for _, process in running.values():
            process.send_signal(signal.SIGINT if isinstance(reason, KeyboardInterrupt) else signal.SIGTERM)
        for _, process in running.values():
            process.wait()
        raise


def _parents(stage: Stage) -> set[str]:
    return {wire.stage for wire in stage.parents.values() if wire.stage is not None}


def _starter(logs: Path, jobs: int, fresh: bool) -> Start:
    """`fledge run` of a stage's whole config; side by side they speak into logs."""
    from fledge.records import write_atomic

    def start(stage: Stage, place: int) -> Process:
        file = logs / f"{stage.name.replace('/', '_')}.yaml"
        write_atomic(file, configs.dump(stage.config))
        command = [sys.executable, "-m", "fledge.cli", "run", str(file), *(["--fresh"] if fresh else [])]
        if jobs == 1:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        recipe.say(f"{stage.name}: started, what it says is in {file.with_suffix('.log')}")
        with file.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | _share(place, jobs),
            )  # fmt: skip

    return start


def _share(place: int, jobs: int) -> dict[str, str]:
    """A process's part of the machine: its cores, and a GPU of its own where there are several."""
    import torch

    share = {}
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    if (count := torch.cuda.device_count()) > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        share["CUDA_VISIBLE_DEVICES"] = seen[place % len(seen)]
    return share


# ------------------------------------------------------------------------------------------------ afterwards


def closing_table(sweep: Sweep) -> list[str]:
    """One row a combination: its settings, and the first score of each stage that they reach."""
    folders = {name: {c.stages[name].dir for c in sweep.combinations} for name in sweep.combinations[0].stages}
    varying = [name for name, found in folders.items() if len(found) > 1] or list(folders)
    head = [setting.key for setting in sweep.settings]
    rows = [[*c.values, *(_outcome(c.stages[name]) for name in varying)] for c in sweep.combinations]
    return recipe.table([*head, *varying], rows)


def _outcome(stage: Stage) -> str:
    """accuracy 0.41 [0.37, 0.45]; or what became of it instead."""
    from fledge.evals.score import Score
    from fledge.records import read_json
    from fledge.track import figure

    manifest = read_json(stage.dir / "artifact" / "manifest.json", None)
    if manifest is None:
        return str(read_json(stage.dir / "status.json", {}).get("state", "not run"))
    scores = manifest["metrics"].get("scores") or []
    if not scores:
        return "finished"
    score = Score.from_dict(scores[0])
    return f"{score.metric} {figure(score.after)} [{figure(score.low)}, {figure(score.high)}]"


def _report(combination: Combination, title: str) -> Path:
    """The page of one combination, with what it shares."""
    from fledge import report

    found: Iterator[Path] = (stage.dir for stage in combination.stages.values())
    folders = [folder for folder in found if (folder / "identity.json").exists()]
    return report.write(folders, combination.folder / "report.html", f"{title}: {combination.folder.name}")

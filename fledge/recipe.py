"""Recipes: a YAML that names stages and which artifact feeds which; planned before, and run in, one process.

    stages:
      mae:  {stage: pretrain.mae, config: ../pretrain/mae_small.yaml, set: {optim.lr: 1e-3}}
      clip: {stage: align.clip, config: ../align/clip_small.yaml, parents: {image: mae, text: mlm}}

A run's identity is its science, its parents' digests and the content of its data. Equal identity: the run is gone on
with, or its artifact is reused; another one: the earlier run is moved aside and the stage runs anew. A stage's file and
a recipe go through the same `run_stage`.
"""

import gc
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fledge import config as configs
from fledge import preempt
from fledge.config import Config, StageConfig, Tree, dotted
from fledge.errors import InputError

if TYPE_CHECKING:
    from fledge.artifact import Artifact

PACKAGES = ("pretrain", "finetune", "align")  # the only places that a stage is imported from
SHIPPED = Path(__file__).resolve().parents[1] / "configs"
DATA_VARIABLE = "FLEDGE_DATA"
OWNED = ("stage", "name", "out")  # keys of a stage's config that the recipe itself decides


class Entry(Config):
    """One stage of a recipe."""

    stage: str
    """The module, such as pretrain.mae."""
    config: str | None = None
    """The stage's YAML, relative to the recipe."""
    set: dict[str, Any] = {}
    """Departures from that YAML: {section.key: value}."""
    parents: dict[str, str] = {}
    """{role: name of a stage of this recipe, or the folder of an artifact}."""


class Recipe(Config):
    """A recipe file."""

    title: str = ""
    """Headline of the report page."""
    data: str | None = None
    """The folder that $FLEDGE_DATA stands for in data paths, unless the environment or `data=DIR` says otherwise."""
    stages: dict[str, Entry]


class Wire(NamedTuple):
    """Where one parent of a stage comes from."""

    stage: str | None  # a stage of the same recipe
    folder: Path | None  # an artifact that exists already
    place: str


@dataclass
class Stage:
    """A stage, ready to run."""

    name: str
    module: ModuleType
    config: StageConfig
    parents: dict[str, Wire] = field(default_factory=dict)

    @property
    def dir(self) -> Path:
        return self.config.run_dir


@dataclass
class Job:
    """What a file asks for: the stages in the order in which they run."""

    title: str
    out: Path
    stages: list[Stage]
    is_recipe: bool


class Decision(NamedTuple):
    """What happens to one stage, and why."""

    action: Literal["run", "resume", "reuse"]
    why: str


# ------------------------------------------------------------------------------------------------ reading


def find(file: str | Path) -> Path:
    """The YAML that is meant: a path, or the bare name of a shipped recipe."""
    path = Path(file)
    if path.is_file():
        return path
    shipped = SHIPPED / "recipes" / f"{file}.yaml"
    if path.name == str(file) and not path.suffix and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in (SHIPPED / "recipes").glob("*.yaml"))
    near = configs.nearest(str(file), names)
    raise InputError(
        f"{file}: {'is a folder' if path.is_dir() else 'no such file'}; expected the YAML of a recipe or a stage, "
        f"or a shipped recipe's name ({', '.join(names) or 'none is installed'}){near}"
    )


def load(
    file: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    module: ModuleType | None = None,
) -> Job:
    """Read a recipe or a stage's YAML with its overrides; every error in one message, and nothing has run.

    Args:
        module: the stage that the file must be of; None: the file says it.
    """
    path = find(file)
    tree = configs.read(path)
    if "stages" in tree.data:
        if module is not None:
            raise InputError(f"{path} is a recipe, expected the config of one stage; run it by `fledge run {path}`")
        return _recipe(path, tree, overrides, out)
    if module is None:
        if "stage" not in tree.data:
            raise InputError(f"{path}:1: neither `stages:` (a recipe) nor `stage:` (a stage's config) is in this file")
        module = import_stage(tree.data["stage"], tree.place(("stage",)))
    texts = [_without_name(text, module.Config) for text in overrides]
    config = configs.load(module.Config, tree, [*texts, *([f"out={json.dumps(str(out))}"] if out is not None else [])])
    stage = Stage(config.run_name, module, config)
    stage.parents = {role: Wire(None, Path(path), "") for role, path in _given(config).items()}
    return Job(stage.name, Path(config.out), [stage], is_recipe=False)


def _given(config: StageConfig) -> dict[str, str]:
    """The parents that a config names: {role: path}."""
    section = getattr(config, "parents", None)
    return {role: path for role in configs.roles(type(config)) if (path := getattr(section, role))}


def _without_name(text: str, cls: type[Config]) -> str:
    """`mae.optim.lr=1` means `optim.lr=1` where the file is that one stage."""
    first, _, rest = text.partition(".")
    name = str(cls.model_fields["stage"].get_default()).rpartition(".")[2]
    return rest if first == name and first not in cls.model_fields and "=" in rest else text


def import_stage(name: Any, place: str) -> ModuleType:
    """The module of a stage. The one dynamic import of the house, and only from the stage packages."""
    package, _, rest = str(name).partition(".")
    if not isinstance(name, str) or package not in PACKAGES or not rest.isidentifier():
        hint = configs.nearest(str(name), known_stages())
        raise InputError(f"{place}  stage  {name!r} is no stage, expected a module of {', '.join(PACKAGES)}{hint}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # the stage is there, but something that it needs is not
        known = known_stages()
        hint = configs.nearest(name, known)
        raise InputError(f"{place}  stage  {name} does not exist, expected one of {', '.join(known)}{hint}") from None
    lacking = [part for part in ("Config", "main", "WRITES") if not hasattr(module, part)]
    if lacking:
        raise InputError(f"{place}  stage  {name} is no stage: it has no {' and no '.join(lacking)}")
    return module


def import_tool(name: str) -> ModuleType:
    """A module that lies beside the stages and is none, for a command that needs what they share: align.compare."""
    return importlib.import_module(name)


def known_stages() -> list[str]:
    """The stages that lie in the stage packages, read from their files: nothing is imported."""
    files = [file for package in PACKAGES for file in sorted((SHIPPED.parent / package).glob("[a-z]*.py"))]
    return [f"{file.parent.name}.{file.stem}" for file in files if "\nWRITES = " in file.read_text(encoding="utf-8")]


# ------------------------------------------------------------------------------------------------ a recipe's stages


def _recipe(path: Path, tree: Tree, overrides: Sequence[str], out: str | Path | None) -> Job:
    """Wire, import, merge and validate all stages of a recipe; collects the errors of all of them."""
    problems: list[str] = []
    own = [text for text in overrides if text.partition("=")[0].strip() in ("data", "title")]
    recipe = configs.load(Recipe, tree, own)
    for_stage: dict[str, list[str]] = {name: [] for name in recipe.stages}
    for text in overrides:
        name = text.partition("=")[0].strip().partition(".")[0]
        if text in own:
            continue
        if text.partition("=")[0].strip() == "seed":  # of every stage
            for stage, texts in for_stage.items():
                texts.append(f"{stage}.{text.strip()}")
        elif name in for_stage and "." in text.partition("=")[0]:
            for_stage[name].append(text)
        else:
            hint = configs.nearest(name, list(for_stage))
            problems.append(
                f"override {text}  {name}  no stage of this recipe, expected name.section.key=value "
                f"with a name of {', '.join(for_stage)}, or seed=value for all of them{hint}"
            )
    if not recipe.stages:
        problems.append(f"{tree.place(('stages',))}  stages  empty, expected {{name: {{stage: …, config: …}}}}")
    for name in recipe.stages:
        if not configs.RUN_NAME.fullmatch(name):
            at = tree.place(("stages", name))
            problems.append(
                f"{at}  stages.{name}  expected letters, digits, `.`, `-` and `_`: it names the run's folder"
            )
    _raise(problems)
    _place_data(recipe, any(text.partition("=")[0].strip() == "data" for text in own))

    wires: dict[str, dict[str, Wire]] = {}
    for name, entry in recipe.stages.items():
        try:
            wires[name] = _wires(name, entry, recipe, tree, for_stage[name])
        except InputError as error:
            problems.append(str(error))
    _raise(problems)
    order = _order(wires, tree)
    folder = Path(out) if out is not None else Path("runs") / path.stem

    stages: dict[str, Stage] = {}
    for name in order:
        entry, at = recipe.stages[name], ("stages", name)
        try:
            module = import_stage(entry.stage, tree.place((*at, "stage")))
            merged = _merge(name, entry, path, tree, folder, wires[name], module, for_stage[name], recipe)
            stage = Stage(name, module, configs.load(module.Config, merged))
            files = {role: Wire(None, Path(path), "") for role, path in _given(stage.config).items()}
            stage.parents = {role: wires[name].get(role, wire) for role, wire in files.items()}
            stages[name] = stage
        except InputError as error:
            problems.append(f"stage {name}: {error}")
    _raise(problems)
    for stage in stages.values():
        problems += _kind_problems(stage, stages)
    _raise(problems)
    return Job(recipe.title or path.stem, folder, [stages[name] for name in order], is_recipe=True)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))


def _place_data(recipe: Recipe, overridden: bool) -> None:
    """$FLEDGE_DATA: an override wins over the environment, which wins over the recipe."""
    if recipe.data is not None and (overridden or not os.environ.get(DATA_VARIABLE)):
        os.environ[DATA_VARIABLE] = str(configs.data_path(recipe.data).absolute())


def _wires(name: str, entry: Entry, recipe: Recipe, tree: Tree, overrides: list[str]) -> dict[str, Wire]:
    """Where each parent comes from: the recipe's `parents`, then overrides `name.parents.role=…` (null: nowhere)."""
    given = {role: (value, tree.place(("stages", name, "parents", role))) for role, value in entry.parents.items()}
    for text in list(overrides):
        key, _, value = text.partition("=")
        parts = key.strip().split(".")
        if len(parts) == 3 and parts[1] == "parents":
            overrides.remove(text)
            found = configs.parse(value, f"override {text}").data
            given[parts[2]] = ("" if found is None else str(found), f"override {text}")
    wires = {}
    for role, (value, place) in given.items():
        if value in recipe.stages or not value:
            wires[role] = Wire(value or None, None, place)
        elif configs.data_path(value).is_dir():
            wires[role] = Wire(None, configs.data_path(value), place)
        else:
            others = [other for other in recipe.stages if other != name]
            hint = configs.nearest(value, others)
            raise InputError(
                f"{place}  {name}.parents.{role}  {value!r} is neither a stage of this recipe nor a folder, "
                f"expected one of {', '.join(others) or '(no other stage)'}, or an artifact's folder{hint}"
            )
    return wires


def _order(wires: Mapping[str, Mapping[str, Wire]], tree: Tree) -> list[str]:
    """Names so that parents come first, otherwise as written."""
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise InputError(f"{tree.place(('stages', name))}  stages.{name}  its parents form a circle: {circle}")
        if name not in order:
            for wire in wires[name].values():
                if wire.stage is not None:
                    visit(wire.stage, (*path, name))
            order.append(name)

    for name in wires:
        visit(name, ())
    return order


def _merge(
    name: str,
    entry: Entry,
    path: Path,
    tree: Tree,
    out: Path,
    wires: Mapping[str, Wire],
    module: ModuleType,
    overrides: Sequence[str],
    recipe: Recipe,
) -> Tree:
    """The stage's YAML, then the recipe's `set`, then overrides, then what the recipe itself decides."""
    at = ("stages", name)
    merged = configs.read(path.parent / entry.config) if entry.config is not None else Tree({}, tree.place(at))
    if "stage" not in merged.data:
        merged.put(("stage",), entry.stage, tree.place((*at, "stage")))
    for key, value in entry.set.items():
        below = {place[4:]: text for place, text in tree.places.items() if place[:4] == (*at, "set", key)}
        parts = tuple(key.split("."))
        merged.put(parts, value, tree.place((*at, "set", key)), {(*parts, *rest): text for rest, text in below.items()})
    for text in overrides:
        configs.override(merged, text.partition(".")[2], place=f"override {text}")
    for key in OWNED:
        place = merged.place((key,))
        if key in entry.set or place.startswith("override "):
            merged.problems.append(f"{place}  {key}  is decided by the recipe (name of the stage, --out); leave it out")
    for role, wire in wires.items():
        source = out / wire.stage / "artifact" if wire.stage is not None else wire.folder
        merged.put(("parents", role), str(source) if source is not None else None, wire.place)
    merged.put(("name",), name, tree.place(at))
    merged.put(("out",), str(out), tree.place(at))
    track = module.Config.model_fields.get("track")
    if track is not None and not (merged.data.get("track") or {}).get("group"):
        merged.put(("track", "group"), recipe.title or path.stem, tree.place(at))
    return merged


def _kind_problems(stage: Stage, stages: Mapping[str, Stage]) -> list[str]:
    """Does every parent have the kind that the stage declares for its role?"""
    from fledge import artifact

    problems = []
    declared = configs.roles(type(stage.config))
    for role, wire in stage.parents.items():
        kinds = declared[role].kinds
        if wire.stage is not None:
            writes = stages[wire.stage].module.WRITES
            if writes not in kinds:
                problems.append(
                    f"{wire.place}  {stage.name}.parents.{role}  {wire.stage} writes a {writes}, "
                    f"expected a {' or '.join(kinds)}"
                )
        elif wire.folder is not None:
            try:
                artifact.open(wire.folder, kinds, role)
            except InputError as error:
                problems.append(f"{wire.place}  {stage.name}: {error}" if wire.place else str(error))
    return problems


def check(stages: Sequence[Stage]) -> None:
    """Look at all data and all given parents before anything runs."""
    problems = []
    for stage in stages:
        for key, section in configs.data_sections(stage.config).items():
            try:
                section.check()
            except InputError as error:
                problems.append(f"stage {stage.name}, {key}: {error}")
    _raise(problems)


# ------------------------------------------------------------------------------------------------ decisions


def identity(config: StageConfig, parents: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run this run, as plain JSON; `parents` are digests by role."""
    from fledge import track

    return json.loads(json.dumps(track.identity(config, parents)))


def decide(config: StageConfig, parents: Mapping[str, str | None], fresh: bool = False) -> Decision:
    """Run, resume or reuse, and why.

    Args:
        parents: digests by role; None where a parent has yet to run.

    Raises:
        InputError: the run's folder belongs to somebody else.
    """
    folder = config.run_dir
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return Decision("run", "not run yet")
    old = _read_identity(folder)
    if fresh:
        return Decision("run", "--fresh; the earlier run is moved aside")
    new = identity(config, {role: digest or "" for role, digest in parents.items()})
    unknown = [role for role, digest in parents.items() if digest is None]
    changed = [text for key, text in differences(old, new) if key not in [("parents", role) for role in unknown]]
    if changed:
        return Decision("run", "changed: " + "; ".join(changed))
    if unknown:
        return Decision("run", f"waits for parents.{', parents.'.join(unknown)}; reused if that ends as it was")
    state = _artifact_state(folder)
    if state is None:
        step = max((int(p.name[5:]) for p in folder.glob("checkpoints/step_*") if p.name[5:].isdigit()), default=None)
        return Decision("resume", f"from step {step}" if step is not None else "from the start: nothing was saved yet")
    if state:
        return Decision("resume", f"nothing changed, but {state}; that artifact is moved aside and written again")
    return Decision("reuse", "finished, and nothing changed since")


def _read_identity(folder: Path) -> dict[str, Any]:
    """The identity of the run that lies in `folder`."""
    from fledge import track

    old = track.read_identity(folder)
    if old is None:
        raise InputError(
            f"{folder} exists and is no run of fledge: it has no identity.json; move it away, or choose another --out "
            "or name"
        )
    return old


def _artifact_state(folder: Path) -> str | None:
    """None: no artifact yet; "": a whole one; else what is wrong with it."""
    from fledge import artifact

    if not (folder / "artifact" / "manifest.json").exists():
        return None
    try:
        artifact.open(folder / "artifact")
    except InputError as error:
        return str(error).partition(". ")[0]  # without the advice: here it is mended
    return ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key, words) of everything in which two identities differ."""
    names = {"config": "", "parents": "parent ", "data": "data "}
    before, after = dict(_flat(old)), dict(_flat(new))
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if a in (None, _ABSENT) and b in (None, _ABSENT):
            continue
        if a is _ABSENT or b is _ABSENT or a != b or type(a) is not type(b):
            inside = names.get(key[0])
            name = dotted(key) if inside is None else inside + dotted(key[1:])
            yield key, f"{name} {_words(a)} -> {_words(b)}"


_ABSENT = object()


def _flat(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, (*key, name))
    elif value != {} or not key:
        yield key, value


def _words(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_digest = len(text) >= 32 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_digest else text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------ plan


def decisions(job: Job) -> list[Decision]:
    """What `run` would do, as far as it can be known before."""
    known: dict[str, str | None] = {}  # digest of each stage's artifact, None while it has yet to run
    found = []
    for stage in job.stages:
        digests = {role: _digest(wire, known) for role, wire in stage.parents.items()}
        decision = decide(stage.config, digests)
        known[stage.name] = _open(stage.dir / "artifact").digest if decision.action == "reuse" else None
        found.append(decision)
    return found


def _digest(wire: Wire, known: Mapping[str, str | None]) -> str | None:
    return known[wire.stage] if wire.stage is not None else _open(wire.folder).digest


def _open(path: Any) -> "Artifact":
    from fledge import artifact

    return artifact.open(path)


def plan(file: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None) -> str:
    """The merged configs, and a table: for each stage run, resume or reuse, and why."""
    job = load(file, overrides, out)
    check(job.stages)
    merged = [f"# {stage.name}\n{configs.dump(stage.config)}" for stage in job.stages]
    return "\n".join([*merged, *plan_table(job)])


def plan_table(job: Job) -> list[str]:
    """A row for each stage: what would happen, and why."""
    rows = [
        [stage.name, stage.config.stage, _feeds(stage), decision.action, decision.why]
        for stage, decision in zip(job.stages, decisions(job), strict=True)
    ]
    return table(["name", "stage", "parents", "would", "why"], rows)


def _feeds(stage: Stage) -> str:
    return ", ".join(f"{role}: {wire.stage or wire.folder}" for role, wire in stage.parents.items()) or "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["─" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


# ------------------------------------------------------------------------------------------------ run


def run(
    file: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    only: str | None = None,
    fresh: bool = False,
    module: ModuleType | None = None,
) -> "dict[str, Artifact]":
    """Run a recipe or one stage; what is finished is reused, what was interrupted goes on. {name: artifact}"""
    job = load(file, overrides, out, module)
    stages = _only(job, only) if only is not None else job.stages
    check(stages)
    artifacts: dict[str, Artifact] = {}
    for number, stage in enumerate(stages, 1):
        preempt.leave_if_asked()
        say(f"── {stage.name}  ({stage.config.stage}, {number} of {len(stages)}) " + "─" * 20)
        artifacts[stage.name] = run_stage(stage.config, stage.module.main, fresh)
        gc.collect()  # a stage's model and batches are gone before the next one allocates
    if _is_main():
        say("\n".join(["", *closing_table(stages, artifacts), ""]))
        say(f"report: {_report(job, stages)}")
    return artifacts


def stage_of(job: Job, name: str) -> Stage:
    """Raises: InputError: there is no such stage."""
    names = [stage.name for stage in job.stages]
    if name not in names:
        raise InputError(f"--only {name}: expected one of {', '.join(names)}{configs.nearest(name, names)}")
    return job.stages[names.index(name)]


def _only(job: Job, name: str) -> list[Stage]:
    stage = stage_of(job, name)
    for role, wire in stage.parents.items():
        if wire.stage is not None and not (job.out / wire.stage / "artifact" / "manifest.json").exists():
            raise InputError(
                f"--only {name}: its parent {role} is the stage {wire.stage}, which has not finished in {job.out}; "
                "run that first, or leave --only out"
            )
    return [stage]


def run_stage(config: StageConfig, main: "Callable[[Any], Artifact]", fresh: bool = False) -> "Artifact":
    """Decide, move an outdated run aside, and run or reuse. Recipes and `python -m pretrain.mae` both end here."""
    from fledge import artifact

    if _several():
        from fledge import distributed

        section = getattr(config, "train", config)
        distributed.setup(getattr(section, "device", "auto"))
    decision = _on_main(lambda: _settle(config, fresh))
    say(f"{config.run_name}: {decision.action}: {decision.why}")
    if decision.action == "reuse":
        return artifact.open(config.run_dir / "artifact")
    return main(config)


def _settle(config: StageConfig, fresh: bool) -> Decision:
    """Decide, and make room for what was decided."""
    from fledge import artifact, track

    opened = artifact.open_parents(config)
    decision = decide(config, {role: parent.digest for role, parent in opened.items()}, fresh)
    folder = config.run_dir
    if decision.action == "run" and folder.exists() and any(folder.iterdir()):
        with track.hold(folder):
            kept = track.set_aside(folder)
        decision = decision._replace(why=f"{decision.why} (the earlier run is kept as {kept})")
    elif decision.action == "resume" and (folder / "artifact").exists():
        track.set_aside(folder / "artifact")
    return decision


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


def _is_main() -> bool:
    return not _several() or int(os.environ.get("RANK", "0") or 0) == 0


def _on_main(work: Callable[[], Any]) -> Any:
    """The result of `work` on rank 0, on every rank; its error likewise, so that nobody waits for ever."""
    if not _several():
        return work()
    from fledge import distributed

    return distributed.on_main(work)


def say(text: str) -> None:
    if _is_main():
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------ afterwards

COLUMNS = ("stage", "metric", "baseline", "before", "after", "95% interval", "n", "time", "artifact")


def closing_table(stages: Sequence[Stage], artifacts: "Mapping[str, Artifact]") -> list[str]:
    """What each stage reached, beside where it began and what needs no learning; what falls short is said below."""
    from fledge import track
    from fledge.evals.score import Score
    from fledge.progress import clock
    from fledge.track import figure

    rows, notes = [], []
    for stage in stages:
        artifact = artifacts[stage.name]
        seconds = track.read_json(stage.dir / "status.json", {}).get("seconds")
        ends = ["–" if seconds is None else clock(seconds), str(artifact.path)]
        scores = [Score.from_dict(score) for score in artifact.metrics.get("scores", [])]
        for i, score in enumerate(scores):
            baseline = figure(score.baseline) + (f" ({score.baseline_name})" if score.baseline_name else "")
            interval = f"[{figure(score.low)}, {figure(score.high)}]"
            count = f"{score.n} {score.unit}".strip()
            start = stage.name if i == 0 else ""
            figures = [score.metric, baseline, figure(score.before), figure(score.after), interval, count]
            rows.append([start, *figures, *(ends if i == 0 else ["", ""])])
            if lacking := score.shortfall():
                notes.append(f"! {stage.name}, {score.metric}: {lacking}")
        if not scores:
            rows.append([stage.name, "(not measured)", "–", "–", "–", "–", "–", *ends])
    return [*table(COLUMNS, rows), *notes]


def _report(job: Job, stages: Sequence[Stage]) -> Path:
    """The page of all runs of the job that exist, also where only one stage was asked for."""
    from fledge import report

    shown = job.stages if job.is_recipe else stages
    folders = [stage.dir for stage in shown if (stage.dir / "identity.json").exists()]
    path = job.out / "report.html" if job.is_recipe else stages[0].dir / "report.html"
    return report.write(folders, path, job.title)

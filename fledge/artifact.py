"""The hand-off: a folder that others load with none of our code, and that can name all its ancestors.

    artifact/{config.json, model.safetensors, tokenizer.json, …, README.md, config.yaml, manifest.json}

Weights and their config are in the ecosystem's own format. `manifest.json` is written last and holds kind,
architecture, step, seed, the sha256 of every file, parents by role (or the origin of an imported one), metrics,
preprocessing, data and versions. Parents are named by digest, with their own parents inside, so that the lineage
survives moving and deleting.
"""

import builtins
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fledge import files
from fledge.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fledge.config import StageConfig

FORMAT = 1
WEIGHTS = "model.safetensors"

# kind -> what its training data is called at the leaf of a lineage
KINDS = {
    "vision-encoder": "raw pixels",
    "text-encoder": "raw text",
    "causal-lm": "raw text",
    "image-classifier": "labelled pixels",
    "dual-encoder": "pixels with text",
    "chat-model": "prompts and answers",
    "reward-model": "preferences",
    "reward-ensemble": "preferences",
}
VERSIONS = ("fledge", "torch", "timm", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: when it was opened, every file was as it had been written."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.manifest["name"]

    @property
    def digest(self) -> str:
        """Content id: sha256 over the sorted table of files."""
        return self.manifest["digest"]

    @property
    def architecture(self) -> dict[str, Any]:
        return self.manifest["architecture"]

    @property
    def step(self) -> int | None:
        return self.manifest["step"]

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """{step, of, why} where it was written from another step than the last, or by an export."""
        return self.manifest.get("checkpoint")

    @property
    def seed(self) -> int | None:
        return self.manifest["seed"]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]

    @property
    def scores(self) -> list[dict[str, Any]]:
        return self.metrics.get("scores", [])

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self.manifest["preprocessing"]

    @property
    def data(self) -> dict[str, Any]:
        return self.manifest["data"]

    @property
    def parents(self) -> dict[str, dict[str, Any]]:
        """{role: {digest, kind, name, stage, step, data, origin, parents}}, all the way down."""
        return self.manifest["parents"]

    @property
    def origin(self) -> dict[str, Any] | None:
        """Where an imported artifact came from."""
        return self.manifest["origin"]

    def tensors(self, file: str = WEIGHTS) -> "dict[str, Tensor]":
        """The weights, on the CPU; of all shards where there is more than one."""
        from safetensors.torch import load_file

        index = self.path / f"{file}.index.json"
        if (self.path / file).is_file() or not index.is_file():
            return load_file(self.path / file)
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return {name: tensor for shard in sorted(shards) for name, tensor in load_file(self.path / shard).items()}


# ---- open ------------------------------------------------------------------------------------------------------------


def open(path: Path | str, kind: str | Sequence[str] | None = None, role: str = "") -> Artifact:
    """Open an artifact after checking format, kind and every byte; nothing is allocated before.

    Args:
        kind: the kind, or the kinds, that are wanted; any if None.
        role: what it is wanted for, such as "encoder", for the message.

    Raises:
        InputError: it is not there, not of this kind, of another format, or was changed after it was written.
    """
    path = Path(path)
    what = f"parents.{role}" if role else "artifact"
    _there(path, what)
    try:
        manifest = files.read_manifest(path, FORMAT, what)
        if manifest.get("kind") not in KINDS:
            raise InputError(f"{what} {path} is a {manifest.get('kind')!r}; expected one of {', '.join(KINDS)}")
        wanted = [kind] if isinstance(kind, str) else list(kind or KINDS)
        if manifest["kind"] not in wanted:
            hint = f"give the artifact of a stage that writes a {' or '.join(wanted)}"
            raise InputError(f"{what} {path} is a {manifest['kind']}, expected a {' or '.join(wanted)}; {hint}")
        found = files.faults(path, manifest)
        if found:
            raise files.Broken("; ".join(found))
    except files.Broken as broken:
        raise InputError(
            f"{what} {path}: {broken}. Restore the folder as it was written, or run its stage again with --fresh"
        ) from None
    return Artifact(path, manifest)


def _there(path: Path, what: str) -> None:
    if (path / files.MANIFEST).exists():
        return
    if (path / "artifact" / files.MANIFEST).exists():
        raise InputError(f"{what} {path} is a run's folder; give {path / 'artifact'}")
    if (path / "artifact").is_dir() or (path / "config.yaml").exists() and not (path / "README.md").exists():
        raise InputError(f"{what} {path}: this run has no finished artifact yet; run its stage to the end")
    if path.is_dir():
        raise InputError(
            f"{what} {path}: {files.MANIFEST} is missing; expected a folder that a fledge stage wrote. "
            "A timm or transformers folder becomes one by `fledge import KIND SOURCE DIR`"
        )
    state = "is a file" if path.exists() else "does not exist"
    raise InputError(f"{what} {path} {state}; expected the artifact folder of a stage, such as runs/NAME/artifact")


def open_parents(config: "StageConfig") -> dict[str, Artifact]:
    """The parents that a stage's config gives, by role, each of the kind that the stage declares."""
    from fledge.config import roles

    declared, section = roles(type(config)), getattr(config, "parents", None)
    given = {role: getattr(section, role) for role in declared}
    absent = [role for role, wanted in declared.items() if wanted.required and not given[role]]
    if absent:
        asked = [f"parents.{role} (a {' or '.join(declared[role].kinds)})" for role in absent]
        raise InputError(f"{config.stage} needs {' and '.join(asked)}; give the path of its artifact")
    return {role: open(path, declared[role].kinds, role) for role, path in given.items() if path}


# ---- write -----------------------------------------------------------------------------------------------------------


def write(
    path: Path | str,
    *,
    kind: str,
    save: Callable[[Path], None],
    config: str,
    architecture: dict[str, Any],
    parents: Mapping[str, Artifact] | None = None,
    origin: dict[str, Any] | None = None,
    step: int | None = None,
    seed: int | None = None,
    metrics: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> Artifact:
    """Publish an artifact, whole or not at all. No collectives: called on the main process alone.

    Args:
        save: writes weights, config and tokenizer into the folder that it is given.
        config: the resolved YAML of the stage; its `stage` and `name` are who made this.
        checkpoint: {step, of, why} where this is not simply the last step.

    Raises:
        InputError: `path` holds something that is not an artifact; it is left alone.
        RunError: the disk does not take it; an artifact that was there before is still there.
    """
    from fledge.config import parse

    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of artifact; expected one of {', '.join(KINDS)}")
    _refuse_to_destroy(path)
    made_by = parse(config, "config").data or {}
    stage = str(made_by.get("stage", ""))
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "stage": stage,
        "name": str(made_by.get("name") or stage.rpartition(".")[2] or path.name),
        "architecture": architecture,
        "step": step,
        "checkpoint": checkpoint,
        "seed": seed,
        "parents": {role: _record(parent.manifest) for role, parent in (parents or {}).items()},
        "origin": origin,
        "metrics": metrics or {},
        "preprocessing": preprocessing or {},
        "data": data or {},
        "loads_with": list(_loader(kind)),
        "versions": _versions(),
    }
    manifest = _plain(manifest)
    folder, older = files.aside(path, "tmp"), files.aside(path, "del")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sweep(path.parent, path.name)
        folder.mkdir()
        save(folder)
        _refuse_pickles(folder)
        (folder / "README.md").write_text(_card(manifest, folder), encoding="utf-8")
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        manifest = files.write_manifest(folder, manifest)
        if path.exists():
            files.move(path, older)
        files.move(folder, path)
        shutil.rmtree(older, ignore_errors=True)
    except (OSError, SafetensorError) as reason:
        if older.exists() and not path.exists():
            os.rename(older, path)
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(
            f"artifact {path} could not be written: {reason}. The run's checkpoints are untouched; make room or give "
            "write access and start the run again: only this is left to do"
        ) from reason
    except BaseException:  # also when the user interrupts
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Artifact(path, manifest)


def _plain(value: Any) -> Any:
    """As it will be read back: sorted keys, lists for tuples, null for what is not finite. Fails on anything else."""
    return json.loads(json.dumps(value, sort_keys=True), parse_constant=lambda _: None)


def _refuse_to_destroy(path: Path) -> None:
    """An older artifact is replaced; anything else that is in the way belongs to somebody."""
    if not path.exists() or path.is_dir() and not any(path.iterdir()):
        return
    try:
        manifest = files.read_manifest(path, FORMAT, "artifact")
        foreign = sorted(set(files.members(path)) - set(manifest["files"])) if manifest.get("kind") in KINDS else ["…"]
    except files.Broken:
        foreign = files.members(path) or ["…"]
    if foreign:
        named = ", ".join(foreign[:5])
        raise InputError(
            f"{path} exists and is not only an artifact (it has {named}); move it away, or write elsewhere"
        )


def _refuse_pickles(folder: Path) -> None:
    odd = [name for name in files.members(folder) if name.lower().endswith(files.PICKLES)]
    if odd:
        raise InputError(f"{', '.join(odd)} may hold pickled code, which no artifact does; save as .safetensors")


def _record(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a child keeps of its parent."""
    return {key: manifest[key] for key in ("digest", "kind", "name", "stage", "step", "data", "origin", "parents")}


def _versions() -> dict[str, str]:
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


# ---- load ------------------------------------------------------------------------------------------------------------


def load_state(
    module: "nn.Module",
    tensors: "Mapping[str, Tensor]",
    *,
    expect_missing: Iterable[str] = (),
    expect_unexpected: Iterable[str] = (),
    where: str = "",
) -> str:
    """Copy tensors into a module, strictly, and report.

    Args:
        expect_missing: tensors of the module that may keep their initial values; names or patterns such as `head.*`.
        expect_unexpected: given tensors that may be left over; likewise.

    Returns:
        A sentence such as "runs/mae/artifact: loaded 150 of 152 tensors; not given: head.bias, head.weight".

    Raises:
        InputError: a tensor is missing, left over, or has another shape; nothing has been loaded then.
    """
    import torch

    aliases: dict[int, list[str]] = {}  # tied tensors have several names, and any one of them will do
    own = module.state_dict(keep_vars=True)
    for name, tensor in own.items():
        aliases.setdefault(id(tensor), []).append(name)
    lacking = [names[0] for names in aliases.values() if not any(name in tensors for name in names)]
    left = [name for name in tensors if name not in own]
    given = {name: tensor for name, tensor in tensors.items() if name in own}
    problems = [f"{name} is missing" for name in _unnamed(lacking, expect_missing)]
    problems += [f"{name} is left over" for name in _unnamed(left, expect_unexpected)]
    problems += [
        f"{name} has shape {list(tensor.shape)}, expected {list(own[name].shape)}"
        for name, tensor in given.items()
        if tensor.shape != own[name].shape
    ]
    for names in aliases.values():
        first, *others = [name for name in names if name in given] or [""]
        differ = [name for name in others if not given[first].equal(given[name])]
        problems += [f"{first} and {name} are tied but differ" for name in differ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(
            f"{where or 'the weights'} do not fit {type(module).__name__}: {'; '.join(problems[:10])}{more}. "
            "Give weights of the same architecture and sizes"
        )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
    report = f"loaded {len(aliases) - len(lacking)} of {len(aliases)} tensors"
    report += f"; not given: {', '.join(sorted(lacking))}" if lacking else ""
    report += f"; not used: {', '.join(sorted(left))}" if left else ""
    return f"{where}: {report}" if where else report


def _unnamed(names: list[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_digest(folder: Path | str) -> str:
    """sha256 over what `tokenizer.json` says, without padding and truncation: using a tokenizer changes those two."""
    path = Path(folder) / "tokenizer.json"
    try:
        with builtins.open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected the tokenizer.json of a fast tokenizer") from None
    content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(files.canonical(content).encode()).hexdigest()


def same_tokenizer(a: Artifact, b: Artifact) -> None:
    """InputError unless both artifacts were made with one tokenizer."""
    first, second = _tokenizer_of(a), _tokenizer_of(b)
    if first is None or first != second:
        raise InputError(
            f"{a.path} ({a.kind}, tokenizer {files.short(first or 'unknown')}) and {b.path} ({b.kind}, tokenizer "
            f"{files.short(second or 'unknown')}) do not share a tokenizer; train both from the same language model"
        )


def same_template(a: Artifact, template: str) -> None:
    """InputError unless the model was taught in ``template``, or does not say in which."""
    known = a.preprocessing.get("template") or template
    if known != template:
        raise InputError(
            f"data.template is {template}, but {a.path} ({a.kind}) was trained with {known}; set data.template: {known}"
        )


def _tokenizer_of(artifact: Artifact) -> str | None:
    known = artifact.preprocessing.get("tokenizer")
    has = (artifact.path / "tokenizer.json").is_file()
    return known or (tokenizer_digest(artifact.path) if has else None)


# ---- lineage ---------------------------------------------------------------------------------------------------------


def lineage(artifact: Artifact) -> dict[str, Any]:
    """The artifact and all its ancestors: {digest, kind, name, stage, step, data, origin, parents: {role: …}}."""
    return _record(artifact.manifest)


def tree(artifact: Artifact) -> str:
    """The lineage as a text tree, from the artifact down to raw pixels and raw text."""
    record = lineage(artifact)
    return "\n".join([_label(record), *_branches(record)])


def _branches(record: dict[str, Any]) -> Iterator[str]:
    below = [(f"{role}: {_label(parent)}", parent) for role, parent in record["parents"].items()]
    leaves = [f"origin: {_brief(record['origin'])}"] if record["origin"] else []
    leaves += [f"{KINDS.get(record['kind'], 'data')}: {_brief(record['data'])}"] if record["data"] else []
    below += [(leaf, {}) for leaf in leaves]
    for i, (line, child) in enumerate(below):
        last = i == len(below) - 1
        yield ("└─ " if last else "├─ ") + line
        for deeper in _branches(child) if child else ():
            yield ("   " if last else "│  ") + deeper


def _label(record: dict[str, Any]) -> str:
    step = f"  step {record['step']}" if record["step"] is not None else ""
    made_by = f"  {record['stage']}" if record["stage"] else ""
    return f"{record['name']}  {record['kind']}{made_by}{step}  {files.short(record['digest'])}"


def _brief(value: Any) -> str:
    """A nested dict in one line: `train.source=world, train.n=1234`."""
    pairs = list(_flat(value))
    shown = ", ".join(f"{key}={_clipped(item)}" for key, item in pairs[:6])
    return shown + (f", … ({len(pairs) - 6} more)" if len(pairs) > 6 else "")


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _clipped(value: Any, limit: int = 48) -> str:
    text = " ".join(str(value).split())
    if len(text) in (40, 64) and all(letter in "0123456789abcdef" for letter in text):
        return files.short(text)  # a digest
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---- words for people ------------------------------------------------------------------------------------------------


def describe(artifact: Artifact) -> str:
    """What `fledge show` prints."""
    rows = {
        "kind": artifact.kind,
        "stage": artifact.stage,
        "digest": artifact.digest,
        "step": _step(artifact.manifest),
        "seed": artifact.seed,
        "architecture": _brief(artifact.architecture),
        "preprocessing": _brief(artifact.preprocessing),
        "data": _brief(artifact.data),
        "origin": _brief(artifact.origin or {}),
        "versions": _brief(artifact.manifest["versions"]),
        "files": f"{len(artifact.manifest['files'])}, {_size(artifact)}, every digest verified",
        "loads with": "; ".join(_loader(artifact.kind)),
    }
    lines = [f"{artifact.name}: {artifact.path}"]
    lines += [f"  {key:<14}{value}" for key, value in rows.items() if value not in (None, "")]
    lines += ["", *_table(artifact.metrics)] if artifact.metrics else []
    lines += ["", "lineage", *(f"  {line}" for line in tree(artifact).splitlines())]
    return "\n".join(lines)


def _step(manifest: Mapping[str, Any]) -> Any:
    """40, or `40 of 100 (exported)`."""
    taken = manifest.get("checkpoint")
    return f"{taken['step']} of {taken['of']} ({taken['why']})" if taken else manifest["step"]


def _size(artifact: Artifact) -> str:
    return f"{sum(entry['bytes'] for entry in artifact.manifest['files'].values()) / 2**20:.1f} MiB"


_COLUMNS = ("metric", "baseline", "before", "after", "95 % interval", "n", "note")


def _rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Scores as rows of words, in the order of `_COLUMNS`."""
    return [
        (
            str(score.get("metric", "")),
            " ".join(filter(None, [_number(score.get("baseline")), _bracketed(score.get("baseline_name"))])),
            _number(score.get("before")),
            _number(score.get("after")),
            f"[{_number(score.get('low'))}, {_number(score.get('high'))}]",
            f"{score.get('n', '')} {score.get('unit', '')}".strip(),
            str(score.get("note") or ""),
        )
        for score in metrics.get("scores", [])
    ]


def _bracketed(text: str | None) -> str:
    return f"({text})" if text else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(metrics: dict[str, Any]) -> list[str]:
    rows = _rows(metrics)
    table = [_COLUMNS, *rows] if rows else []
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))] if table else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    others = {key: value for key, value in metrics.items() if key != "scores"}
    return ["metrics", *(f"  {line}" for line in lines)] + ([f"  {_brief(others)}"] if others else [])


def _loader(kind: str) -> tuple[str, ...]:
    """The calls that load this kind elsewhere; FOLDER stands for wherever it lies."""
    timm = ('timm.create_model("local-dir:FOLDER", pretrained=True)',)
    tokenizer = 'AutoTokenizer.from_pretrained("FOLDER")'
    return {
        "vision-encoder": timm,
        "image-classifier": timm,
        "text-encoder": (
            'AutoModel.from_pretrained("FOLDER")',
            'AutoModelForMaskedLM.from_pretrained("FOLDER")',
            tokenizer,
        ),
        "causal-lm": ('AutoModelForCausalLM.from_pretrained("FOLDER")', tokenizer),
        "chat-model": ('AutoModelForCausalLM.from_pretrained("FOLDER")', tokenizer),
        "reward-model": ('AutoModelForSequenceClassification.from_pretrained("FOLDER")', tokenizer),
        "reward-ensemble": (
            'AutoModelForSequenceClassification.from_pretrained("FOLDER/members/member_1")',
            'AutoTokenizer.from_pretrained("FOLDER/members/member_1")',
        ),
        "dual-encoder": ('VisionTextDualEncoderModel.from_pretrained("FOLDER")', tokenizer),
    }[kind]


def _snippet(kind: str, folder: Path) -> list[str]:
    """Python that loads the artifact with none of our code."""
    calls = [call for call in _loader(kind) if "AutoTokenizer" not in call or (folder / "tokenizer.json").exists()]
    if kind in ("vision-encoder", "image-classifier"):
        return [
            "import timm",
            "",
            f"model = {calls[0]}.eval()",
            "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
        ]
    classes = sorted(call.partition(".")[0] for call in calls)
    lines = [f"from transformers import {', '.join(classes)}", "", f"model = {calls[0]}.eval()"]
    for call in calls[1:]:
        lines.append(f"tokenizer = {call}" if "AutoTokenizer" in call else f"# with its head: {call}")
    if kind == "chat-model" and "tokenizer = " in lines[-1]:
        lines += [
            'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True, '
            'return_tensors="pt", return_dict=True)',
            "answer = model.generate(**prompt, max_new_tokens=64)",
        ]
    return lines


def _card(manifest: dict[str, Any], folder: Path) -> str:
    """The model card, README.md."""
    kind = manifest["kind"]
    library = "timm" if kind in ("vision-encoder", "image-classifier") else "transformers"
    rows = _rows(manifest["metrics"])
    record = {**manifest, "digest": "0" * 64}  # not known before this very file is written, and not shown
    facts = {
        "kind": kind,
        "stage": manifest["stage"],
        "step": _step(manifest),
        "seed": manifest["seed"],
        "architecture": _brief(manifest["architecture"]),
        "preprocessing": _brief(manifest["preprocessing"]),
        "data": _brief(manifest["data"]),
        "versions": _brief(manifest["versions"]),
    }
    return "\n".join(
        [
            *("---", f"library_name: {library}", f"tags: [fledge, {kind}]", "---", ""),
            *(f"# {manifest['name']}: a {kind}", ""),
            *(f"- {key}: {_escaped(value)}" for key, value in facts.items() if value not in (None, "")),
            *("", "## Load it", "", "FOLDER is the path of this folder, wherever it lies.", ""),
            *("```python", *_snippet(kind, folder), "```", ""),
            *(_markdown_table(rows) if rows else []),
            *("## Lineage", "", "```", *([manifest["name"] + "  " + kind, *_branches(record)]), "```", ""),
            "`manifest.json` holds the sha256 of every file, and what made them; `config.yaml` is the stage's config.",
            "",
        ]
    )


def _markdown_table(rows: list[tuple[str, ...]]) -> list[str]:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *[tuple(_escaped(cell) for cell in row) for row in rows]]
    return ["## Scores", "", *("| " + " | ".join(line) + " |" for line in lines), ""]


def _escaped(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;")

"""Private resume state of a run: safetensors and JSON, written so that a checkpoint that exists is whole.

    checkpoints/step_00000042/{objective.safetensors, optimizer.safetensors, …, state.json, manifest.json}

Written aside, flushed, fsynced, hashed, renamed, and only then are older ones pruned. Which one is the latest is never
stored: it is the newest whose every file verifies. What others should read is an artifact (`fledge/artifact.py`).

Everything is replicated, so rank 0 writes and the others wait; every rank calls `save` and `newest`.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fledge import distributed, files
from fledge.errors import InputError, RunError

FORMAT = 1
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One group of tensors, on the CPU."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            has = ", ".join(sorted(file.stem for file in self.path.glob("*.safetensors")))
            raise InputError(f"checkpoint {self.path} has no tensors named {name!r} (it has: {has}); run with --fresh")
        return load_file(path)


# ---- save and find ---------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    spare: Set[int] = frozenset(),
) -> Path:
    """Publish the state of `step` under `root`, then prune all but the newest `keep` and `spare`. Returns its folder.

    `tensors` has one group a file. A step that is already there and verifies stays as it is: a run is a pure function
    of its config, so that both are the same, and there is no moment at which neither exists.

    Raises:
        RunError: the disk does not take it, on every rank. The older checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    root = Path(root)

    def publish() -> None:
        try:
            _write(root, step, tensors, state)
            _prune(root, step, keep, spare)
        except (OSError, SafetensorError) as reason:
            raise RunError(
                f"checkpoint of step {step} could not be written to {root}: {reason}. The older checkpoints are "
                "untouched; make room or give write access and start the run again: it goes on from the last one"
            ) from reason

    distributed.on_main(publish)
    return root / name_of(step)


def newest(root: Path) -> Checkpoint | None:
    """The newest verified checkpoint under `root`, or None. A broken one is renamed `.bad-…`, with a warning.

    Raises:
        InputError: a checkpoint has another format.
        RunError: the folder cannot be read, or a broken checkpoint not be set aside.
    """
    root = Path(root)

    def find() -> int | None:
        if not root.is_dir():
            return None
        try:
            files.sweep(root)
            return next((step for step in reversed(_steps(root)) if _verified(root, step)), None)
        except OSError as reason:
            raise RunError(f"the checkpoints in {root} cannot be read or set aside: {reason}") from reason

    step = distributed.on_main(find)
    if step is None:
        return None
    return _read(root, step)


def find(root: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that verifies. Nothing is renamed or removed.

    Raises:
        InputError: it is not there, or not whole.
    """
    root = Path(root)

    def look() -> int:
        there = _steps(root)
        faults = {one: _faults(root / name_of(one), one) for one in (reversed(there) if step is None else [step])}
        whole = next((one for one, found in faults.items() if not found), None)
        if whole is not None:
            return whole
        if step in there:
            raise InputError(f"checkpoint {root / name_of(step)} is broken: {'; '.join(faults[step])}")
        has = f"it has {', '.join(map(str, there))}" if there else "it has none"
        raise InputError(f"{root}: no {'whole checkpoint' if step is None else f'checkpoint of step {step}'}; {has}")

    return _read(root, distributed.on_main(look))


def _read(root: Path, step: int) -> Checkpoint:
    path = root / name_of(step)
    return Checkpoint(step, path, json.loads((path / STATE).read_text(encoding="utf-8")))


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def _steps(root: Path) -> list[int]:
    """Steps that have a folder, ascending."""
    names = [path.name for path in root.glob("step_*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name))


def _write(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    final = root / name_of(step)
    text = files.canonical(state)
    if json.loads(text) != state:
        raise TypeError("state must be plain JSON that reads back equal: string keys, lists rather than tuples")
    root.mkdir(parents=True, exist_ok=True)
    if final.is_dir() and _verified(root, step):
        return
    folder = files.aside(final, "tmp")
    try:
        folder.mkdir()
        for name, group in tensors.items():
            if not files.plain(name) or "/" in name:
                raise ValueError(f"{name!r} cannot name a file of tensors")
            save_file(storable(group), folder / f"{name}.safetensors")
        files.write_text(folder / STATE, text)
        manifest = {"format": FORMAT, "kind": "checkpoint", "step": step, "versions": {"torch": str(torch.__version__)}}
        files.write_manifest(folder, manifest)
        files.move(folder, final)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _prune(root: Path, step: int, keep: int, spare: Set[int]) -> None:
    """Remove older checkpoints but `spare`. Never one from a later step: that is not ours to judge."""
    older = [other for other in _steps(root) if other < step]
    for other in older[: max(len(older) + 1 - keep, 0)]:
        if other not in spare:
            files.remove(root / name_of(other))


def _verified(root: Path, step: int) -> bool:
    """Is the checkpoint of this step whole? A broken one is set aside, with a warning that names the file."""
    path = root / name_of(step)
    found = _faults(path, step)
    if found:
        bad = files.aside(path, "bad")
        files.move(path, bad)
        message = f"checkpoint {path} is broken: {'; '.join(found)}. Set aside as {bad.name}; an older one is used"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return not found


def _faults(path: Path, step: int) -> list[str]:
    """What is wrong with the checkpoint of this step, one sentence a file."""
    try:
        manifest = files.read_manifest(path, FORMAT, "checkpoint")
        found = files.faults(path, manifest)
    except files.Broken as broken:
        return [str(broken)]
    if not found and manifest.get("step") != step:
        return [f"{files.MANIFEST} says step {manifest.get('step')}"]
    return found


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as safetensors takes them: on the CPU, contiguous, each alone in its storage."""
    kept: dict[str, Tensor] = {}
    owned: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in owned or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        owned.add(tensor.untyped_storage().data_ptr())
        kept[name] = tensor
    return kept


# ---- state of modules and optimizers ---------------------------------------------------------------------------------


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, live and each once: tied ones under their first name."""
    return dict(_named_tensors(module))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        passing = part._non_persistent_buffers_set
        for name, tensor in {**part._parameters, **part._buffers}.items():
            if tensor is not None and name not in passing and id(tensor) not in seen:
                seen.add(id(tensor))
                # torch.compile is a matter of hardware: the names are those of the module that it wraps
                yield f"{prefix}.{name}".removeprefix(".").replace("_orig_mod.", ""), tensor


@torch.no_grad()
def load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `module_tensors` back in place: every name, shape and type must be the same."""
    mine = module_tensors(module)
    _same_names("the model", set(mine), set(tensors))
    _same_forms("the model", {name: (mine[name], tensors[name]) for name in mine})
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name: `parameter/exp_avg`. Rates and decay are functions of the step and not in it."""
    names = {id(tensor): name for name, tensor in module_tensors(module).items()}
    kept: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} is a {type(value).__name__}, not a tensor")
            kept[f"{name}/{key}"] = value
    return kept


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back: same types, each beside its parameter and laid out like it.

    A parameter without state (its group has not started) stays without. The 0-d `step` lives on the CPU unless the
    group is fused or capturable: that is where the optimizer itself would have made it.
    """
    mine = module_tensors(module)
    where = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    owned = {name for name, tensor in mine.items() if id(tensor) in where}
    saved = {key.rpartition("/")[0] for key in tensors}
    _same_names("the optimizer", owned, saved | owned)
    alike = {key: (mine[key.rpartition("/")[0]], value) for key, value in tensors.items() if not key.endswith("/step")}
    _same_forms("the optimizer", alike, types=False)
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = mine[name]
        if field == "step":
            group = where[id(parameter)]
            on_device = group.get("fused") or group.get("capturable")
            restored = value.to(parameter.device if on_device else "cpu", copy=True)
        else:
            restored = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        optimizer.state[parameter][field] = restored


def _same_names(what: str, mine: set[str], saved: set[str]) -> None:
    parts = [f"{word} {_some(names)}" for word, names in (("lacks", mine - saved), ("has", saved - mine)) if names]
    if parts:
        raise InputError(f"the checkpoint does not fit {what}: it {' and it '.join(parts)}; run with --fresh")


def _same_forms(what: str, pairs: dict[str, tuple[Tensor, Tensor]], types: bool = True) -> None:
    wrong = [
        f"{name} is {_form(saved)}, expected {_form(own)}"
        for name, (own, saved) in pairs.items()
        if own.shape != saved.shape or types and own.dtype != saved.dtype
    ]
    if wrong:
        raise InputError(f"the checkpoint does not fit {what}: {_some(wrong)}; run with --fresh")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _some(names: set[str] | list[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

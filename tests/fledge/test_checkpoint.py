"""Resume state: bitwise round trips, every fault of every file, and kills at every moment of a save."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Set
from pathlib import Path

import pytest
import torch
from torch import nn

from fledge import checkpoint, distributed, files
from fledge.checkpoint import (
    changing_tensors,
    load_module,
    load_optimizer,
    module_tensors,
    newest,
    optimizer_tensors,
)
from fledge.errors import InputError, RunError
from fledge.saver import Saver
from tests import launch


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Names, shapes, types and every bit."""
    forms = [{name: (t.shape, t.dtype, bits(t)) for name, t in group.items()} for group in (a, b)]
    return forms[0] == forms[1]


def save(root: Path, step: int, groups: dict, state: dict, keep: int, spare: Set[int] = frozenset()) -> Path:
    """As a run saves, by its thread, and wait for it."""
    with Saver(root) as saver:
        saver.save(step, groups, state, keep, spare)
    return root / f"step_{step:08d}"


def small(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((3,), float(step))}, "stream": {}}


def save_small(root: Path, step: int, keep: int = 2) -> Path:
    return save(root, step, small(step), {"seen": step}, keep)


# ---- tensors and state ----------------------------------------------------------------------------------------------


def test_every_kind_of_tensor_survives(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "scalar": torch.tensor(3.5),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor(2**62 + 1),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bfloat16": torch.randn(3).bfloat16(),
        "float64": torch.randn(3, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "other empty": torch.empty(0),
        "transposed": base.T,
        "view": base[1:3, ::2],
        "same": base,
        "same again": base,
        "expanded": torch.ones(1).expand(3, 2),
        "needs grad": torch.randn(2, requires_grad=True),
    }
    save(tmp_path, 7, {"all": tensors, "none": {}}, {}, keep=1)
    found = newest(tmp_path)
    assert found.step == 7
    assert same(found.tensors("all"), tensors)
    assert found.tensors("none") == {}
    with pytest.raises(InputError, match="no tensors named 'optim'.*all, none"):
        found.tensors("optim")


def test_state_is_plain_json_that_reads_back_equal(tmp_path):
    state = {"kl": 0.1 + 0.2, "tiny": 5e-324, "text": "é\n", "list": [1, [2, None, True]], "big": 2**70}
    save(tmp_path, 1, {}, state, keep=1)
    assert newest(tmp_path).state == state
    for bad in ({1: "integer key"}, {"tuple": (1, 2)}):
        with pytest.raises(TypeError, match="JSON"):
            save(tmp_path, 2, {}, bad, keep=1)
    with pytest.raises(ValueError):
        save(tmp_path, 2, {}, {"kl": float("nan")}, keep=1)
    assert newest(tmp_path).step == 1


def test_only_safetensors_and_json_are_written(tmp_path):
    folder = save_small(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


class Tied(nn.Module):
    """A convolution laid out channels-last, a tied embedding, buffers of both kinds, and a part that starts late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.norm
        self.late = nn.Linear(7, 7)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("centre", torch.zeros(7))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, late: bool) -> torch.Tensor:
        logits = self.head(self.norm(self.embed(ids) + self.conv(pixels).mean((2, 3)))) * self.temperature
        return (self.late(logits) if late else logits).logsumexp(-1).sum()


def train(model: Tied, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        pixels = torch.randn(5, 2, 4, 4, generator=draw)
        optimizer.zero_grad()
        model(pixels, torch.randint(7, (5,), generator=draw), late=step >= 6).backward()
        optimizer.step()
        model.centre += step


def new(seed: int, **options) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied()
    late = [*model.late.parameters()]
    first = [p for p in model.parameters() if all(p is not other for other in late)]
    return model, torch.optim.AdamW([{"params": first}, {"params": late, "lr": 1e-2}], **options)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_a_resumed_adamw_goes_on_bitwise(tmp_path, options):
    straight, straight_optimizer = new(0, **options)
    train(straight, straight_optimizer, range(10))

    model, optimizer = new(0, **options)
    train(model, optimizer, range(4))  # the late group has no state yet
    groups = {"model": module_tensors(model), "optim": optimizer_tensors(optimizer, model)}
    save(tmp_path, 4, groups, {}, keep=1)
    other, other_optimizer = new(1, **options)
    train(other, other_optimizer, range(20, 27))  # other weights, other state, also of the late group
    found = newest(tmp_path)
    load_module(other, found.tensors("model"))
    load_optimizer(other_optimizer, other, found.tensors("optim"))
    assert same(optimizer_tensors(other_optimizer, other), found.tensors("optim"))
    assert not any(key.startswith("late") for key in found.tensors("optim"))
    train(other, other_optimizer, range(4, 10))

    assert same(module_tensors(other), module_tensors(straight))
    assert same(optimizer_tensors(other_optimizer, other), optimizer_tensors(straight_optimizer, straight))
    assert other.head.weight is other.embed.weight
    mean = other_optimizer.state[other.conv.weight]["exp_avg"]
    assert mean.stride() == other.conv.weight.stride()
    assert other_optimizer.state[other.conv.weight]["step"].dtype == torch.float32


def test_names_are_of_parameters_each_once():
    model, optimizer = new(0)
    train(model, optimizer, range(7))
    tensors = module_tensors(model)
    assert set(tensors) == {name for name, _ in model.named_parameters()} | {
        "centre", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    }  # fmt: skip
    assert tensors["embed.weight"] is model.head.weight
    fields = {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer_tensors(optimizer, model)) == {f"{n}/{f}" for n, _ in model.named_parameters() for f in fields}


class Adapted(Tied):
    """What a frozen base is: nothing changes it, so no checkpoint holds it."""

    def constant(self) -> list[nn.Parameter]:
        return [self.embed.weight, *self.conv.parameters()]


def test_what_is_constant_is_in_no_checkpoint_and_stays_as_it_is():
    torch.manual_seed(0)
    model = Adapted()
    held = changing_tensors(model)
    assert set(module_tensors(model)) - set(held) == {"embed.weight", "conv.weight", "conv.bias"}
    saved = {name: tensor + 1 for name, tensor in held.items()}
    before = {name: tensor.clone() for name, tensor in module_tensors(model).items()}
    load_module(model, saved)
    assert same(module_tensors(model), before | saved)
    with pytest.raises(InputError, match="has embed.weight"):
        load_module(model, saved | {"embed.weight": before["embed.weight"]})
    learned = [p for name, p in model.named_parameters() if name in held]
    optimizer = torch.optim.AdamW(learned)
    train(model, optimizer, range(7))
    assert {name.rpartition("/")[0] for name in optimizer_tensors(optimizer, model)} == set(held) - {
        "centre", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    }  # fmt: skip
    load_optimizer(optimizer, model, {k: x.clone() for k, x in optimizer_tensors(optimizer, model).items()})


def test_names_do_not_depend_on_compile():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = list(module_tensors(model))
    model[1] = torch.compile(model[1])
    assert list(module_tensors(model)) == names


def test_loading_is_strict():
    model, optimizer = new(0)
    train(model, optimizer, range(2))
    before = {name: tensor.clone() for name, tensor in module_tensors(model).items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    missing = {name: tensor for name, tensor in tensors.items() if name != "centre"}
    cases = [
        (missing, "lacks centre"),
        ({**tensors, "extra": torch.ones(1)}, "has extra"),
        ({**tensors, "centre": torch.ones(8)}, r"centre is float32\[8\], expected float32\[7\]"),
        ({**tensors, "centre": torch.ones(7).bfloat16()}, r"centre is bfloat16\[7\], expected float32\[7\]"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            load_module(model, given)
        assert same(module_tensors(model), before)
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    for given, message in [
        ({**state, "centre/exp_avg": torch.ones(7)}, "has centre"),
        ({**state, "conv.bias/exp_avg": torch.ones(5)}, r"conv.bias/exp_avg is float32\[5\]"),
    ]:
        with pytest.raises(InputError, match=message):
            load_optimizer(optimizer, model, given)
        assert same(optimizer_tensors(optimizer, model), state)


# ---- which is the newest --------------------------------------------------------------------------------------------


def test_nothing_saved(tmp_path):
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None


def test_prunes_all_but_the_newest(tmp_path):
    for step in range(1, 6):
        save_small(tmp_path, step, keep=3)
        assert len(list(tmp_path.iterdir())) == min(step, 3)
    save_small(tmp_path, 6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000006"]
    with pytest.raises(ValueError, match="keep"):
        save_small(tmp_path, 7, keep=0)


def test_sweeps_what_a_killed_process_left(tmp_path):
    save_small(tmp_path, 1)
    for name in (".tmp-step_00000002-aa", ".del-step_00000000-bb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    assert newest(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_step_that_is_whole_stays_and_a_broken_one_is_replaced(tmp_path):
    folder = save_small(tmp_path, 1)
    before = (folder / files.MANIFEST).stat().st_ino
    save_small(tmp_path, 1)
    assert (folder / files.MANIFEST).stat().st_ino == before
    (folder / "state.json").unlink()
    with pytest.warns(RuntimeWarning, match="state.json is missing"):
        save_small(tmp_path, 1)
    assert newest(tmp_path).step == 1


# ---- faults ---------------------------------------------------------------------------------------------------------

NAMES = ("model.safetensors", "stream.safetensors", "state.json", "manifest.json")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "remove": Path.unlink,
    "link": lambda path: (path.rename(path.with_suffix(".moved")), path.symlink_to(path.with_suffix(".moved").name)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_of_any_file_falls_back_and_is_named(tmp_path, name, fault):
    save_small(tmp_path, 5)
    FAULTS[fault](save_small(tmp_path, 10) / name)
    with pytest.warns(RuntimeWarning, match=f"step_00000010 is broken: .*{name}"):
        found = newest(tmp_path)
    assert (found.step, found.state) == (5, {"seen": 5})
    assert same(found.tensors("model"), small(5)["model"])
    assert len(list(tmp_path.glob(".bad-step_00000010-*"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(tmp_path).step == 5


def test_a_flip_of_any_byte_shows(tmp_path):
    folder = save_small(tmp_path, 1)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            try:
                shown = bool(files.faults(folder, files.read_manifest(folder, 1, "checkpoint")))
            except (files.Broken, InputError):
                shown = True
            assert shown, f"{path.name}, byte {at}"
        path.write_bytes(content)
    assert newest(tmp_path).step == 1


def test_a_file_that_does_not_belong_shows(tmp_path):
    save_small(tmp_path, 5)
    (save_small(tmp_path, 10) / "extra.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match="extra.json does not belong"):
        assert newest(tmp_path).step == 5


def test_all_broken_is_none(tmp_path):
    for step in (1, 2):
        flip(save_small(tmp_path, step) / "state.json")
    with pytest.warns(RuntimeWarning) as told:
        assert newest(tmp_path) is None
    assert len(told) == 2


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    save_small(tmp_path, 5).rename(tmp_path / "step_00000009")
    with pytest.warns(RuntimeWarning, match="says step 5"):
        assert newest(tmp_path) is None


@pytest.mark.parametrize("number", [0, 3])
def test_another_format_number_is_refused_by_name(tmp_path, number):
    path = save_small(tmp_path, 5) / files.MANIFEST
    path.write_text(files.canonical(files.seal({**json.loads(path.read_text()), "format": number})))
    with pytest.raises(InputError, match=f"has format {number}; this version of fledge reads format 1 or 2"):
        newest(tmp_path)
    assert path.exists()  # kept where it was, for the version that reads it


def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch):
    save_small(tmp_path, 5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match="step 10 could not be written .*No space left.*older checkpoints"):
        save_small(tmp_path, 10)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    assert newest(tmp_path).step == 5


# ---- kills ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: no clean-up of ours catches it, as none runs after SIGKILL."""


def test_killed_at_every_system_call_of_a_save(tmp_path, monkeypatch):
    """keep=1: the old one goes as soon as the new one stands, and at no moment is there none."""
    died, calls = 0, 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == died:
                raise Killed
            result = function(*args, **kwargs)
            if calls == -died:
                raise Killed
            return result

        return call

    for place, name in [
        (os, "open"), (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (Path, "mkdir"), (Path, "open"),
        (checkpoint, "save_file"),
    ]:  # fmt: skip
        monkeypatch.setattr(place, name, dying(getattr(place, name)))
    seen = set()
    for sign in (1, -1):  # before and after the call
        for at in range(1, 200):
            root = tmp_path / f"{sign}-{at}"
            died = 0
            save_small(root, 1, keep=1)
            calls, died = 0, sign * at
            try:
                save_small(root, 2, keep=1)
                break
            except Killed:
                pass
            died = 0
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a kill breaks nothing, so there is nothing to warn of
                found = newest(root)
            assert found is not None and found.state == {"seen": found.step}
            assert same(found.tensors("model"), small(found.step)["model"])
            assert [path.name for path in root.glob(".*")] == []
            seen.add(found.step)
            shutil.rmtree(root)
        assert at > 15
    assert seen == {1, 2}


def save_for_ever(root: Path, start: int) -> None:
    step = start
    while True:
        step += 1
        tensors = {
            "model": {"weight": torch.full((200_000,), float(step))},
            "optim": {"mean": torch.ones(50_000) * step},
        }
        save(root, step, tensors, {"seen": step}, keep=1)


def kill_storm(root: Path, kills: int) -> None:
    """Run in a process of its own, which forks the savers, so that torch is imported once."""
    warnings.simplefilter("error")
    reached = inside = 0
    for _ in range(kills):
        saver = os.fork()
        if saver == 0:
            save_for_ever(root, reached)
        time.sleep(random.uniform(0.02, 0.12))
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
        inside += any(root.glob(".*"))
        found = newest(root)
        step = 0 if found is None else found.step
        assert step >= reached, f"{step} after {reached}"
        if found is not None:
            assert found.state == {"seen": step}
            assert bool(
                (found.tensors("model")["weight"] == step).all() and (found.tensors("optim")["mean"] == step).all()
            )
        reached = step
    print(json.dumps({"reached": reached, "inside": inside}))


def test_kill_storm(tmp_path):
    """SIGKILL at random moments of a process that does nothing but save: the newest is whole, no step goes back."""
    (output,) = launch.run(1, [__file__, "storm", str(tmp_path / "checkpoints"), "30"])
    told = json.loads(output.splitlines()[-1])
    assert told["reached"] > 0 and told["inside"] > 0, told


# ---- ranks ----------------------------------------------------------------------------------------------------------


def two_ranks(root: Path) -> None:
    """Rank 0 writes, every rank sees the same, and what fails on rank 0 fails on all instead of hanging."""
    distributed.setup("cpu")
    rank = distributed.rank()
    told = [newest(root) is None, save(root, 1, {"model": {"rank": torch.tensor(rank)}}, {"rank": rank}, keep=1).name]
    found = newest(root)
    told += [found.state, found.tensors("model")["rank"].item()]
    sync, files.sync = files.sync, None  # what is called on rank 0 alone
    try:
        save(root, 2, small(2), {}, keep=1)
    except Exception as error:
        told.append(type(error).__name__)
    files.sync = sync
    path = root / "step_00000001" / files.MANIFEST
    if rank == 0:
        path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    try:
        newest(root)
    except InputError as error:
        told.append("format 9" in str(error))
    print(json.dumps(told), flush=True)
    distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path):
    outputs = launch.run(2, [__file__, "ranks", str(tmp_path)])
    told = [json.loads(output.splitlines()[-1]) for output in outputs]
    expected = [True, "step_00000001", {"rank": 0}, 0]
    assert told == [[*expected, "TypeError", True], [*expected, "RunError", True]]


if __name__ == "__main__":
    if sys.argv[1] == "storm":
        kill_storm(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        two_ranks(Path(sys.argv[2]))

"""Every collective of fledge in one file, each a no-op on one process. Rows are the first axis of every tensor.

Accelerate starts the process group and chooses the device; a run without a launcher needs none of it. The engine that
was asked for is checked against the one that runs: ``accelerate launch --cpu --num_processes 2`` would otherwise train
on one process without a word.
"""

import atexit
import contextlib
import gc
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist

from fledge.errors import InputError, RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
ALONE = object()
"""In place of a group: this rank, which asks nobody."""
WORLD_VARIABLE = "FLEDGE_WORLD_SIZE"  # the number of processes that `fledge launch` was asked for
_accelerator: "Accelerator | None" = None


def setup(device: str = "auto") -> torch.device:
    """Start the process group (if launched with one) on ``auto|cuda|mps|cpu`` and return this rank's device.

    Raises:
        InputError: the device does not exist here, or another one is in use by this process already; or fewer or more
            processes joined than were asked for (`fledge launch` asks by FLEDGE_WORLD_SIZE).
    """
    global _accelerator
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    wanted = next(name for name in ("cuda", "mps", "cpu") if available[name]) if device == "auto" else device
    if not available.get(wanted, False):
        found = ", ".join(name for name, there in available.items() if there)
        raise InputError(
            f"train.device: {device} is not available here; found {found}. Use device: auto or one of these"
        )
    if _accelerator is None:
        environ = os.environ
        if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ and "WORLD_SIZE" not in environ:
            raise InputError(  # that environment is what `accelerate launch --cpu --num_processes 2` makes
                "accelerate was asked for several processes, but has started one; use torchrun, or accelerate launch "
                "--multi_gpu, which works without GPUs too (for one process, unset MASTER_PORT)"
            )
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Buffers are functions of globally reduced means, hence equal on every rank: nothing to broadcast.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        _accelerator = Accelerator(cpu=wanted == "cpu", mixed_precision="no", kwargs_handlers=[ddp])
        asked = int(environ.get(WORLD_VARIABLE) or environ.get("WORLD_SIZE", 1))
        if _accelerator.num_processes != asked:
            raise InputError(
                f"launched for {asked} processes, but {_accelerator.num_processes} joined; "
                "on a machine without GPUs use torchrun, or accelerate launch --multi_gpu"
            )
        atexit.register(leave)
    if _accelerator.device.type != wanted:
        raise InputError(f"train.device: {device}, but this process already runs on {_accelerator.device.type}")
    return _accelerator.device


def leave() -> None:
    """End the process group and its threads, if there is one: a process that ends beside them may abort on its way out.

    The threads end with the last object that holds the group, and after an error a cycle of its traceback holds some.
    """
    if joined():
        dist.destroy_process_group()
        gc.collect()


def device() -> torch.device:
    """This rank's device (``setup`` chooses it)."""
    return _accelerator.device if _accelerator is not None else torch.device("cpu")


def joined() -> bool:
    """Is this process in a group already?"""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if joined() else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if joined() else int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def own_group() -> Any:
    """A gloo group of all ranks for a thread: its collectives must not mix with the loop's. Every rank calls it."""
    return dist.new_group(backend="gloo") if world_size() > 1 else ALONE


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Rank 0's ``value`` (picklable; it never leaves the job) on every rank."""
    if world_size() == 1 or group is ALONE:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def on_main(work: Callable[[], T], group: Any = None) -> T:
    """Rank 0's result of ``work`` on every rank, or its error: no rank goes on before it, or waits for one that failed.

    The result must be picklable. InputError and RunError arrive as they are, any other error as a RunError.
    """
    result = error = None
    if is_main():
        try:
            result = work()
        except Exception as reason:  # noqa: BLE001  (raised again below, on every rank)
            error = reason
    result, told = broadcast_object((result, _plain(error)), group)
    error = error or told
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def together(work: Callable[[], T], group: Any = None) -> list[T]:
    """Every rank's result of ``work`` on every rank, in rank order; or the first error of any of them, on all.

    What `on_main` says of results and errors holds here too.
    """
    result = error = None
    try:
        result = work()
    except Exception as reason:  # noqa: BLE001  (raised again below, on every rank)
        error = reason
    told = gather_objects((result, _plain(error)), group)
    error = error or next((other for _, other in told if other is not None), None)
    if error is not None:
        raise error
    return [result for result, _ in told]


def _plain(error: Exception | None) -> Exception | None:
    """The error as other ranks get it."""
    return error if error is None or isinstance(error, InputError | RunError) else RunError(repr(error))


def all_reduce_sum(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum each tensor over the ranks, in one message. The names must be the same on every rank."""
    if world_size() == 1 or not tensors:
        return tensors
    names = sorted(tensors)
    dtype = torch.float64 if any(tensors[n].dtype == torch.float64 for n in names) else torch.float32
    flat = torch.cat([tensors[n].reshape(-1).to(dtype) for n in names])
    dist.all_reduce(flat)
    parts = flat.split([tensors[n].numel() for n in names])
    return {n: part.view(tensors[n].shape).to(tensors[n].dtype) for n, part in zip(names, parts, strict=True)}


def all_reduce_counts(counts: dict[str, int]) -> dict[str, int]:
    """Sum integers over the ranks, exactly (int64)."""
    if world_size() == 1:
        return counts
    names = sorted(counts)
    flat = torch.tensor([counts[n] for n in names], dtype=torch.int64, device=device())
    dist.all_reduce(flat)
    return dict(zip(names, flat.tolist(), strict=True))


def topology() -> dict[str, Any]:
    """How many ranks there are, and which of them run on which host; every rank calls this."""
    hosts: dict[str, list[int]] = {}
    for i, host in enumerate(gather_objects(socket.gethostname())):
        hosts.setdefault(host, []).append(i)
    return {"world_size": world_size(), "hosts": hosts}


def any_rank(flag: bool) -> bool:
    """Is it so on some rank?"""
    return each_on_any_rank(flag)[0]


def each_on_any_rank(*flags: bool) -> list[bool]:
    """Is it so on some rank? For each flag, in one message."""
    sums = all_reduce_counts({str(i): int(flag) for i, flag in enumerate(flags)})
    return [sums[str(i)] > 0 for i in range(len(flags))]


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Every rank's ``value`` (picklable), in rank order, on every rank."""
    if world_size() == 1 or group is ALONE:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=group)
    return box


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward sums over ranks and keeps this rank's rows: with DDP's mean, the exact gradient."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n, …) on every rank -> (world·n, …) in rank order, with gradient. n must be the same on every rank."""
    return rows if world_size() == 1 else _GatherRows.apply(rows)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------ shards


def is_sharded(tensor: torch.Tensor) -> bool:
    """Does each rank hold only some rows of it?"""
    return hasattr(tensor, "device_mesh")  # a DTensor, whose class only runs that shard need to import


def rows_held(tensor: torch.Tensor, rank: int | None = None) -> Any:
    """The rows of the whole tensor that a rank (this one if not said) holds: a slice, or ``...`` where it is not
    sharded. Rows are dealt in equal runs, of which the last may be shorter or empty."""
    if not is_sharded(tensor):
        return ...
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    at: int = mesh.get_local_rank() if rank is None else rank
    rows, most = tensor.shape[0], -(-tensor.shape[0] // mesh.size())
    return slice(min(at * most, rows), min((at + 1) * most, rows))


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it, in the same storage."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it on every rank, on this rank's device."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.clone()  # type: ignore[attr-defined]


def sum_shards(values: torch.Tensor) -> torch.Tensor:
    """What each rank found on its own rows, summed over the ranks."""
    dist.all_reduce(values)
    return values


# ----------------------------------------------------------------------------------------------------------- engines


def wrap(module: torch.nn.Module) -> torch.nn.Module:
    """Place ``module`` on this rank's device and, on several ranks, under DDP.

    Raises:
        InputError: Accelerate's settings in the environment ask for another engine.
    """
    if _accelerator is None:
        return module
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # Accelerate's to change
        wrapped = _accelerator.prepare_model(module.to(_accelerator.device))
    _accelerator.free_memory()  # the accelerator would keep every stage's model alive
    if world_size() > 1 and engine_of(wrapped) != "ddp":
        raise InputError(
            f"train.engine: ddp was asked for, but Accelerate made a {type(wrapped).__name__}; unset ACCELERATE_USE_… "
            "in the environment (sharding is train.engine: fsdp2)"
        )
    return wrapped


def engine_of(model: torch.nn.Module) -> Literal["ddp", "fsdp2"] | None:
    """What keeps the ranks' parameters together; None: nothing, there is one rank."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return "ddp"
    return "fsdp2" if hasattr(model, "set_requires_gradient_sync") else None


@contextlib.contextmanager
def lent(precision: str) -> Iterator[None]:
    """In here a library may make an Accelerator of its own: on these ranks, with its own mixed precision (no, bf16).

    Accelerate keeps one state for all Accelerators of a process and refuses a second precision; ours does without it.
    """
    from accelerate.state import AcceleratorState

    state = AcceleratorState._shared_state
    before = state["_mixed_precision"]
    state["_mixed_precision"] = precision
    try:
        yield
    finally:
        state["_mixed_precision"] = before


@contextlib.contextmanager
def accumulating(model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Gradients of the backward in here are averaged over the ranks only if it is the ``last`` of a step."""
    engine: Any = model
    if engine_of(model) == "fsdp2":
        engine.set_requires_gradient_sync(last)
        engine.set_is_last_backward(last)
    with engine.no_sync() if engine_of(model) == "ddp" and not last else contextlib.nullcontext():
        yield

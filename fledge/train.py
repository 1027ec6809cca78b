"""The loop: one ``update`` and one ``fit``, for every method.

An objective is an ``nn.Module`` with

- ``weights: {term: float}``, the loss terms;
- ``counts(batch) -> {name: int}``: how many tokens, patches or pairs each output sums over, known before the forward;
- ``forward(batch, step) -> {name: sum}``: scalar sums of the loss terms, and detached statistics of any shape;
- optionally ``after_step(step, means)``: every sum over its count, over all ranks and micro-batches of the step.

The loop backpropagates Σ weight · sum · world_size / max(count, 1), where DDP averages over the world: the gradient is
that of the global batch, however it was cut. The forward changes no buffer; what a method must remember it changes in
``after_step``.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fledge import checkpoint, distributed, preempt
from fledge.config import Config, Duration, bookkeeping, hardware
from fledge.errors import Preempted, RunError
from fledge.optim import Optim
from fledge.stream import Batch, derive, rows_of, share

if TYPE_CHECKING:
    from fledge.track import Run

Means = dict[str, Tensor]


class TrainConfig(Config):
    """The loop's knobs. Those marked hardware or bookkeeping change no result beyond rounding."""

    batch: PositiveInt
    """Rows of the global batch, over all ranks and micro-batches."""
    steps: Duration
    """Optimiser steps, or e.g. "800 epochs"."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast of the forward; parameters, losses and statistics stay in fp32."""
    micro_batch: PositiveInt | None = hardware(None)
    """The most rows of one forward on one rank; None: all of them."""
    workers: int = hardware(0, ge=0)
    """Processes that prepare batches ahead; 0: none."""
    device: Literal["auto", "cuda", "mps", "cpu"] = hardware("auto")
    grad_checkpointing: bool = hardware(False)
    """Recompute each block's activations in the backward."""
    compile: bool = hardware(False)
    """torch.compile on each backbone block; on CPU the first step takes about a minute."""
    deterministic: bool = hardware(False)
    """Only deterministic kernels (needed for bitwise resume on GPUs)."""
    log_every: PositiveInt = bookkeeping(1)
    save_every: PositiveInt = bookkeeping(100)
    keep: PositiveInt = bookkeeping(2)
    """Checkpoints that stay on disk."""
    eval_every: int = bookkeeping(0, ge=0)
    """Steps between evaluations while training; 0: none."""


def autocast(precision: str) -> contextlib.AbstractContextManager:
    """The forward's precision on this rank's device; rollouts and evaluations use it too."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(distributed.device().type, dtype=torch.bfloat16)


def unwrap(model: nn.Module) -> Any:
    """The objective inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def backward(
    model: nn.Module, micro_batches: list[Batch], step: int, *, seed: int = 0, precision: str = "fp32"
) -> Means:
    """Accumulate the exact gradient of the global batch; returns every output's global mean.

    Counts are summed over ranks and micro-batches first, so terms with different denominators stay exact.
    """
    objective, world = unwrap(model), distributed.world_size()
    local = [objective.counts(micro_batch) for micro_batch in micro_batches]
    counts = distributed.all_reduce_counts({name: sum(c[name] for c in local) for name in local[0]})
    sums: dict[str, Tensor] = {}
    for i, micro_batch in enumerate(micro_batches):
        torch.manual_seed(derive("dropout", seed, step, distributed.rank(), i))
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last or model is objective else model.no_sync():  # type: ignore[operator]
            with autocast(precision):
                outputs = model(micro_batch, step)
            losses = [weight * outputs[name] / max(counts[name], 1) for name, weight in objective.weights.items()]
            (world * torch.stack(losses).sum()).backward()
        for name, value in outputs.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    sums = distributed.all_reduce_sum(sums)
    return {name: value / max(counts[name], 1) for name, value in sums.items()}


def update(
    model: nn.Module, micro_batches: list[Batch], step: int, optim: Optim, *, seed: int = 0, precision: str = "fp32"
) -> tuple[Means, Tensor]:
    """One optimiser step on the global batch of which this rank holds ``micro_batches``.

    Returns:
        The means over the global batch, and the gradient norm before clipping, ().

    Raises:
        RunError: a loss or the gradient is not finite. The parameters are as they were before the step.
    """
    optim.zero_grad()
    means = backward(model, micro_batches, step, seed=seed, precision=precision)
    norm = optim.prepare(step)
    objective = unwrap(model)
    bad = [name for name in objective.weights if not math.isfinite(means[name])]
    if bad or not math.isfinite(norm):
        what = f"{bad[0]} is {means[bad[0]].item()}" if bad else f"the gradient norm is {norm.item()}"
        raise RunError(f"step {step}: {what}. Nothing was updated")
    optim.step()
    if hasattr(objective, "after_step"):
        with torch.no_grad():
            objective.after_step(step, means)
    return means, norm


@preempt.held()  # a signal waits for a step boundary
def fit(
    objective: nn.Module,
    stream: Any,
    optim: Optim,
    config: TrainConfig,
    run: "Run",
    *,
    steps: int,
    seed: int,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """Train for ``steps`` optimiser steps, going on from the run's newest verified checkpoint.

    Raises:
        RunError: a loss or the gradient is not finite.
        Preempted: a signal asked some rank to stop; the step that was under way is done and saved.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    blocks = repeated_blocks(objective)
    if config.grad_checkpointing:
        checkpoint_blocks(blocks)
    if config.compile:
        for block in blocks:
            block.compile()
    model = distributed.wrap(objective)
    start = resume(objective, optim, stream, run)
    model.train()  # transformers reads models in eval mode; an objective that wants no dropout overrides train()
    batches = load_ahead(stream, range(start, steps), config)
    warm = distributed.world_size() == 1
    with run.progress(steps, start) as progress:
        for step in range(start, steps):
            began = time.perf_counter()
            stream.begin(step)
            batch, micro = next(batches)
            waited = time.perf_counter() - began
            if batch is not None:
                batch = {name: tensor.to(distributed.device(), non_blocking=True) for name, tensor in batch.items()}
                micro_batches = [rows_of(batch, piece) for piece in micro]
                if not warm:
                    warm = settle_buckets(model, micro_batches[-1], step, config.precision)
                try:
                    means, norm = update(model, micro_batches, step, optim, seed=seed, precision=config.precision)
                except RunError as error:
                    raise RunError(explain(error, step, run)) from None
                stream.observe(step, means)
                values = scalars(means, unwrap(model).weights) | {"grad_norm": norm.item(), "lr": optim.lr(step)}
                seconds = time.perf_counter() - began
                if step % config.log_every == 0 or step == steps - 1:
                    timing = {"time/step": seconds, "time/data": waited, "time/rows_per_second": stream.batch / seconds}
                    run.log(step, {f"train/{name}": value for name, value in values.items()} | timing)
                progress.update(values, rows=stream.batch)
            else:
                progress.update()
            if evaluate and config.eval_every and (step + 1) % config.eval_every == 0:
                run.log(step, {f"eval/{name}": value for name, value in evaluate(step).items()})
                model.train()
            stopping = distributed.any_rank(preempt.asked() is not None)
            if stopping or (step + 1) % config.save_every == 0 or step + 1 == steps:
                save(objective, optim, stream, run, step + 1, config.keep)
            if stopping:
                raise Preempted(f"{run.name}: stopped by {preempt.asked() or 'another rank'}, saved at step {step + 1}")


def explain(error: RunError, step: int, run: "Run") -> str:
    kept = run.dir / "checkpoints"
    return (
        f"{run.name}: {error}. The last checkpoints are kept in {kept}. A lower optim.lr, a longer optim.warmup, "
        "optim.clip or precision: fp32 usually helps; a changed value starts a new run beside this one"
    )


def scalars(means: Means, weights: dict[str, float]) -> dict[str, float]:
    """What is logged: the means that are one number, and ``loss``, the weighted sum of the loss terms."""
    values = {name: value.item() for name, value in means.items() if value.numel() == 1}
    return {"loss": sum(weight * values[name] for name, weight in weights.items())} | values


# ---------------------------------------------------------------------------------------------------------- resume


def save(objective: nn.Module, optim: Optim, stream: Any, run: "Run", step: int, keep: int) -> None:
    """Save everything that step ``step`` depends on: parameters, buffers, optimiser, and the stream's own state."""
    tensors, state = stream.state()
    parts = {
        "model": checkpoint.module_tensors(objective),
        "optim": checkpoint.optimizer_tensors(optim.optimizer, objective),
        "stream": tensors,
    }
    checkpoint.save(run.dir / "checkpoints", step, parts, {"stream": state}, keep)


def resume(objective: nn.Module, optim: Optim, stream: Any, run: "Run") -> int:
    """Load the newest verified checkpoint, if there is one, and return the step to go on with."""
    found = checkpoint.newest(run.dir / "checkpoints")
    if found is None:
        run.truncate(0)
        return 0
    checkpoint.load_module(objective, found.tensors("model"))
    checkpoint.load_optimizer(optim.optimizer, objective, found.tensors("optim"))
    stream.load(found.tensors("stream"), found.state["stream"])
    run.truncate(found.step)
    run.say(f"resumed at step {found.step} from {found.path}")
    return found.step


def settle_buckets(model: nn.Module, micro_batch: Batch, step: int, precision: str) -> bool:
    """One discarded backward, so that DDP orders its buckets before the first step that counts.

    DDP rebuilds its buckets after a process's first backward, which changes the order of sums from 4 ranks on; without
    this a resumed run would differ from an uninterrupted one.
    """
    counts = unwrap(model).counts(micro_batch)
    with autocast(precision):
        outputs = model(micro_batch, step)
    torch.stack([outputs[name] / max(counts[name], 1) for name in unwrap(model).weights]).sum().backward()
    model.zero_grad(set_to_none=True)
    return True


# ------------------------------------------------------------------------------------------------------------ data


class _Steps(torch.utils.data.Dataset):
    """This rank's rows of each step's global batch, as a map from step, for the loader's workers."""

    def __init__(self, stream: Any, config: TrainConfig, rank: int, world: int) -> None:
        self.stream, self.config, self.rank, self.world = stream, config, rank, world

    def __getitem__(self, step: int) -> tuple[Batch | None, list[slice]]:
        ids = self.stream.ids(step)
        if ids is None:
            return None, []
        mine, micro = share(len(ids), self.rank, self.world, self.config.micro_batch)
        return self.stream.fetch(ids[mine], step), micro


def load_ahead(stream: Any, steps: Iterable[int], config: TrainConfig) -> Iterator[tuple[Batch | None, list[slice]]]:
    """This rank's (batch, micro-batch slices) of each step; workers prepare ahead, unless the stream is on-policy."""
    data = _Steps(stream, config, distributed.rank(), distributed.world_size())
    if config.workers == 0 or stream.on_policy:
        return (data[step] for step in steps)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        sampler=list(steps),
        num_workers=config.workers,
        generator=torch.Generator(),  # its own, or building the iterator would draw from the global one
        pin_memory=distributed.device().type == "cuda",
    )
    return iter(loader)


# ---------------------------------------------------------------------------------------------------------- blocks


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The backbone's blocks: children of lists or sequences that hold several modules of one class with parameters."""
    found: list[nn.Module] = []
    for parent in module.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            children = list(parent)
            alike = len({type(child) for child in children}) == 1 and len(children) > 1
            if alike and any(True for _ in children[0].children()):
                found += children
    return found


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Recompute each block's activations in the backward, with its dropout drawn again from the same state."""

    def recomputed(forward: Callable, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return recompute(forward, *args, use_reentrant=False, **kwargs)

    for block in blocks:
        block.forward = functools.partial(recomputed, block.forward)  # type: ignore[method-assign]

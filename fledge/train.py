"""The loop: one ``update`` and one ``fit``, for every method.

An objective is an ``nn.Module`` with

- ``weights: {term: float}``, the loss terms;
- ``counts(batch) -> {name: int}``: how many tokens, patches or pairs each output sums over, known before the forward;
- ``forward(batch, step) -> {name: sum}``: scalar sums of the loss terms, and detached statistics of any shape;
- optionally ``after_step(step, means)``: every sum over its count, over all ranks and micro-batches of the step.
- optionally ``tokens(batch) -> int``: how many tokens it holds, for the tokens a second.

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
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fledge import checkpoint, distributed, preempt
from fledge.config import Config, Duration, bookkeeping, hardware, nearest
from fledge.errors import InputError, Preempted, RunError
from fledge.health import Nonfinite, NotFinite, Policy, Watchdog, same_everywhere
from fledge.optim import Optim
from fledge.stream import Batch, derive, rows_of, share
from fledge.throughput import Meter

if TYPE_CHECKING:
    from fledge.track import Run

Means = dict[str, Tensor]
Best = dict[str, Any]
"""{metric, mode, value, step}: the best evaluation so far, and the checkpoint that it is of."""


class Select(Config):
    """Which checkpoint becomes the artifact, instead of the last."""

    metric: str = Field(pattern="^eval/.")
    """A number that the stage measures every `eval_every` steps, as metrics.jsonl has it: `eval/knn_top1`."""
    mode: Literal["min", "max"]
    """Whether less or more is better; of equal ones the first is taken."""


class TrainConfig(Config):
    """The loop's knobs. Those marked hardware or bookkeeping change no result beyond rounding."""

    batch: PositiveInt
    """Rows of the global batch, over all ranks and micro-batches."""
    steps: Duration
    """Optimiser steps, or e.g. "800 epochs"."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast of the forward; parameters, losses and statistics stay in fp32."""
    select: Select | None = None
    """Hand over the best checkpoint by a metric; None: the last step."""
    on_nonfinite: Policy = "stop"
    """When a loss or the gradient is not finite, on any rank: stop; skip the step, ending after ten in a row; or roll
    back to the newest checkpoint, once for each, and leave out the batches that led from there to here."""
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
    watchdog: PositiveFloat | None = bookkeeping(None)
    """Seconds after which a process in which no step, evaluation or save ends is ended itself; None: never."""
    drift_every: int = bookkeeping(0, ge=0)
    """Steps between comparisons of the ranks' parameters, which should be the same to the last bit; 0: none."""

    @model_validator(mode="after")
    def _something_to_select_by(self) -> "TrainConfig":
        if self.select is not None and not self.eval_every:
            raise ValueError("select needs eval_every: the steps between the evaluations that it chooses by")
        return self

    def also_science(self) -> set[str]:
        """Only what was evaluated can be chosen."""
        return {"eval_every"} if self.select is not None else set()


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
        NotFinite: a loss or the gradient is not finite. The parameters are as they were before the step.
    """
    optim.zero_grad()
    means = backward(model, micro_batches, step, seed=seed, precision=precision)
    norm = optim.prepare(step)
    objective = unwrap(model)
    bad = [name for name in objective.weights if not math.isfinite(means[name])]
    if bad or not math.isfinite(norm):
        what = f"{bad[0]} is {means[bad[0]].item()}" if bad else f"the gradient norm is {norm.item()}"
        raise NotFinite(f"step {step}: {what}. Nothing was updated")
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

    With ``config.select`` the objective ends as the best evaluation saw it. In an export nothing is trained: the
    objective is as the exported checkpoint has it.

    Raises:
        InputError: ``select`` names what is not measured.
        RunError: a loss or the gradient is not finite, and ``on_nonfinite`` has no more to offer; out of memory; the
            ranks' parameters differ; or a checkpoint could not be written.
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
    if run.export is not None:
        take(objective, run.export.checkpoint, steps, "exported", run)
        return
    odd = Nonfinite(config.on_nonfinite)
    start, best = resume(objective, optim, stream, run, odd)
    if config.select is not None:
        check_select(config.select, evaluate, start)
    step = start
    model.train()  # transformers reads models in eval mode; an objective that wants no dropout overrides train()
    batches = load_ahead(stream, range(start, steps), config)
    warm, meter = distributed.world_size() == 1, Meter(objective, config, run)
    with run.progress(steps, start) as progress, Watchdog(config.watchdog, run.dir / "logs") as watchdog:
        while step < steps:
            watchdog.beat(f"step {step}")
            began = time.perf_counter()
            stream.begin(step)
            batch, micro = next(batches)
            waited = time.perf_counter() - began
            if step in odd.left_out:
                batch = None
                run.log(step, {"train/nonfinite": odd.total})
            if batch is not None:
                batch = {name: tensor.to(distributed.device(), non_blocking=True) for name, tensor in batch.items()}
                micro_batches = [rows_of(batch, piece) for piece in micro]
                try:
                    if not warm:
                        warm = settle_buckets(model, micro_batches[-1], step, config.precision)
                    meter.count(settle_buckets, micro_batches[0], step)
                    means, norm = update(model, micro_batches, step, optim, seed=seed, precision=config.precision)
                except torch.OutOfMemoryError as error:
                    raise RunError(out_of_memory(error, step, micro, config, run)) from None
                except NotFinite as error:
                    resumed, best = recover(error, step, odd, best, objective, optim, stream, run)
                    if resumed <= step:
                        step, batches = resumed, load_ahead(stream, range(resumed, steps), config)
                        progress.step = resumed
                        meter = Meter(objective, config, run)
                        continue
                    progress.update()
                else:
                    odd.in_a_row = 0
                    stream.observe(step, means)
                    values = scalars(means, unwrap(model).weights) | {"grad_norm": norm.item(), "lr": optim.lr(step)}
                    seconds = time.perf_counter() - began
                    if step % config.log_every == 0 or step == steps - 1:
                        logged = {f"train/{name}": value for name, value in values.items()}
                        cost = meter.read(logged, batch, rows=stream.batch, seconds=seconds, waited=waited)
                        run.log(step, logged | cost)
                    progress.update(values, rows=stream.batch)
            else:
                progress.update()
            step += 1
            last, best_before = step == steps, best
            if config.drift_every and step % config.drift_every == 0:
                same_everywhere(checkpoint.module_tensors(objective), step - 1)
            if evaluate and config.eval_every and (step % config.eval_every == 0 or last and config.select):
                watchdog.beat(f"the evaluation after step {step - 1}")
                measured = {f"eval/{name}": value for name, value in evaluate(step - 1).items()}
                run.log(step - 1, measured)
                model.train()
                best = better(config.select, best, step, measured)
            stopping = distributed.any_rank(preempt.asked() is not None)
            if stopping or last or step % config.save_every == 0 or best is not best_before:
                watchdog.beat(f"the save after step {step - 1}")
                save(objective, optim, stream, run, step, config.keep, odd, best)
            if stopping:
                raise Preempted(f"{run.name}: stopped by {preempt.asked() or 'another rank'}, saved at step {step}")
    if config.select is not None:
        if best is None:
            raise RunError(f"{run.name}: {config.select.metric} was never a finite number: no checkpoint is the best")
        chosen = checkpoint.find(run.dir / "checkpoints", best["step"])
        take(objective, chosen, steps, f"the best by {config.select.metric}, {best['value']:.6g}", run)


def recover(
    error: NotFinite,
    step: int,
    odd: Nonfinite,
    best: Best | None,
    objective: nn.Module,
    optim: Optim,
    stream: Any,
    run: "Run",
) -> tuple[int, Best | None]:
    """Do what ``on_nonfinite`` says about a step that was not finite; returns the step to go on with, and the best one.

    Raises:
        RunError: nothing is left to do about it.
    """
    try:
        odd.met()
        if odd.policy == "skip":
            run.log(step, {"train/nonfinite": odd.total})
            run.say(f"{error}; it is skipped ({odd.total} so far)")
            return step + 1, best
        found = checkpoint.newest(run.dir / "checkpoints")
        odd.back(found.step if found else None, step)
    except RunError as reason:
        raise RunError(explain(error, reason, run)) from None
    run.say(f"{error}; back to the last checkpoint, and on without the batches of steps {odd.left_out[0]} to {step}")
    return resume(objective, optim, stream, run)


def explain(error: NotFinite, reason: RunError, run: "Run") -> str:
    kept = run.dir / "checkpoints"
    return (
        f"{run.name}: {error}; {reason}. The last checkpoints are kept in {kept}. A lower optim.lr, a longer "
        "optim.warmup, optim.clip or precision: fp32 usually helps; a changed value starts a new run beside this one"
    )


def out_of_memory(error: Exception, step: int, micro: list[slice], config: TrainConfig, run: "Run") -> str:
    """What to change: first what leaves the result as it is."""
    rows, most = sum(m.stop - m.start for m in micro), max(m.stop - m.start for m in micro)
    pieces = -(-rows // max(most - 1, 1))
    helps = [f"train.micro_batch={-(-rows // pieces)}"] if most > 1 else []
    helps += ["train.grad_checkpointing=true"] if not config.grad_checkpointing else []
    helps += ["train.precision=bf16 (another run)"] if config.precision == "fp32" else []
    first = str(error).partition(". ")[0].partition("\n")[0][:200]
    return (
        f"{run.name}: step {step}: out of memory with micro-batches of {most} rows ({first}). The largest to try next: "
        f"{', or '.join(helps) or 'a smaller model'}; the same command then goes on from the last checkpoint"
    )


def scalars(means: Means, weights: dict[str, float]) -> dict[str, float]:
    """What is logged: the means that are one number, and ``loss``, the weighted sum of the loss terms."""
    values = {name: value.item() for name, value in means.items() if value.numel() == 1}
    return {"loss": sum(weight * values[name] for name, weight in weights.items())} | values


# ---------------------------------------------------------------------------------------------------------- resume


def save(
    objective: nn.Module,
    optim: Optim,
    stream: Any,
    run: "Run",
    step: int,
    keep: int,
    odd: Nonfinite,
    best: Best | None = None,
) -> None:
    """Save all that step ``step`` depends on: parameters, buffers, optimiser, the stream's own state, which steps were
    not finite, and which checkpoint was the best so far. That one is not pruned."""
    tensors, state = stream.state()
    parts = {
        "model": checkpoint.module_tensors(objective),
        "optim": checkpoint.optimizer_tensors(optim.optimizer, objective),
        "stream": tensors,
    }
    states = {"stream": state, "nonfinite": odd.state()} | ({"best": best} if best else {})
    checkpoint.save(run.dir / "checkpoints", step, parts, states, keep, best["step"] if best else None)
    run.note_best(best)


def resume(
    objective: nn.Module, optim: Optim, stream: Any, run: "Run", odd: Nonfinite | None = None
) -> tuple[int, Best | None]:
    """Load the newest verified checkpoint, if there is one; the step to go on with, and the best one until there.

    A run that rolls back keeps its own ``odd``, which knows why.
    """
    found = checkpoint.newest(run.dir / "checkpoints")
    if found is None:
        run.truncate(0)
        run.note_best(None)
        return 0, None
    checkpoint.load_module(objective, found.tensors("model"))
    checkpoint.load_optimizer(optim.optimizer, objective, found.tensors("optim"))
    stream.load(found.tensors("stream"), found.state["stream"])
    if odd is not None:
        odd.load(found.state["nonfinite"])
    run.truncate(found.step)
    run.say(f"resumed at step {found.step} from {found.path}")
    best = found.state.get("best")
    run.note_best(best)
    return found.step, best


def take(objective: nn.Module, found: checkpoint.Checkpoint, steps: int, why: str, run: "Run") -> None:
    """Put a checkpoint's parameters and buffers into the objective: it is what will be handed over."""
    checkpoint.load_module(objective, found.tensors("model"))
    run.taken = {"step": found.step, "of": steps, "why": why}
    run.say(f"step {found.step} of {steps} is handed over ({why})")


# ---------------------------------------------------------------------------------------------------------- select


def check_select(select: Select, evaluate: Callable[[int], dict[str, float]] | None, start: int) -> None:
    """Refuse at once a metric that is never measured; a run that has begun was looked at when it began."""
    if evaluate is None:
        raise InputError(
            f"train.select: {select.metric} is not measured while this stage trains; give it something to evaluate on, "
            "or leave select out"
        )
    names = [f"eval/{name}" for name in evaluate(0)] if start == 0 else [select.metric]
    if select.metric not in names:
        raise InputError(
            f"train.select.metric: {select.metric} is not measured; expected one of {', '.join(names)}"
            f"{nearest(select.metric, names)}"
        )


def better(select: Select | None, best: Best | None, step: int, measured: dict[str, float]) -> Best | None:
    """The best until now: ``best`` itself, or what was measured behind ``step`` steps if that is truly better."""
    if select is None:
        return best
    value = distributed.broadcast_object(float(measured[select.metric]))  # all ranks save, or none does
    sign = 1 if select.mode == "max" else -1
    if not math.isfinite(value) or best is not None and sign * value <= sign * best["value"]:
        return best
    return {"metric": select.metric, "mode": select.mode, "value": value, "step": step}


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

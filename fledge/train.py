"""The loop: one ``update`` and one ``fit``, for every method.

An objective is an ``nn.Module`` with

- ``weights: {term: float}``, the loss terms;
- ``counts(batch) -> {name: int}``: how many tokens, patches or pairs each output sums over, known before the forward;
- ``forward(batch, step) -> {name: sum}``: scalar sums of the loss terms, and detached statistics of any shape;
- optionally ``after_step(step, means)``: every sum over its count, over all ranks and micro-batches of the step;
- optionally ``tokens(batch) -> int``: how many tokens it holds, for the tokens a second;
- optionally ``constant() -> tensors``: what never changes and is read from a parent again; no checkpoint holds it.

The loop backpropagates Σ weight · sum · world_size / max(count, 1), where DDP averages over the world: the gradient is
that of the global batch, however it was cut. The forward changes no buffer; what a method must remember it changes in
``after_step``.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fledge import checkpoint, distributed, extend, preempt, sharding
from fledge.config import Config, Duration, bookkeeping, hardware, nearest
from fledge.errors import InputError, Preempted, RunError
from fledge.health import Nonfinite, NotFinite, Policy, Watchdog, same_everywhere
from fledge.models import adapters
from fledge.optim import Optim
from fledge.saver import Saver
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
    micro_batch: PositiveInt | Literal["auto"] | None = hardware(None)
    """The most rows of one forward on one rank; None: all of them; auto: as many as fit, found before step 0."""
    workers: int = hardware(0, ge=0)
    """Processes that prepare batches ahead; 0: none."""
    device: Literal["auto", "cuda", "mps", "cpu"] = hardware("auto")
    engine: Literal["ddp", "fsdp2"] = hardware("ddp")
    """Of several processes each holds all parameters, or (FSDP2) some rows of each, and of gradients and optimiser."""
    grad_checkpointing: bool = hardware(False)
    """Recompute each block's activations in the backward."""
    compile: bool = hardware(False)
    """torch.compile on each backbone block; on CPU the first step takes about a minute."""
    deterministic: bool = hardware(False)
    """Only deterministic kernels (needed for bitwise resume on GPUs)."""
    extend_from: str | None = hardware(None)
    """The folder of a shorter run of the same config, to begin where it was: `fledge/extend.py`."""
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

    @model_validator(mode="after")
    def _engine_is_able(self) -> "TrainConfig":
        if self.engine == "fsdp2" and self.micro_batch == "auto":
            raise ValueError("micro_batch: auto is tried on whole parameters, which engine: fsdp2 lacks; give a number")
        return self

    @property
    def most_rows(self) -> int | None:
        """``micro_batch`` where it is a number, for forwards beside the steps."""
        return None if self.micro_batch == "auto" else self.micro_batch

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
        with distributed.accumulating(model, last):
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
    engine = config.engine if run.export is None else "ddp"  # an export is one process
    training = Training(objective, engine, stream, optim, config, run, steps, seed, evaluate)
    if run.export is not None:
        training.take(run.export.checkpoint, "exported")
        return
    run.note_engine(distributed.engine_of(training.model))
    training.resume()
    if config.select is not None:
        with training.gathered():
            check_select(config.select, evaluate, training.step)
    if config.micro_batch == "auto":
        training.fit_micro_batch()
    training.go_on()
    if config.select is not None:
        training.take_best(config.select)


class Training:
    """One call of ``fit``: where it is, and what its parts share."""

    def __init__(
        self,
        objective: nn.Module,
        engine: Literal["ddp", "fsdp2"],
        stream: Any,
        optim: Optim,
        config: TrainConfig,
        run: "Run",
        steps: int,
        seed: int,
        evaluate: Callable[[int], dict[str, float]] | None,
    ) -> None:
        self.whole = objective  # the stage's own; empty while a copy of it in shards is what trains
        self.model = wrapped(objective, engine, optim, config)
        self.objective, self.stream, self.optim = unwrap(self.model), stream, optim
        self.config, self.run, self.steps, self.seed, self.evaluate = config, run, steps, seed, evaluate
        self.step = 0
        self.odd = Nonfinite(config.on_nonfinite)
        self.best: Best | None = None
        self.found: int | None = None  # the micro-batch that `auto` came to
        self.warm = distributed.engine_of(self.model) != "ddp"
        self.saver, self.stalled = Saver(run.dir / "checkpoints"), 0.0  # seconds, not logged yet
        self.watchdog = Watchdog(config.watchdog, run.dir / "logs")

    def go_on(self) -> None:
        """From ``self.step`` to the end."""
        self.model.train()  # transformers reads models in eval mode; an objective without dropout overrides train()
        self.meter, batches = self.new_meter(), self.batches()
        with self.run.progress(self.steps, self.step) as progress, self.watchdog, self.saver:
            while self.step < self.steps:
                self.watchdog.beat(f"step {self.step}")
                began = time.perf_counter()
                self.stream.begin(self.step)
                batch, micro = next(batches)
                waited = time.perf_counter() - began
                try:
                    values = self.learn(batch, micro)
                except NotFinite as error:
                    if self.rolled_back(error):
                        self.meter, batches, progress.step = self.new_meter(), self.batches(), self.step
                        continue
                    values = {}
                if values and batch is not None:
                    self.log(values, batch, time.perf_counter() - began, waited)
                progress.update(values, rows=self.stream.batch if values else 0)
                self.step += 1
                self.between_steps()

        if self.whole is not self.objective:
            sharding.gather(self.whole, self.objective)

    def new_meter(self) -> Meter:
        return Meter(self.objective, self.config, self.run)

    def gathered(self) -> contextlib.AbstractContextManager:
        """In here the stage's own objective has the parameters as they are now."""
        return sharding.gathered(self.whole, self.objective)

    def batches(self) -> Iterator[tuple[Batch | None, list[slice]]]:
        return load_ahead(self.stream, range(self.step, self.steps), self.config)

    def learn(self, batch: Batch | None, micro: list[slice]) -> dict[str, float]:
        """One update, and its numbers; none where the stream has no rows, or a roll-back leaves the step out.

        Raises:
            NotFinite: as ``update``.
            RunError: out of memory.
        """
        step, config = self.step, self.config
        if step in self.odd.left_out:
            self.run.log(step, {"train/nonfinite": self.odd.total})
            return {}
        if batch is None:
            self.run.log(step, {"train/skipped": 1.0})
            return {}
        batch = {name: tensor.to(distributed.device(), non_blocking=True) for name, tensor in batch.items()}
        micro_batches = [rows_of(batch, piece) for piece in micro]
        try:
            if not self.warm:
                self.warm = settle_buckets(self.model, micro_batches[-1], step, config.precision)
            self.meter.count(settle_buckets, micro_batches[0], step)
            means, norm = update(
                self.model, micro_batches, step, self.optim, seed=self.seed, precision=config.precision
            )
        except torch.OutOfMemoryError as error:
            raise RunError(out_of_memory(error, step, micro, config, self.run)) from None
        self.odd.in_a_row = 0
        self.stream.observe(step, means)
        return scalars(means, self.objective.weights) | {"grad_norm": norm.item(), "lr": self.optim.lr(step)}

    def log(self, values: dict[str, float], batch: Batch, seconds: float, waited: float) -> None:
        if self.step % self.config.log_every == 0 or self.step == self.steps - 1:
            logged = {f"train/{name}": value for name, value in values.items()}
            cost = self.meter.read(logged, batch, rows=self.stream.batch, seconds=seconds, waited=waited)
            if self.stalled:
                cost["time/save"], self.stalled = self.stalled, 0.0
            self.run.log(self.step, logged | cost)

    def between_steps(self) -> None:
        """Whatever is due behind ``self.step`` steps: look whether the ranks agree, evaluate, save, leave.

        Raises:
            RunError: the ranks' parameters differ, or a checkpoint could not be written.
            Preempted: some rank was asked to stop.
        """
        step, config = self.step, self.config
        last, improved = step == self.steps, False
        if config.drift_every and step % config.drift_every == 0:
            same_everywhere(checkpoint.module_tensors(self.objective), step - 1)
        if self.evaluate and config.eval_every and (step % config.eval_every == 0 or last and config.select):
            improved = self.measure(self.evaluate)
        stopping, failed = distributed.each_on_any_rank(preempt.asked() is not None, self.saver.failed)
        if failed:
            self.saver.wait()
        due = step % config.save_every == 0 or step == self.optim.same_until
        if stopping or last or improved or due:
            self.watchdog.beat(f"the save after step {step - 1}")
            self.save()
        if stopping:
            self.saver.wait()
            raise Preempted(f"{self.run.name}: stopped by {preempt.asked() or 'another rank'}, saved at step {step}")

    def measure(self, evaluate: Callable[[int], dict[str, float]]) -> bool:
        """Evaluate the last step; whether it is the best one so far."""
        self.watchdog.beat(f"the evaluation after step {self.step - 1}")
        with self.gathered():
            measured = {f"eval/{name}": value for name, value in evaluate(self.step - 1).items()}
        self.run.log(self.step - 1, measured)
        self.model.train()
        before, self.best = self.best, better(self.config.select, self.best, self.step, measured)
        return self.best is not before

    def rolled_back(self, error: NotFinite) -> bool:
        """Do what ``on_nonfinite`` says: True where the run has gone back, False where it leaves out this step.

        Raises:
            RunError: nothing is left to do about it.
        """
        step, run, odd = self.step, self.run, self.odd
        try:
            odd.met()
            if odd.policy == "skip":
                run.log(step, {"train/nonfinite": odd.total})
                run.say(f"{error}; it is skipped ({odd.total} so far)")
                return False
            self.saver.wait()
            found = checkpoint.newest(run.dir / "checkpoints")
            odd.back(found.step if found else None, step)
        except RunError as reason:
            raise RunError(explain(error, reason, run)) from None
        run.say(f"{error}; back to the last checkpoint, and on without the batches of {odd.left_out[0]} to {step}")
        self.resume(rolling_back=True)
        return True

    # -- checkpoints

    def save(self) -> None:
        """Save all that the next step depends on: parameters, buffers, optimiser, the stream's own state, which steps
        were not finite, and which checkpoint was the best so far. That one is not pruned.

        Raises:
            RunError: the save before could not be written.
        """
        began = time.perf_counter()
        tensors, state = self.stream.state()
        parts = {
            "model": checkpoint.changing_tensors(self.objective),
            "optim": checkpoint.optimizer_tensors(self.optim.optimizer, self.objective),
            "stream": tensors,
        }
        states = {"stream": state, "nonfinite": self.odd.state(), "as_longer": self.step <= self.optim.same_until}
        states |= {"best": self.best} if self.best else {}
        states |= {"micro_batch": self.found} if self.found else {}
        spare = {self.optim.same_until} | ({self.best["step"]} if self.best else set())
        note = functools.partial(self.run.note_best, self.best)
        self.saver.save(self.step, parts, states, self.config.keep, spare, published=note)
        self.stalled += time.perf_counter() - began

    def resume(self, rolling_back: bool = False) -> None:
        """Load the newest verified checkpoint, if there is one. A run that rolls back keeps its own ``odd``, which
        knows why."""
        found = checkpoint.newest(self.run.dir / "checkpoints")
        begins = self.config.extend_from if found is None else None
        if begins is not None:
            found = self.origin(begins)
        if found is not None:
            checkpoint.load_module(self.objective, found.stored("model"))
            checkpoint.load_optimizer(self.optim.optimizer, self.objective, found.stored("optim"))
            self.stream.load(found.tensors("stream"), found.state["stream"])
            if not rolling_back:
                self.odd.load(found.state["nonfinite"])
            self.found = found.state.get("micro_batch")
            self.run.say(f"resumed at step {found.step} from {found.path}")
        self.step = found.step if found else 0
        # The best of another run is no checkpoint of this one.
        self.best = found.state.get("best") if found and begins is None else None
        self.run.truncate(self.step, Path(begins) if begins else None)
        self.run.note_best(self.best)

    def origin(self, folder: str) -> checkpoint.Checkpoint:
        """The checkpoint of a shorter run that this one begins from.

        Raises:
            InputError: this run is no longer than that.
        """
        step, exact = extend.origin(folder)
        if step >= self.steps:
            raise InputError(f"train.extend_from: {folder} is at step {step}, train.steps {self.steps}; ask for more")
        if not exact:
            self.run.say(
                f"the rate of {folder} followed from its length; from step {step} on it is that of the longer run, but "
                "the end is not what it would have been from the first step"
            )
        return checkpoint.find(Path(folder) / "checkpoints", step)

    def fit_micro_batch(self) -> None:
        """Halve the rows of a forward until a step fits in memory beside the optimiser's state, on every rank.

        What an earlier process of this run found is tried first: another number is the same but for rounding, the same
        one is the same bit for bit. Tried without DDP, where a rank without memory would leave the others waiting.

        Raises:
            InputError: the rows are made by the model itself.
            RunError: not even one row fits.
        """
        if self.stream.on_policy:
            raise InputError(
                "train.micro_batch: auto tries the first batch, but here the model makes it; give a number"
            )
        whole = self.config.model_copy(update={"micro_batch": None})
        batch, pieces = _Steps(self.stream, whole, distributed.rank(), distributed.world_size())[self.step]
        assert batch is not None
        rows = pieces[0].stop
        most = min(self.found or rows, rows)
        while distributed.any_rank(not self.fits(rows_of(batch, slice(0, most)))):
            if most == 1:
                raise RunError(f"{self.run.name}: out of memory with one row; train.grad_checkpointing=true may help")
            most = -(-most // 2)
        self.found = most
        self.config = self.config.model_copy(update={"micro_batch": most})
        self.run.say(f"micro-batches of {most} rows" + (" (a whole rank's)" if most == rows else ""))

    def fits(self, rows: Batch) -> bool:
        """Is there memory for forward, backward and optimiser state? Nothing is learned."""
        device = distributed.device()
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        copies = 0 if self.optim.optimizer.state else 2  # Adam's two averages; DDP's flat gradients come on top
        copies += distributed.world_size() > 1
        try:
            held = [torch.empty_like(p) for p in parameters for _ in range(copies)]
            backward_alone(self.objective, {k: x.to(device) for k, x in rows.items()}, self.step, self.config.precision)
            del held
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optim.zero_grad()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def take(self, found: checkpoint.Checkpoint, why: str) -> None:
        """Put a checkpoint's parameters and buffers into the objective: it is what will be handed over."""
        checkpoint.load_module(self.whole, found.stored("model"))
        self.run.taken = {"step": found.step, "of": self.steps, "why": why}
        self.run.say(f"step {found.step} of {self.steps} is handed over ({why})")

    def take_best(self, select: Select) -> None:
        if self.best is None:
            raise RunError(f"{self.run.name}: {select.metric} was never a finite number: no checkpoint is the best")
        chosen = checkpoint.find(self.run.dir / "checkpoints", self.best["step"])
        self.take(chosen, f"the best by {select.metric}, {self.best['value']:.6g}")


def wrapped(objective: nn.Module, engine: str, optim: Optim, config: TrainConfig) -> nn.Module:
    """What is called in training: the objective, under DDP on several ranks; or its copy in shards."""
    if engine == "fsdp2":
        return sharding.shard(objective, optim.optimizer, lambda module: prepared_blocks(module, config))
    prepared_blocks(objective, config)
    return distributed.wrap(objective)


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
    backward_alone(model, micro_batch, step, precision)
    model.zero_grad(set_to_none=True)
    return True


def backward_alone(model: nn.Module, micro_batch: Batch, step: int, precision: str) -> None:
    """Forward and backward of these rows, for their side effects: the gradient is that of no global batch."""
    counts = unwrap(model).counts(micro_batch)
    with autocast(precision):
        outputs = model(micro_batch, step)
    torch.stack([outputs[name] / max(counts[name], 1) for name in unwrap(model).weights]).sum().backward()


# ------------------------------------------------------------------------------------------------------------ data


class _Steps(torch.utils.data.Dataset):
    """This rank's rows of each step's global batch, as a map from step, for the loader's workers."""

    def __init__(self, stream: Any, config: TrainConfig, rank: int, world: int) -> None:
        self.stream, self.config, self.rank, self.world = stream, config, rank, world

    def __getitem__(self, step: int) -> tuple[Batch | None, list[slice]]:
        ids = self.stream.ids(step)
        if ids is None:
            return None, []
        mine, micro = share(len(ids), self.rank, self.world, self.config.most_rows)
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


def prepared_blocks(module: nn.Module, config: TrainConfig) -> list[nn.Module]:
    """The backbone's blocks, with what the config wants of them."""
    blocks = repeated_blocks(module)
    if config.grad_checkpointing:
        checkpoint_blocks(blocks)
    if config.compile:
        for block in blocks:
            block.compile()
    return blocks


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Recompute each block's activations in the backward, with its dropout drawn again from the same state and with
    the adapters of its forward."""

    def recomputed(block: nn.Module, forward: Callable, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return recompute(adapters.as_now(block, forward), *args, use_reentrant=False, **kwargs)

    for block in blocks:
        block.forward = functools.partial(recomputed, block, block.forward)  # type: ignore[method-assign]

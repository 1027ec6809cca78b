"""What a step took and what it gave: time, rows and tokens, memory, the share of the device's peak, spikes of the loss.

It reads beside the training: no parameter, no random number and no order of sums depends on it. Times, memory and the
share of the peak are of this process, rank 0's in metrics.jsonl; rows and tokens are those of all ranks.
"""

import contextlib
import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from fledge import distributed
from fledge.stream import Batch
from fledge.track import read_metrics

if TYPE_CHECKING:
    from fledge.track import Run
    from fledge.train import TrainConfig

GIB = 2**30

# Dense TFLOP/s by the whole name that CUDA gives a device: (bf16 with fp32 accumulation, fp32 without TF32). From
# NVIDIA's datasheets (where they print tensor cores "with sparsity", half of it) and, for GeForce, the whitepapers of
# GA102 and Ada. None: the device has no bf16 units. A slice (MIG) or a laptop's chip has another name, and is unknown.
PEAKS: dict[str, tuple[float | None, float]] = {
    r"NVIDIA B200": (2250, 80),
    r"NVIDIA (H200|GH200 480GB|H100 80GB HBM3)": (989, 67),
    r"NVIDIA H(100|200) NVL": (835, 60),
    r"NVIDIA H100 PCIe": (756, 51),
    r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe": (312, 19.5),
    r"NVIDIA L40S": (362, 91.6),
    r"NVIDIA L40": (181, 90.5),
    r"NVIDIA A30": (165, 10.3),
    r"NVIDIA A40": (149.7, 37.4),
    r"NVIDIA A10": (125, 31.2),
    r"NVIDIA L4": (121, 30.3),
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6),
    r"NVIDIA GeForce RTX 3090": (71, 35.6),
    r"Tesla V100-SXM2-(16|32)GB": (None, 15.7),
    r"Tesla T4": (None, 8.1),
}


def peak_flops(name: str, precision: str) -> float | None:
    """The dense peak of the device called ``name``, in FLOP/s; None where it is not known, which is never guessed."""
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32: another peak, and not for every operation
    found = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
    peak = found and found[precision == "fp32"]
    return peak * 1e12 if peak else None


def here(precision: str) -> float | None:
    """The peak of this rank's device."""
    device = distributed.device()
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


# ------------------------------------------------------------------------------------------------------------- spikes


class Spikes:
    """How many steps had a loss or a gradient norm more than 6 standard deviations above the mean of the 128 before.

    The rule of OLMo-core (StabilityMonitorCallback, https://github.com/allenai/OLMo-core): none before the window is
    full. The steps are those that are logged, so that metrics.jsonl holds the window of a run that goes on.
    """

    WINDOW, DEVIATIONS = 128, 6.0
    KEYS = ("train/loss", "train/grad_norm")

    def __init__(self, records: Sequence[dict[str, Any]] = ()) -> None:
        """Go on behind ``records``, those of a metrics.jsonl."""
        self.windows = {key: deque(maxlen=self.WINDOW) for key in self.KEYS}
        self.total = 0
        for record in records:
            self.total = record.get("train/spikes", self.total)
            self._keep(record)

    def see(self, values: dict[str, float]) -> int:
        """The number of such steps, after one more."""
        self.total += any(self._above(values[key], window) for key, window in self.windows.items())
        self._keep(values)
        return self.total

    def _keep(self, values: dict[str, Any]) -> None:
        for key, window in self.windows.items():
            if values.get(key) is not None:
                window.append(values[key])

    def _above(self, value: float, window: deque[float]) -> bool:
        if len(window) < self.WINDOW:
            return False
        mean = sum(window) / len(window)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / len(window))
        return deviation > 1e-10 and value > mean + self.DEVIATIONS * deviation


# -------------------------------------------------------------------------------------------------------------- meter


class Meter:
    """The figures of each logged step, beside its losses. A new one for each start, and after each roll-back."""

    def __init__(self, objective: nn.Module, config: "TrainConfig", run: "Run") -> None:
        self.objective, self.config, self.main = objective, config, run.main
        self.spikes = Spikes(read_metrics(run.dir / "metrics.jsonl") if run.main else ())
        self.peak = here(config.precision)
        self.counts = not distributed.any_rank(self.peak is None)  # all or none: its forward may hold collectives
        self.flops = 0.0  # of one token, or of one row where the objective has no tokens
        self.process = psutil.Process()
        if distributed.device().type == "cuda":
            torch.cuda.reset_peak_memory_stats(distributed.device())

    def count(self, discarded: Callable[..., object], micro_batch: Batch, step: int) -> None:
        """Count the FLOPs of a forward and a backward whose gradients ``discarded`` throws away; once, the first time.

        Nothing is counted where some rank's peak is not known. Attention counts as dense, as usual.
        """
        if not self.counts:
            return
        from torch.utils.flop_counter import FlopCounterMode

        self.counts = False
        devices = [distributed.device()] if distributed.device().type == "cuda" else []
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        with torch.random.fork_rng(devices), eager, FlopCounterMode(display=False) as counter:
            discarded(self.objective, micro_batch, step, self.config.precision)
        self.flops = counter.get_total_flops() / max(self.size(micro_batch), 1)

    def size(self, batch: Batch) -> int:
        """Tokens of a batch, or rows where the objective has no tokens."""
        return self.objective.tokens(batch) if self.of_tokens else len(next(iter(batch.values())))  # type: ignore

    @property
    def of_tokens(self) -> bool:
        return hasattr(self.objective, "tokens")

    def read(
        self, values: dict[str, float], batch: Batch, *, rows: int, seconds: float, waited: float
    ) -> dict[str, float]:
        """The figures of a step, by the names that metrics.jsonl has them under.

        Args:
            values: its losses and statistics, as they are logged.
            batch: this rank's rows of it.
            rows: rows of the global batch.
            seconds, waited: what the step took, and of that, what its data took.
        """
        size = self.size(batch) if self.of_tokens or self.flops else 0
        figures = {"time/step": seconds, "time/data": waited, "time/data_share": waited / seconds}
        figures["time/rows_per_second"] = rows / seconds
        if self.of_tokens:
            everywhere = distributed.all_reduce_counts({"tokens": size})["tokens"]
            figures["time/tokens_per_second"] = everywhere / seconds
        if self.flops and self.peak:
            share = self.flops * size / seconds / self.peak
            figures["system/hfu" if self.config.grad_checkpointing else "system/mfu"] = share
        if not self.main:
            return {}
        return figures | {"system/memory_gib": self.memory() / GIB, "train/spikes": self.spikes.see(values)}

    def memory(self) -> int:
        """Bytes: the most that this process had allocated on its GPU since the stage began; elsewhere its RSS now."""
        device = distributed.device()
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else self.process.memory_info().rss

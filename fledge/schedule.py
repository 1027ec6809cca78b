"""Schedules as pure functions of ``step`` (0-based, optimiser steps): nothing to save, nothing to resume."""

import math


def warmup(step: int, *, peak: float, steps: int, offset: int = 0) -> float:
    """Linear warm-up. ``offset`` 0 starts at exactly 0 (MAE); 1 starts above it, (step+1)/(steps+1) (nanoGPT)."""
    return peak * (step + offset) / (steps + offset)


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at ``steps``, constant afterwards."""
    done = min(max(step / max(steps, 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def linear(step: int, *, start: float, end: float, steps: int) -> float:
    """A straight line from ``start`` at step 0 to ``end`` at ``steps``, constant afterwards."""
    done = min(max(step / max(steps, 1), 0.0), 1.0)
    return start + (end - start) * done


def warmup_then(
    decay: str, step: int, *, peak: float, end: float, warmup_steps: int, steps: int, offset: int = 0, cooldown: int = 0
) -> float:
    """Warm up to ``peak``, then ``cosine``, ``linear`` or ``constant`` to ``end`` at ``steps``.

    MAE's util/lr_sched.py is ``cosine`` with offset 0 (per iteration); nanoGPT's get_lr is ``cosine`` with offset 1.
    ``constant`` falls along a line in its last ``cooldown`` steps (Hägele et al. 2024, "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations"), or never.
    """
    if step < warmup_steps:
        return warmup(step, peak=peak, steps=warmup_steps, offset=offset)
    if decay == "constant":
        return linear(step - (steps - cooldown), start=peak, end=end, steps=cooldown) if cooldown else peak
    shape = {"cosine": cosine, "linear": linear}[decay]
    return shape(step - warmup_steps, start=peak, end=end, steps=steps - warmup_steps)

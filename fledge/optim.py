"""What an optimiser step is: rates by step, clipping, groups that start later. Declared by a method, done here."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fledge import distributed
from fledge.config import Config, Duration, resolve
from fledge.errors import InputError
from fledge.schedule import warmup_then

Rate = Callable[[int], float]


class OptimConfig(Config):
    """AdamW and its schedule. Subclasses give each method's published values as defaults."""

    lr: float
    """Peak learning rate, at ``lr_batch`` rows a step."""
    lr_batch: int | None = None
    """If given, lr is scaled linearly: lr · batch / lr_batch (Goyal et al. 2017)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float | None = None
    """Largest gradient norm; None does not clip."""
    warmup: Duration = 0
    warmup_offset: Literal[0, 1] = 0
    """0: the first rate is exactly 0; 1: it is peak/(warmup+1)."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    cooldown: Duration | None = None
    """The last steps, in which a constant rate falls to ``min_lr``. A run whose rate is constant until then can be
    prolonged exactly (``train.extend_from``)."""
    min_lr: float = 0.0

    @model_validator(mode="after")
    def _rate_is_one(self) -> "OptimConfig":
        if not 0 <= self.lr <= 1e30:  # beyond, AdamW itself overflows in fp32
            raise ValueError(f"lr {self.lr:g} is no learning rate; expected 0 or more, as 1e-4")
        return self

    @model_validator(mode="after")
    def _cooldown_of_what(self) -> "OptimConfig":
        if self.cooldown is not None and self.decay != "constant":
            raise ValueError(f"cooldown is the end of a constant rate, but decay is {self.decay}; use decay: constant")
        return self

    def peak_lr(self, batch: int) -> float:
        return self.lr * batch / self.lr_batch if self.lr_batch else self.lr

    def lr_at(self, batch: int, steps: int, steps_per_epoch: int) -> Rate:
        """The learning rate as a function of step."""
        peak, warm = self.peak_lr(batch), resolve(self.warmup, steps_per_epoch)
        cooldown = resolve(self.cooldown or 0, steps_per_epoch)
        if cooldown and warm + cooldown > steps:
            raise InputError(f"optim: {warm} steps of warmup and {cooldown} of cooldown exceed the {steps} train.steps")
        return lambda step: warmup_then(
            self.decay, step, peak=peak, end=self.min_lr, warmup_steps=warm, steps=steps, offset=self.warmup_offset,
            cooldown=cooldown,
        )  # fmt: skip

    def same_until(self, steps: int, steps_per_epoch: int) -> int:
        """The step until which a longer run would have had the same rates."""
        return steps - resolve(self.cooldown or 0, steps_per_epoch) if self.decay == "constant" else 0


def one_dimensional(name: str, parameter: Tensor) -> bool:
    """The usual rule: gains and biases are not decayed."""
    return parameter.ndim <= 1 or name.endswith(".bias")


def decay_groups(module: nn.Module, exempt: Callable[[str, Tensor], bool] = one_dimensional, **extra) -> list[dict]:
    """Two groups of trainable parameters, tied ones once: decayed, and those for which ``exempt(name, p)``."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if not exempt(n, p)]
    spared = [p for n, p in named if exempt(n, p)]
    groups = [{"params": decayed, "decay": True, **extra}, {"params": spared, "decay": False, **extra}]
    return [group for group in groups if group["params"]]


def norms(grads: list[Tensor]) -> Tensor:
    """The norm of each tensor, (n,); of all of it, where a rank holds only some rows."""
    found = torch.stack(torch._foreach_norm([distributed.local(grad) for grad in grads]))
    if any(distributed.is_sharded(grad) for grad in grads):
        return distributed.sum_shards(found.double().square()).sqrt().to(found.dtype)
    return found


def clip_global(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients by min(1, limit / (‖all‖ + 1e-6)); returns the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(norms(grads))
    if limit is not None:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([distributed.local(grad) for grad in grads], scale)
    return norm


def clip_each(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale each tensor's gradient by min(1, limit / (‖g‖ + 1e-6)) (dino clip_gradients); returns the global norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    each = norms(grads)
    if limit is not None:
        scales = (limit / (each + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([distributed.local(grad) for grad in grads], list(scales))
    return torch.linalg.vector_norm(each)


class Optim:
    """An optimiser with its rates.

    Groups may carry ``decay`` (default True), ``lr_scale`` (default 1) and ``start_step``: before it the group's
    gradients are dropped after clipping, so that AdamW neither decays nor counts a step (DINO's frozen last layer).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Rate,
        weight_decay: Rate = lambda step: 0.0,
        clip: float | None = None,
        clip_mode: Literal["global", "tensor"] = "global",
        same_until: int = 0,
    ) -> None:
        self.optimizer, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.same_until = same_until  # see OptimConfig
        self.clip, self.clip_by = clip, clip_global if clip_mode == "global" else clip_each

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def prepare(self, step: int) -> Tensor:
        """Set the rates of ``step`` and clip; returns the gradient norm before clipping, ()."""
        norm = self.clip_by(self.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) * group.get("lr_scale", 1.0)
            group["weight_decay"] = self.weight_decay(step) if group.get("decay", True) else 0.0
            if step < group.get("start_step", 0):
                for parameter in group["params"]:
                    parameter.grad = None
        return norm

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def adamw(groups: list[dict], config: OptimConfig, *, batch: int, steps: int, steps_per_epoch: int, **optim) -> Optim:
    """AdamW over ``groups`` with the config's rates; ``optim`` passes weight_decay(step) or clip_mode on."""
    lr = config.lr_at(batch, steps, steps_per_epoch)
    optimizer = torch.optim.AdamW(groups, lr=lr(0), betas=config.betas, eps=config.eps, weight_decay=0.0)
    own: dict[str, Any] = {"lr": lr, "weight_decay": lambda step: config.weight_decay, "clip": config.clip}
    own["same_until"] = config.same_until(steps, steps_per_epoch)
    return Optim(optimizer, **own | optim)

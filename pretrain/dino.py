"""DINO: self-distillation with no labels (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

A student sees every crop of an image, a teacher only the two large ones; the student learns to give, for each crop, the
distribution that the teacher gives for another crop of the same image (eq. 3). The teacher is the slow average of its
student. Two opposite forces keep it from collapsing: centering (eq. 4) against one dimension that wins always,
sharpening (a low temperature) against the uniform distribution.

Axes: B images, S crops (T of them global, first), C H W pixels, N patches, D width, K prototypes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge import ema
from fledge.models.positions import tokens
from fledge.optim import decay_groups
from fledge.schedule import cosine

Batch = dict[str, Tensor]


# --------------------------------------------------------------------------------------------------------------------
# The maths
# --------------------------------------------------------------------------------------------------------------------


def teacher_probs(logits: Tensor, center: Tensor, temp: float | Tensor) -> Tensor:
    """Centered and sharpened targets: (B, T, K) logits, (1, K) center -> (B, T, K) probabilities, without gradient."""
    return F.softmax((logits.detach() - center) / temp, dim=-1)


def cross_view_entropy(probs: Tensor, log_probs: Tensor) -> Tensor:
    """Eq. 3: the cross-entropy of each row, averaged over the pairs (teacher view t, student view s != t).

    probs (B, T, K), log_probs (B, S, K), the same T global crops first in both -> (B,). With 2 global and 8 local crops
    the mean is over 2 * (2 + 8) - 2 = 18 pairs.
    """
    pairs = -torch.einsum("btk,bsk->bts", probs, log_probs)  # (B, T, S)
    T, S = pairs.shape[1:]
    other = 1 - torch.eye(T, S, dtype=pairs.dtype, device=pairs.device)  # 1 = two different crops
    return (pairs * other).sum(dim=(1, 2)) / (T * S - T)


def entropy(probs: Tensor) -> Tensor:
    """-sum p ln p over the last axis; ln K is the uniform collapse, 0 the collapse onto one prototype."""
    return torch.special.entr(probs).sum(dim=-1)


def warmup_then_cosine(step: int, *, peak: float, end: float, warmup_steps: int, steps: int) -> float:
    """DINO's schedule: its warm-up includes both ends, so the first rate is exactly 0 and the peak comes twice."""
    if step < warmup_steps:
        return peak * step / max(warmup_steps - 1, 1)
    return cosine(step - warmup_steps, start=peak, end=end, steps=steps - warmup_steps)


def teacher_temp_at(epoch: int, *, warmup: float, final: float, warmup_epochs: int) -> float:
    """Linear from `warmup` to `final` (both included) over the first epochs; constant within an epoch."""
    if epoch >= warmup_epochs:
        return final
    return warmup + (final - warmup) * epoch / max(warmup_epochs - 1, 1)


# --------------------------------------------------------------------------------------------------------------------
# The networks
# --------------------------------------------------------------------------------------------------------------------


class DINOHead(nn.Module):
    """Three-layer MLP, L2 normalisation, and a linear layer whose rows (the K prototypes) have unit norm."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        # The last layer keeps nn.Linear's own initialisation, as the authors' does.
        last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.last_layer = nn.utils.parametrizations.weight_norm(last_layer, dim=0)
        gain = self.last_layer.parametrizations.weight.original0  # (K, 1), the norm of each row
        nn.init.ones_(gain)
        gain.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K)"""
        x = F.normalize(full_precision(self.mlp(x)), dim=-1)
        # A cosine rounded to bf16 is wrong by up to .1 after division by the teacher's temperature.
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(x)


class Network(nn.Module):
    """Backbone and head. Crops of one size go through the backbone together."""

    def __init__(self, backbone: nn.Module, head: DINOHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *crops: Tensor) -> Tensor:
        """(B, S_i, C, H_i, W_i) for each size i -> (B, S, K), S the sum of the S_i"""
        return self.head(torch.cat([self.embed(x) for x in crops], dim=1))

    def embed(self, crops: Tensor) -> Tensor:
        """(B, S, C, H, W) -> (B, S, D), the class token after the final norm."""
        B, S = crops.shape[:2]
        return tokens(self.backbone, crops.flatten(0, 1))[:, 0].view(B, S, -1)


def full_precision(x: Tensor) -> Tensor:
    """Half precisions to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------------------------
# The objective
# --------------------------------------------------------------------------------------------------------------------


class DINO(nn.Module):
    """Student, teacher and center. The teacher is a second network that takes the student's state by value.

    teacher_temp and momentum are functions of the step.
    """

    weights = {"loss": 1.0}

    def __init__(
        self,
        student: Network,
        teacher: Network,
        *,
        teacher_temp: Callable[[int], float],
        momentum: Callable[[int], float],
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = ema.copy(teacher, student)
        out_dim = student.head.last_layer.out_features
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp, self.momentum = teacher_temp, momentum
        self.student_temp, self.center_momentum = student_temp, center_momentum

    def counts(self, batch: Batch) -> dict[str, int]:
        B, T = batch["global_crops"].shape[:2]
        return {"loss": B, "teacher_entropy": B * T, "kl": B, "teacher_mean": B * T}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """global_crops (B, 2, C, H, W), local_crops (B, V, C, h, w) -> sums over the rows (see `counts`)."""
        crops = [batch[name] for name in ("global_crops", "local_crops") if name in batch]
        with torch.no_grad():
            teacher_out = self.teacher(batch["global_crops"])  # (B, T, K)
        student_out = self.student(*crops)  # (B, S, K)

        with torch.autocast(student_out.device.type, enabled=False):
            temp = torch.tensor(self.teacher_temp(step), dtype=student_out.dtype, device=student_out.device)
            probs = teacher_probs(teacher_out, self.center, temp)
            log_probs = F.log_softmax(student_out / self.student_temp, dim=-1)
            loss = cross_view_entropy(probs, log_probs)  # (B,)
            target_entropy = entropy(probs)  # (B, T)
        return {
            "loss": loss.sum(),
            "teacher_entropy": target_entropy.sum(),
            # Cross-entropy = entropy of the target + KL; a KL that falls to 0 early is the collapse (paper, fig. 7).
            "kl": (loss.detach() - target_entropy.mean(dim=1)).sum(),
            "teacher_mean": teacher_out.sum(dim=(0, 1)),  # (K,)
        }

    @torch.no_grad()
    def after_step(self, step: int, means: dict[str, Tensor]) -> None:
        """Eq. 4, so that the loss of step t uses the center of t - 1; then the teacher follows its student."""
        self.center.lerp_(means["teacher_mean"].to(self.center), 1 - self.center_momentum)
        ema.update(self.teacher, self.student, self.momentum(step))


def param_groups(student: nn.Module, freeze_last_layer: int) -> list[dict]:
    """Decayed and spared parameters, each apart for the last layer, which starts only at step `freeze_last_layer`.

    As in the authors' code, whatever has two axes or more is decayed: class token, positions, and the gains (K, 1).
    """
    rest = nn.ModuleList([student.backbone, student.head.mlp])
    return decay_groups(rest) + decay_groups(student.head.last_layer, start_step=freeze_last_layer)

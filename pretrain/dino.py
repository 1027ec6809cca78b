"""DINO: self-distillation with no labels (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

A student sees every crop of an image, a teacher only the two large ones; the student learns to give, for each crop, the
distribution that the teacher gives for another crop of the same image (eq. 3). The teacher is the slow average of its
student. Two opposite forces keep it from collapsing: centering (eq. 4) against one dimension that wins always,
sharpening (a low temperature) against the uniform distribution.

Axes: B images, S crops (T of them global, first), C H W pixels, N patches, D width, K prototypes.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fledge import artifact, distributed, ema
from fledge.artifact import Artifact
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data.augment import EvalConfig, MultiCropConfig
from fledge.data.images import ImagesConfig, augmented
from fledge.evals.features import feature_spread, features
from fledge.evals.knn import knn_correct
from fledge.evals.vision import VisionEval, evaluate, picture_set
from fledge.models import vit
from fledge.models.positions import tokens
from fledge.models.vit import ViTConfig
from fledge.optim import Optim, OptimConfig, adamw, decay_groups
from fledge.schedule import cosine
from fledge.stream import Batch, DataStream, derive
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, fit

WRITES = "vision-encoder"


class Parents(BaseConfig):
    init: str | None = parent("vision-encoder", required=False)
    """Encoder that student and teacher start from; their heads are new."""


class Head(BaseConfig):
    """The projection head; ViT-S trains the gains of its last layer, ViT-B does not."""

    out_dim: PositiveInt = 65536
    """Prototypes, K."""
    hidden_dim: PositiveInt = 2048
    bottleneck_dim: PositiveInt = 256
    norm_last_layer: bool = False
    """Keep the prototypes at length 1 for ever; steadier, a little worse."""


class DINOOptim(OptimConfig):
    """AdamW at 5e-4 per 256 images, 10 epochs of warm-up, cosine to 1e-6; weight decay by cosine from .04 to .4."""

    lr: float = 5e-4
    lr_batch: int | None = 256
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: float | None = 3.0
    """Largest norm of each parameter tensor's gradient, by itself."""
    warmup: Duration = "10 epochs"
    warmup_offset: Literal[0] = 0
    decay: Literal["cosine"] = "cosine"
    min_lr: float = 1e-6
    freeze_last_layer: Duration = "1 epoch"
    """How long the last layer waits before it is trained."""


class Train(TrainConfig):
    batch: PositiveInt = 1024
    steps: Duration = "300 epochs"


class Config(StageConfig):
    """DINO pretraining. The defaults are the published ViT-S/16 of 300 epochs (k-NN 73.3, linear 76.0 on ImageNet).

    One departure: bf16 autocast where the authors used fp16 with loss scaling, the source of most NaN reports.
    """

    stage: Literal["pretrain.dino"] = "pretrain.dino"
    parents: Parents = Parents()
    data: ImagesConfig
    augment: MultiCropConfig = MultiCropConfig()
    model: ViTConfig = ViTConfig(embed_dim=384, num_heads=6)
    drop_path_rate: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the student, growing linearly over its blocks; the teacher has none."""
    head: Head = Head()
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: float = Field(0.07, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    """Temperature of the first epoch; a higher one, or no warm-up, is unstable."""
    warmup_teacher_temp_epochs: int = Field(30, ge=0)
    center_momentum: float = Field(0.9, ge=0, le=1)
    momentum_teacher: float = Field(0.996, ge=0, le=1)
    """Of the first step; rises to 1 by cosine. Small batches want a higher one (.9995 at 256)."""
    optim: DINOOptim = DINOOptim()
    train: Train = Train()
    track: TrackConfig = TrackConfig()
    evaluation: VisionEval | None = None
    """Labelled pictures that measure the teacher in the end; none: it is handed over unmeasured."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Config":
        model, augment = self.model, self.augment
        if augment.global_size != model.img_size:
            raise ValueError(f"augment.global_size {augment.global_size} is not model.img_size {model.img_size}")
        if augment.local_crops and augment.local_size % model.patch_size:
            raise ValueError(f"augment.local_size {augment.local_size} is no multiple of patch_size {model.patch_size}")
        if self.data.channels != model.in_chans:
            raise ValueError(f"data.channels {self.data.channels} is not model.in_chans {model.in_chans}")
        return self


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


# --------------------------------------------------------------------------------------------------------------------
# The stage
# --------------------------------------------------------------------------------------------------------------------


def build_network(config: Config, drop_path_rate: float = 0.0) -> Network:
    """timm's ViT with the class token drawn as the authors draw it (timm: 1e-6), and a new head."""
    backbone = vit.build(config.model, drop_path_rate=drop_path_rate)
    nn.init.trunc_normal_(backbone.cls_token, std=0.02)
    return Network(backbone, DINOHead(config.model.embed_dim, **config.head.model_dump()))


def build(config: Config, init: Artifact | None, steps: int, steps_per_epoch: int) -> DINO:
    torch.manual_seed(derive("init", config.seed))
    student, teacher = build_network(config, config.drop_path_rate), build_network(config)
    if init is not None:
        vit.load(student.backbone, config.model, init)

    def teacher_temp(step: int) -> float:
        warmup, final, epochs = config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        return teacher_temp_at(step // steps_per_epoch, warmup=warmup, final=final, warmup_epochs=epochs)

    return DINO(
        student,
        teacher,
        teacher_temp=teacher_temp,
        momentum=lambda step: cosine(step, start=config.momentum_teacher, end=1.0, steps=steps),
        student_temp=config.student_temp,
        center_momentum=config.center_momentum,
    )


def param_groups(student: nn.Module, freeze_last_layer: int) -> list[dict]:
    """Decayed and spared parameters, each apart for the last layer, which starts only at step `freeze_last_layer`.

    As in the authors' code, whatever has two axes or more is decayed: class token, positions, and the gains (K, 1).
    """
    rest = nn.ModuleList([student.backbone, student.head.mlp])
    return decay_groups(rest) + decay_groups(student.head.last_layer, start_step=freeze_last_layer)


def build_optim(config: Config, student: nn.Module, steps: int, steps_per_epoch: int) -> Optim:
    """AdamW with DINO's two schedules and its clipping of each tensor by itself."""
    optim, batch = config.optim, config.train.batch
    peak, warm = optim.peak_lr(batch), resolve(optim.warmup, steps_per_epoch)
    return adamw(
        param_groups(student, resolve(optim.freeze_last_layer, steps_per_epoch)),
        optim,
        batch=batch,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        lr=lambda step: warmup_then_cosine(step, peak=peak, end=optim.min_lr, warmup_steps=warm, steps=steps),
        weight_decay=lambda step: cosine(step, start=optim.weight_decay, end=optim.weight_decay_end, steps=steps),
        clip_mode="tensor",
    )


def watch(config: VisionEval, backbone: nn.Module, view: EvalConfig) -> Callable[[int], dict[str, float]]:
    """k-NN and spread of the teacher's features while it learns: a fifth of `fit` is named by the rest, test unseen."""
    _, _, pixels, labels = picture_set(config.fit, config.limit, view)
    held = len(pixels) // 5

    def measure(step: int) -> dict[str, float]:
        x = features(backbone, pixels, pool=config.pool)
        right = knn_correct(x[held:], labels[held:], x[:held], labels[:held], k=config.k)
        return {"knn_top1": right.mean().item(), **feature_spread(x)}

    return measure


def main(config: Config) -> Artifact:
    """Train, measure the teacher's frozen features, and hand its backbone over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        images = config.data.open()
        if images.report():
            run.say(images.report())
        rows = augmented(images, config.augment)
        stream = DataStream(len(images), rows, batch=config.train.batch, seed=config.seed)
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        dino = build(config, parents.get("init"), steps, stream.steps_per_epoch)
        optim = build_optim(config, dino.student, steps, stream.steps_per_epoch)
        backbone, view = dino.teacher.backbone, config.augment.evaluation(resize=config.augment.global_size)
        watched = watch(config.evaluation, backbone, view) if config.evaluation and config.train.eval_every else None
        fit(dino, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watched)

        scores = []
        if run.measures and config.evaluation:
            before = build(config, parents.get("init"), steps, stream.steps_per_epoch).teacher.backbone
            scores = [evaluate(backbone, before.to(distributed.device()), config.evaluation, view)]
        return run.publish(
            WRITES,
            lambda folder: vit.save(backbone, config.model, vit.preprocessing(view), folder),
            scores,
            architecture=vit.architecture(config.model),
            preprocessing=vit.preprocessing(view),
            data={"fingerprint": images.fingerprint, "pictures": len(images), "skipped": len(images.skipped)},
            step=steps,
        )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))

"""What can a frozen encoder tell apart? k-NN (DINO's measure) or a linear probe (MAE's), as a classifier for others.

    python -m finetune.classify configs/finetune/probe_imagenet.yaml

Features are computed once, in the fixed view that the encoder was handed over with. The probe is multinomial logistic
regression on standardised features, solved to its optimum (fledge/evals/probe.py); the standardisation is folded into
the head, so the artifact is a plain timm classifier whose logits are the probe's. k-NN has no weights to hand over: its
artifact carries the nearest linear thing, a head of class-mean directions, whose own accuracy stands in the table too.

N pictures, D features, K classes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from fledge import artifact, distributed
from fledge.artifact import Artifact
from fledge.config import Config as BaseConfig
from fledge.config import StageConfig, hardware, parent
from fledge.data.augment import EvalConfig
from fledge.data.images import Images, ImagesConfig
from fledge.errors import InputError
from fledge.evals.features import Pool, features
from fledge.evals.knn import knn_correct
from fledge.evals.probe import PENALTIES, Linear, fit_probe, prototypes
from fledge.evals.score import Score, bootstrap
from fledge.evals.vision import clusters, picture_set
from fledge.models import vit
from fledge.models.vit import ViTConfig
from fledge.stream import derive
from fledge.track import Run, TrackConfig

WRITES = "image-classifier"
TIMM_POOL = {"cls": "token", "mean": "avg"}


class Parents(BaseConfig):
    encoder: str | None = parent("vision-encoder", required=True)


class Config(StageConfig):
    """Classify by frozen features.

    A departure from MAE's published probe (LARS, 90 epochs of random crops): the same model class, solved to the
    optimum of its penalised likelihood on centre crops, which is deterministic and has no learning rate to tune.
    """

    stage: Literal["finetune.classify"] = "finetune.classify"
    parents: Parents = Parents()
    data: ImagesConfig
    """Labelled pictures to learn from."""
    val: ImagesConfig | None = None
    """Labelled pictures that choose the probe's penalty; none: a fifth of `data` does."""
    test: ImagesConfig
    """Labelled pictures that the table is measured on, and nothing else."""
    limit: PositiveInt | None = None
    """The most pictures of each set, drawn once by a keyed permutation; null takes all."""
    task: Literal["probe", "knn"] = "probe"
    pool: Pool = "cls"
    """The feature: class token, or the mean of the patch tokens."""
    k: PositiveInt = 20
    """Neighbours that vote (knn)."""
    penalties: tuple[float, ...] = PENALTIES
    """L2 penalties to choose from (probe)."""
    max_iter: PositiveInt = 200
    """L-BFGS iterations for each penalty (probe)."""
    device: Literal["auto", "cuda", "mps", "cpu"] = hardware("auto")
    batch: PositiveInt = hardware(256)
    """Pictures of one forward."""
    track: TrackConfig = TrackConfig()


class Part(NamedTuple):
    """Pixels (N, C, H, W) or features (N, D), with labels (N,)."""

    x: Tensor
    y: Tensor


class Parts(NamedTuple):
    train: Part
    val: Part
    test: Part

    def embedded(self, embed: Callable[[Tensor], Tensor]) -> "Parts":
        return Parts(*(Part(embed(part.x), part.y) for part in self))


# ------------------------------------------------------------------------------------------------------------- data


def open_parts(config: Config, view: EvalConfig) -> tuple[Parts, Images, list[int]]:
    """The three sets as pixels; and of the test set the pictures and their numbers, for the bootstrap."""
    images, _, x, y = picture_set(config.data, config.limit, view)
    tested, ids, test_x, test_y = picture_set(config.test, config.limit, view)
    same_classes("test", tested, images)
    if config.val is None:
        held = len(x) // 5  # picture_set has shuffled
        train, val = Part(x[held:], y[held:]), Part(x[:held], y[:held])
    else:
        validation, _, val_x, val_y = picture_set(config.val, config.limit, view)
        same_classes("val", validation, images)
        train, val = Part(x, y), Part(val_x, val_y)
    return Parts(train, val, Part(test_x, test_y)), tested, ids


def same_classes(name: str, images: Images, train: Images) -> None:
    if images.classes != train.classes:
        odd = sorted(set(images.classes) ^ set(train.classes))
        raise InputError(f"{name}: its classes differ from data's by {', '.join(odd[:5])}; give both the same classes")


def view_of(encoder: Artifact) -> EvalConfig:
    """The fixed view that the encoder was handed over with."""
    known = encoder.preprocessing
    missing = [name for name in ("size", "mean", "std") if name not in known]
    if missing:
        raise InputError(f"parents.encoder: the preprocessing of {encoder.path} does not say {', '.join(missing)}")
    size, mean, std = known["size"], tuple(known["mean"]), tuple(known["std"])
    return EvalConfig(size=size, resize=known.get("resize", size), mean=mean, std=std)


# ------------------------------------------------------------------------------------------------------------- heads


def fit_head(config: Config, parts: Parts, K: int) -> tuple[Linear, dict[str, float]]:
    """The linear head for raw features, and what was chosen on val."""
    if config.task == "knn":
        return prototypes(*parts.train, K), {}
    probe = fit_probe(*parts.train, *parts.val, K, config.penalties, config.max_iter)
    return probe.head, {"l2": probe.l2, "val_accuracy": probe.val_accuracy}


def head_right(head: Linear, part: Part) -> np.ndarray:
    """(N,) 1. where the head names the right class."""
    return (head(part.x).argmax(dim=1) == part.y).float().numpy()


def knn_right(config: Config, parts: Parts) -> np.ndarray:
    return knn_correct(*parts.train, *parts.test, k=config.k).numpy()


def score(metric: str, right: list[np.ndarray], groups: np.ndarray, unit: str, note: str) -> Score:
    """A row of the table. right: this encoder, the same network untrained, raw pixels."""
    after, before, raw = (float(r.mean()) for r in right)
    low, high = bootstrap(right[0], groups)
    n = len(np.unique(groups))
    return Score(
        metric, after, n, low, high, before=before, baseline=raw, baseline_name="raw pixels", unit=unit, note=note
    )


# ------------------------------------------------------------------------------------------------------------- stage


def classifier(encoder: nn.Module, config: ViTConfig, head: Linear) -> nn.Module:
    """The encoder with its head, under timm's names."""
    model = vit.build(config, num_classes=len(head.bias))
    model.load_state_dict(encoder.state_dict() | {"head.weight": head.weight, "head.bias": head.bias})
    return model


def save(model: nn.Module, config: ViTConfig, view: EvalConfig, classes: list[str], pool: Pool, folder: Path) -> None:
    """timm's `local-dir:` form, with the pooling that the head was fitted on."""
    vit.save(model, config, vit.preprocessing(view), folder, classes)
    path = folder / "config.json"
    description = json.loads(path.read_text())
    # fc_norm false: for `avg` timm would otherwise move the final norm behind the average
    description["model_args"] |= {"global_pool": TIMM_POOL[pool], "fc_norm": False}
    path.write_text(json.dumps(description | {"global_pool": TIMM_POOL[pool]}, indent=2) + "\n")


def main(config: Config) -> Artifact:
    """Compute features, fit the head, and hand encoder and head over as one classifier."""
    device = distributed.setup(config.device)
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        encoder, sizes = vit.read(parents["encoder"])
        view = view_of(parents["encoder"])
        pixels, tested, ids = open_parts(config, view)
        torch.manual_seed(derive("init", config.seed))
        untrained = vit.build(sizes)

        def embedded(model: nn.Module) -> Parts:
            model = model.to(device)
            return pixels.embedded(lambda x: features(model, x, config.batch, config.pool, "features"))

        K = len(tested.classes)
        represented = [embedded(encoder), embedded(untrained), pixels.embedded(lambda x: x.flatten(1))]
        heads = [fit_head(config, parts, K) for parts in represented]
        head, chosen = heads[0]
        about = (*clusters(tested, ids), f"{len(ids)} pictures, {K} classes, learned from {len(pixels.train.y)}")
        right = [head_right(h, parts.test) for (h, _), parts in zip(heads, represented, strict=True)]
        name = {"probe": "linear probe accuracy", "knn": "prototype accuracy"}[config.task]
        scores = [score(name, right, *about)]
        if config.task == "knn":
            right = [knn_right(config, parts) for parts in represented]
            scores.insert(0, score(f"{config.k}-NN accuracy", right, *about))

        model = classifier(encoder.cpu(), sizes, head)
        return run.publish(
            WRITES,
            lambda folder: save(model, sizes, view, list(tested.classes), config.pool, folder),
            scores,
            architecture=vit.architecture(sizes) | {"pool": config.pool, "classes": K},
            preprocessing=vit.preprocessing(view),
            data={
                "train": len(pixels.train.y),
                "val": len(pixels.val.y),
                "test": len(ids),
                "tested": tested.fingerprint,
            },
            **chosen,
        )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))

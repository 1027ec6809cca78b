"""What an encoder's frozen features know: a linear probe or k-NN on labelled pictures, beside raw pixels.

N pictures, D features, K classes.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from fledge.config import Config
from fledge.data.augment import EvalConfig
from fledge.data.images import Images, ImagesConfig, WorldImages, eval_batch
from fledge.errors import InputError
from fledge.evals.features import features
from fledge.evals.knn import knn_correct
from fledge.evals.probe import fit_probe
from fledge.evals.score import Score, bootstrap
from fledge.stream import Permutation


class VisionEval(Config):
    """Which labelled pictures measure the encoder, and how."""

    method: Literal["probe", "knn"]
    fit: ImagesConfig
    """Pictures whose labels are known."""
    test: ImagesConfig
    """Pictures to name. Their classes are those of ``fit``."""
    limit: PositiveInt | None = None
    """The most pictures of each set, drawn once by a keyed permutation; null takes all."""
    pool: Literal["cls", "mean"] = "cls"
    k: PositiveInt = 20


def picture_set(config: ImagesConfig, limit: int | None, view: EvalConfig) -> tuple[Images, list[int], Tensor, Tensor]:
    """The chosen pictures: their source, their numbers, pixels (N, C, H, W) and labels (N,)."""
    images = config.open()
    if images.labels is None:
        raise InputError(f"evaluation: {config.path or config.source} has no labels; give one subfolder a class")
    order = Permutation(len(images), "evaluation")
    ids = [order[i] for i in range(min(limit or len(images), len(images)))]
    return images, ids, eval_batch(images, ids, view), torch.tensor([images.label(i) for i in ids])


def clusters(images: Images, ids: list[int]) -> tuple[np.ndarray, str]:
    """What a bootstrap resamples: characters, which several fonts draw, or the pictures themselves."""
    if isinstance(images, WorldImages):
        return images.glyphs.codepoint[ids], "characters"
    return np.array(ids), "pictures"


def correct(config: VisionEval, fit: Tensor, fit_labels: Tensor, test: Tensor, test_labels: Tensor, K: int) -> Tensor:
    """(N,) 1. where the test feature is named right. A fifth of ``fit`` chooses the probe's penalty."""
    if config.method == "knn":
        return knn_correct(fit, fit_labels, test, test_labels, k=config.k)
    held = len(fit) // 5
    probe = fit_probe(fit[held:], fit_labels[held:], fit[:held], fit_labels[:held], K)
    return (probe.head(test).argmax(1) == test_labels).float()


def evaluate(encoder: nn.Module, untrained: nn.Module, config: VisionEval, view: EvalConfig) -> Score:
    """Accuracy on the test pictures: the encoder's, the untrained one's, and raw pixels'."""
    fit_images, _, fit_pixels, fit_labels = picture_set(config.fit, config.limit, view)
    images, ids, test_pixels, test_labels = picture_set(config.test, config.limit, view)
    if images.classes != fit_images.classes:
        raise InputError(
            f"evaluation: the classes of fit {fit_images.classes[:5]} and test {images.classes[:5]} differ; "
            "give both the same subfolders"
        )
    K = len(images.classes)

    def right(represent) -> np.ndarray:
        return correct(config, represent(fit_pixels), fit_labels, represent(test_pixels), test_labels, K).numpy()

    after = right(lambda pixels: features(encoder, pixels, pool=config.pool))
    before = right(lambda pixels: features(untrained, pixels, pool=config.pool))
    raw = right(lambda pixels: pixels.flatten(1))
    groups, unit = clusters(images, ids)
    low, high = bootstrap(after, groups)
    name = "linear probe" if config.method == "probe" else f"{config.k}-NN"
    return Score(
        metric=f"{name} accuracy",
        after=float(after.mean()),
        before=float(before.mean()),
        baseline=float(raw.mean()),
        baseline_name="raw pixels",
        low=low,
        high=high,
        n=len(np.unique(groups)),
        unit=unit,
        note=f"{len(ids)} pictures, {K} classes, features of {len(fit_labels)} pictures",
    )

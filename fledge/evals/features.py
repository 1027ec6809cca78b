"""Features of images from a vision transformer, at any image size."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fledge.models.positions import tokens

Pool = Literal["cls", "mean"]


def pooled(vit: nn.Module, images: Tensor, pool: Pool = "cls") -> Tensor:
    """(B, C, H, W) -> (B, D): the class token, or the mean of the patch tokens without it."""
    x = tokens(vit, images)
    return x[:, 0] if pool == "cls" else x[:, 1:].mean(dim=1)


@torch.no_grad()
def features(
    model: nn.Module, images: Tensor, batch: int = 256, pool: Pool = "cls", progress: str | None = None
) -> Tensor:
    """(N, C, H, W) -> (N, D) on the CPU, in float32 at least: in eval mode, without gradient, `batch` images at a time.

    The model's mode is restored. `progress` names the bar (on a terminal); None shows none.
    """
    place = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        parts = [pooled(model, x.to(place.device, place.dtype), pool).cpu() for x in chunks(images, batch, progress)]
    finally:
        model.train(was_training)
    return torch.cat(parts).to(torch.promote_types(parts[0].dtype, torch.float32))


def chunks(x: Tensor, size: int, progress: str | None = None) -> Iterator[Tensor]:
    """x in pieces of at most `size` rows, the last one shorter; nothing is dropped."""
    starts = range(0, len(x), size)
    for i in tqdm(starts, desc=progress, disable=None if progress else True, leave=False):
        yield x[i : i + size]


def feature_spread(x: Tensor) -> dict[str, float]:
    """Health of features x (N, D): `feature_std`, the mean deviation of a unit feature's coordinates times sqrt(D) (1:
    directions spread evenly, 0: all are one), and `rankme`, the effective rank (Garrido et al. 2023)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    std = F.normalize(x, dim=1).std(dim=0, correction=0).mean().item() * x.shape[1] ** 0.5
    values = torch.linalg.svdvals(x)
    p = values / values.sum() + 1e-7
    return {"feature_std": std, "rankme": torch.exp(-(p * p.log()).sum()).item()}

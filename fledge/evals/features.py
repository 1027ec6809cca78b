"""Features of images from a vision transformer, at any image size."""

from collections.abc import Iterator
from typing import Literal

import torch
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

    The model's mode is restored. `progress` names the bar; None shows none.
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
    for i in tqdm(starts, desc=progress, disable=progress is None, leave=False):
        yield x[i : i + size]

"""A vision transformer at another resolution than it was built for: its learned positions, resized.

Bicubic resizing is linear, so it is kept as a matrix: the embedding is multiplied by it, which is exact to rounding and
whose gradient is deterministic on every device (the backward of bicubic `interpolate` is not, on GPUs).
"""

from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["reference", "timm"]


@lru_cache(maxsize=64)
def resize_matrix(old: tuple[int, int], new: tuple[int, int], mode: Mode, dtype: torch.dtype, device: str) -> Tensor:
    """The linear map from a grid of old = (H, W) patches to one of new = (h, w): (h*w, H*W), both row-major.

    "reference": as DINO trains, scale_factor = (n + .1) / N without antialiasing. The .1 (against rounding errors)
    moves the sampling points, so a plain size gives features about 1 % off. "timm": by size, antialiased.
    """
    (H, W), (h, w) = old, new
    # May be called first under inference_mode; the cached matrix must still serve training.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        units = torch.eye(H * W, dtype=torch.float64).view(H * W, 1, H, W)
        if mode == "reference":
            out = F.interpolate(units, scale_factor=((h + 0.1) / H, (w + 0.1) / W), mode="bicubic")
        else:
            out = F.interpolate(units, size=(h, w), mode="bicubic", antialias=True)
        assert out.shape[-2:] == (h, w), f"asked for {h} x {w} positions, got {tuple(out.shape[-2:])}"
        return out.view(H * W, h * w).T.contiguous().to(device, dtype)


def interpolate_pos_embed(
    pos_embed: Tensor, h: int, w: int, mode: Mode = "reference", grid: tuple[int, int] | None = None, prefix: int = 1
) -> Tensor:
    """(1, prefix + H*W, D) -> (1, prefix + h*w, D). The first `prefix` rows (cls) are kept.

    `grid` = (H, W), a square if None.
    """
    N = pos_embed.shape[1] - prefix
    H, W = grid or (round(N**0.5), round(N**0.5))
    assert H * W == N, f"{N} positions do not form a grid of {H} x {W}"
    if (h, w) == (H, W):
        return pos_embed
    matrix = resize_matrix((H, W), (h, w), mode, pos_embed.dtype, str(pos_embed.device))
    with torch.autocast(pos_embed.device.type, enabled=False):
        patches = matrix @ pos_embed[:, prefix:]  # (1, h*w, D)
    return torch.cat([pos_embed[:, :prefix], patches], dim=1)


def tokens(vit: Any, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1 + N, D): timm's `forward_features` with DINO's rule for positions at another size."""
    x = vit.patch_embed.proj(images)  # (B, D, h, w)
    h, w = x.shape[-2:]
    x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2))  # (B, N, D), row-major
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = x + interpolate_pos_embed(vit.pos_embed, h, w, grid=vit.patch_embed.grid_size)
    x = vit.norm_pre(vit.pos_drop(x))
    return vit.norm(vit.blocks(x))

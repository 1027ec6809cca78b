"""Tensors as pictures for people."""

import torch
from PIL import Image
from torch import Tensor


def picture_grid(rows: Tensor, columns: int = 4, scale: int | None = None) -> Image.Image:
    """(n, k, C, H, W) uint8 -> one picture: n groups of k pictures side by side, ``columns`` groups a row.

    Small pictures are enlarged by a whole factor, so that their pixels stay square.
    """
    n, k, C, H, W = rows.shape
    scale = scale or max(1, 96 // H)
    gap, lines = max(2, H // 8), -(-n // columns)
    sheet = torch.full((3, lines * (H + gap) + gap, columns * (k * W + gap) + gap), 255, dtype=torch.uint8)
    rows = rows.expand(n, k, 3, H, W)
    for i, group in enumerate(rows):
        top, left = gap + (i // columns) * (H + gap), gap + (i % columns) * (k * W + gap)
        sheet[:, top : top + H, left : left + k * W] = torch.cat(list(group), dim=2)
    picture = Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)

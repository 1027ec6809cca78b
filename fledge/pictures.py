"""Tensors as pictures for people."""

import torch
from PIL import Image, ImageDraw, ImageFont
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


def captioned_rows(captions: list[str], rows: Tensor, framed: Tensor) -> Image.Image:
    """n captions and (n, k, C, H, W) uint8 -> one picture: a caption, below it its k; framed (n, k) ones are."""
    n, k, C, H, W = rows.shape
    scale = max(1, 64 // H)
    height, width, gap, line = H * scale, W * scale, 6, 22
    sheet = Image.new("RGB", (max(k * (width + gap) + gap, 480), n * (height + line + 2 * gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, caption in enumerate(captions):
        top = i * (height + line + 2 * gap)
        printable = caption.encode("ascii", "backslashreplace").decode()  # Pillow's own font knows no more
        pen.text((gap, top + 3), printable if len(printable) < 66 else printable[:65] + "...", fill="black", font=font)
        for j, pixels in enumerate(rows[i].expand(k, 3, H, W)):
            left = gap + j * (width + gap)
            picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top + line))
            if framed[i, j]:
                box = (left - 3, top + line - 3, left + width + 2, top + line + height + 2)
                pen.rectangle(box, outline=(0, 150, 60), width=3)
    return sheet

"""Augmentations of pictures: the random views that MAE, DINO and CLIP train on, and the fixed one of evaluation.

A view is a function of a PIL picture and a `random.Random` that the caller seeds per sample: nothing here reads a
global generator. The geometry and the order of the draws are torchvision's; each gate is drawn even where its
probability is 0, so switching one augmentation off leaves all the others as they were.

Axes: B pictures, V views of a picture, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Annotated, Self

from PIL import Image, ImageEnhance, ImageFilter
from pydantic import Field, model_validator

from fledge.config import Config
from fledge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Range = tuple[float, float]


# -- configs ---------------------------------------------------------------------------------------------------------


class _Pixels(Config):
    """What every view ends in: normalised channels."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean per channel, subtracted from pixels in [0, 1]; one number serves all channels."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation per channel, by which the difference is divided."""

    @model_validator(mode="after")
    def _channels(self) -> Self:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError(f"mean and std need one number a channel, std above 0; got {self.mean} and {self.std}")
        return self


class EvalConfig(_Pixels):
    """The fixed view: bicubic resize of the short side, centre crop."""

    size: int = Field(224, ge=1)
    """Side of the square that the model sees."""
    resize: int | None = Field(None, ge=1)
    """Short side before the centre crop; null is ImageNet's ratio 256/224, `size` itself crops nothing of a square."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must be at least size ({self.size})")
        return self

    @property
    def short_side(self) -> int:
        return self.resize if self.resize is not None else round(self.size * 256 / 224)


class AugmentConfig(_Pixels):
    """One random view: crop, flip, normalise. The defaults are MAE's."""

    size: int = Field(224, ge=1)
    """Side of the square view."""
    scale: Range = (0.2, 1.0)
    """Area of the crop as a share of the picture."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip; 0 for letters, whose mirror images are other signs."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        _check_scale("scale", self.scale)
        _check_range("ratio", self.ratio)
        return self

    def view(self) -> View:
        return View(self.size, self.scale, self.ratio, self.flip)

    def evaluation(self, resize: int | None = None) -> EvalConfig:
        return EvalConfig(size=self.size, resize=resize, mean=self.mean, std=self.std)


class ClipAugmentConfig(AugmentConfig):
    """CLIP's view: nearly the whole picture, never mirrored (a caption may say left, or spell a word)."""

    scale: Range = (0.9, 1.0)
    flip: Probability = 0.0
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


class MultiCropConfig(_Pixels):
    """DINO's views of one picture: two global crops, which the teacher sees too, and several local ones."""

    global_size: int = Field(224, ge=1)
    global_scale: Range = (0.4, 1.0)
    local_crops: int = Field(8, ge=0)
    """Local crops of a picture; there are always two global ones."""
    local_size: int = Field(96, ge=1)
    local_scale: Range = (0.05, 0.4)
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of every crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip; 0 for letters."""
    jitter: Probability = 0.8
    """Probability of the colour jitter, whose strengths follow."""
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: float = Field(0.1, ge=0, le=0.5)
    """Largest turn of the colour circle, as a share of it."""
    grey: Probability = 0.2
    """Probability of losing the colours."""
    blur: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    """Probability of the Gaussian blur on the first global, the second global and each local crop."""
    blur_radius: Range = (0.1, 2.0)
    """Radius of the blur in pixels of the view."""
    solarize: Probability = 0.2
    """Probability of inverting the bright half; only on the second global crop."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        _check_scale("global_scale", self.global_scale)
        _check_scale("local_scale", self.local_scale)
        _check_range("ratio", self.ratio)
        _check_range("blur_radius", self.blur_radius)
        return self

    def global_views(self) -> tuple[View, View]:
        first, second, _ = self.blur
        crop = (self.global_size, self.global_scale)
        return self._view(*crop, blur=first, solarize=0.0), self._view(*crop, blur=second, solarize=self.solarize)

    def local_view(self) -> View:
        return self._view(self.local_size, self.local_scale, blur=self.blur[2], solarize=0.0)

    def evaluation(self, resize: int | None = None) -> EvalConfig:
        return EvalConfig(size=self.global_size, resize=resize, mean=self.mean, std=self.std)

    def _view(self, size: int, scale: Range, *, blur: float, solarize: float) -> View:
        jitter = Jitter(self.brightness, self.contrast, self.saturation, self.hue)
        return View(
            size, scale, self.ratio, self.flip, self.jitter, jitter, self.grey, blur, self.blur_radius, solarize
        )


def _check_range(name: str, bounds: Range) -> None:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"{name} must be two numbers above 0, the smaller first; got {list(bounds)}")


def _check_scale(name: str, bounds: Range) -> None:
    _check_range(name, bounds)
    if bounds[1] > 1:
        raise ValueError(f"{name} is a share of the picture's area, at most 1; got {list(bounds)}")


# -- views -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jitter:
    """Colour jitter: brightness, contrast, saturation and hue, each by a random factor, in random order."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        order = rng.sample(range(4), 4)
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
        turn = rng.uniform(-self.hue, self.hue)
        for which in order:
            image = turn_hue(image, turn) if which == 3 else _ENHANCERS[which](image, factors[which])
        return image


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return image if image.mode == "L" else ImageEnhance.Color(image).enhance(factor)


_ENHANCERS = (_brightness, _contrast, _saturation)


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the colour circle by a share `turn` of it, in steps of 1/255 as torchvision does; grey has no hue."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(_hue_table(int(turn * 255) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@cache
def _hue_table(shift: int) -> list[int]:
    return [(level + shift) % 256 for level in range(256)]


_SOLARIZE = [level if level < 128 else 255 - level for level in range(256)]


@dataclass(frozen=True)
class View:
    """One random square view of a picture: `(image, rng) -> image` of side `size`, same mode."""

    size: int
    scale: Range
    ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter_p: float = 0.0
    jitter: Jitter = field(default_factory=Jitter)
    grey: float = 0.0
    blur: float = 0.0
    blur_radius: Range = (0.1, 2.0)
    solarize: float = 0.0

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        box = crop_box(*image.size, self.scale, self.ratio, rng)
        # crop first: resize(box=...) would let pixels from outside the crop bleed in
        image = image.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < self.jitter_p:
            image = self.jitter(image, rng)
        if rng.random() < self.grey:
            image = image.convert("L").convert(image.mode)
        if rng.random() < self.blur:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*self.blur_radius)))
        if rng.random() < self.solarize:
            image = image.point(_SOLARIZE * len(image.getbands()))
        return image


def crop_box(width: int, height: int, scale: Range, ratio: Range, rng: Random) -> tuple[int, int, int, int]:
    """Box (left, upper, right, lower) of a random crop, by torchvision's rule: area uniform in `scale`, logarithm of
    width/height uniform in `ratio`, ten tries, else the largest centre crop of an allowed ratio."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            upper = rng.randrange(height - h + 1)
            left = rng.randrange(width - w + 1)
            return left, upper, left + w, upper + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """Bicubic resize that gives the shorter side `side` pixels and keeps the proportions."""
    width, height = image.size
    short = min(width, height)
    if short == side:
        return image
    return image.resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels; both sides must be at least that long."""
    left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, upper, left + size, upper + size))


def eval_view(image: Image.Image, config: EvalConfig) -> Image.Image:
    return centre_crop(resize_short_side(image, config.short_side), config.size)


# -- tensors ---------------------------------------------------------------------------------------------------------


def to_tensor(pictures: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures of one size and mode -> normalised float32 (B, C, H, W)."""
    import torch

    first = pictures[0]
    channels = len(first.getbands())
    if len(mean) not in (1, channels):
        raise InputError(
            f"mean and std have {len(mean)} numbers but the pictures have {channels} channel(s); "
            f"give {channels} number(s) each, or set the data's channels to {len(mean)}"
        )
    raw = bytearray(b"".join([picture.tobytes() for picture in pictures]))
    pixels = torch.frombuffer(raw, dtype=torch.uint8).view(len(pictures), first.height, first.width, channels)
    pixels = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    per_channel = (len(mean), 1, 1)
    return pixels.div_(255).sub_(torch.tensor(mean).view(per_channel)).div_(torch.tensor(std).view(per_channel))


def denormalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `to_tensor`, for pictures in reports: float (..., C, H, W) -> uint8, clipped."""
    import torch

    per_channel = (len(mean), 1, 1)
    pixels = pixels.float().cpu() * torch.tensor(std).view(per_channel) + torch.tensor(mean).view(per_channel)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)

"""Views of pictures: the geometry and the colours against torchvision's own transforms, driven by the same draws."""

import random
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from fledge.config import load
from fledge.data.augment import (
    AugmentConfig,
    ClipAugmentConfig,
    EvalConfig,
    Jitter,
    MultiCropConfig,
    View,
    crop_box,
    denormalise,
    eval_view,
    resize_short_side,
    to_tensor,
    turn_hue,
)
from fledge.data.images import augment_batch
from fledge.errors import InputError


class TorchRandom(Random):
    """Draws as torchvision does, from torch's global generator: equal order of draws gives equal pictures."""

    def random(self):
        return torch.rand(1).item()

    def uniform(self, a, b):
        return torch.empty(1).uniform_(a, b).item()

    def randrange(self, n):
        return torch.randint(0, n, (1,)).item()

    def sample(self, population, k):
        return [population[i] for i in torch.randperm(k).tolist()]


def photo(width=80, height=60, mode="RGB", seed=0):
    """Smooth colours with an edge, so that resampling and hue have something to do."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 10, 40), (width // 3, height // 4, width // 2, height // 2))
    return image.convert(mode)


def same(ours, theirs):
    assert ours.mode == theirs.mode and ours.size == theirs.size
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# -- against torchvision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 60), (32, 32), (500, 20), (20, 500), (1, 1)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.4), (0.9, 1.0)])
def test_crop_box_is_torchvisions(size, scale):
    image = Image.new("L", size)
    for seed in range(150):
        torch.manual_seed(seed)
        upper, left, height, width = transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        torch.manual_seed(seed)
        assert crop_box(*size, scale, (3 / 4, 4 / 3), TorchRandom()) == (left, upper, left + width, upper + height)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("config", [AugmentConfig(size=24), ClipAugmentConfig(size=24)], ids=["mae", "clip"])
def test_single_view_is_torchvisions(config, mode):
    image = photo(mode=mode)
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(24, scale=config.scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(config.flip),
        ]
    )
    for seed in range(30):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        same(config.view()(image, TorchRandom()), expected)


class Blur:
    """DINO's blur, stated with PIL."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if torch.rand(1).item() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2.0).item()))


class Solarize:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return ImageOps.solarize(image) if torch.rand(1).item() < self.p else image


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["global 1", "global 2", "local"])
def test_multi_crop_is_dinos_pipeline(which, mode):
    image, config = photo(mode=mode), MultiCropConfig(global_size=32, local_size=16)
    size, scale, blur, solarize = [(32, (0.4, 1.0), 1.0, 0.0), (32, (0.4, 1.0), 0.1, 0.2), (16, (0.05, 0.4), 0.5, 0.0)][
        which
    ]
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            Blur(blur),
            Solarize(solarize),
        ]
    )
    view = (*config.global_views(), config.local_view())[which]
    for seed in range(80):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        same(view(image, TorchRandom()), expected)


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.001, 0.0, 0.07, 0.5])
def test_hue_is_torchvisions(turn):
    same(turn_hue(photo(), turn), transforms.functional.adjust_hue(photo(), turn))


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (33, 47), (20, 20)])
@pytest.mark.parametrize("resize", [None, 24, 31])
def test_eval_view_is_torchvisions(size, resize):
    config = EvalConfig(size=24, resize=resize)
    theirs = transforms.Compose(
        [transforms.Resize(config.short_side, InterpolationMode.BICUBIC), transforms.CenterCrop(24)]
    )
    same(eval_view(photo(*size), config), theirs(photo(*size)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_to_tensor_is_torchvisions(mode):
    config = EvalConfig() if mode == "RGB" else EvalConfig(mean=(0.3,), std=(0.2,))
    pictures = [photo(20, 14, mode, seed) for seed in range(3)]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])
    ours = to_tensor(pictures, config.mean, config.std)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    torch.testing.assert_close(ours, torch.stack([theirs(picture) for picture in pictures]), rtol=0, atol=0)
    back = denormalise(ours, config.mean, config.std)
    np.testing.assert_array_equal(back[0].permute(1, 2, 0).squeeze(-1).numpy(), np.asarray(pictures[0]))


# -- distributions and knobs -----------------------------------------------------------------------------------------


def test_crop_box_stays_within_its_bounds():
    rng = Random(0)
    for _ in range(2000):
        left, upper, right, lower = crop_box(300, 200, (0.2, 0.6), (3 / 4, 4 / 3), rng)
        assert 0 <= left < right <= 300 and 0 <= upper < lower <= 200
        w, h = right - left, lower - upper
        assert 0.19 <= w * h / 60000 <= 0.61
        assert 0.74 <= w / h <= 1.35


def counted(view, image, rounds=4000):
    """How often a view changes a picture that its crop leaves as it is."""
    return sum(view(image, rng).tobytes() != image.tobytes() for rng in map(Random, range(rounds))) / rounds


WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@pytest.mark.parametrize("gate", ["flip", "grey", "blur", "solarize", "jitter_p"])
def test_gates_open_as_often_as_they_say(gate):
    image = photo(16, 16)
    assert counted(View(16, **WHOLE, jitter=Jitter(0.4, 0.4, 0.2, 0.1)), image, 50) == 0
    share = counted(View(16, **WHOLE, jitter=Jitter(0.4, 0.4, 0.2, 0.1), **{gate: 0.3}), image)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_published_defaults():
    mae, clip, dino = AugmentConfig(), ClipAugmentConfig(), MultiCropConfig()
    assert (mae.size, mae.scale, mae.flip) == (224, (0.2, 1.0), 0.5)
    assert mae.mean == (0.485, 0.456, 0.406) and mae.std == (0.229, 0.224, 0.225)
    assert (clip.scale, clip.flip) == ((0.9, 1.0), 0.0)
    assert (dino.global_size, dino.global_scale, dino.local_size, dino.local_scale) == (224, (0.4, 1), 96, (0.05, 0.4))
    assert (dino.local_crops, dino.flip, dino.jitter, dino.grey, dino.solarize) == (8, 0.5, 0.8, 0.2, 0.2)
    assert (dino.brightness, dino.contrast, dino.saturation, dino.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (dino.blur, dino.blur_radius) == ((1.0, 0.1, 0.5), (0.1, 2.0))
    assert [view.solarize for view in (*dino.global_views(), dino.local_view())] == [0.0, 0.2, 0.0]
    assert EvalConfig().short_side == 256


def test_switching_one_gate_off_leaves_the_crops_as_they_were():
    image, letters = photo(), MultiCropConfig(global_size=24, jitter=0, grey=0, solarize=0, blur=(0.0, 0.0, 0.0))
    mirrored = letters.model_copy(update={"flip": 1.0}).global_views()[0](image, Random(3))
    straight = letters.model_copy(update={"flip": 0.0}).global_views()[0](image, Random(3))
    same(ImageOps.mirror(mirrored), straight)


def test_same_seeds_same_pixels_and_the_global_generators_stay():
    pictures, config = [photo(seed=1), photo(seed=2)], MultiCropConfig(global_size=24, local_size=12, local_crops=4)
    random.seed(7), torch.manual_seed(7), np.random.seed(7)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = augment_batch(pictures, [Random(11), Random(12)], config)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1]) and (np.random.get_state()[1] == before[2]).all()
    assert first["global_crops"].shape == (2, 2, 3, 24, 24) and first["local_crops"].shape == (2, 4, 3, 12, 12)
    swapped = augment_batch(pictures[::-1], [Random(12), Random(11)], config)
    for name in first:
        assert torch.equal(first[name], swapped[name].flip(0))  # a row depends on its picture and seed alone
        assert not torch.equal(first[name], augment_batch(pictures, [Random(13), Random(14)], config)[name])


def test_short_side():
    assert resize_short_side(photo(80, 60), 30).size == (40, 30)
    assert resize_short_side(photo(60, 81), 30).size == (30, 40)


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, override, expected",
    [
        (AugmentConfig, "scale=[0.5, 0.2]", "smaller first"),
        (AugmentConfig, "scale=[0.5, 2.0]", "at most 1"),
        (AugmentConfig, "flip=1.5", "flip"),
        (AugmentConfig, "mean=[0.5]", "one number a channel"),
        (EvalConfig, "resize=100", "at least size"),
        (MultiCropConfig, "hue=0.7", "hue"),
    ],
)
def test_impossible_values_are_refused(cls, override, expected):
    with pytest.raises(InputError, match=expected):
        load(cls, {}, [override])


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="3 numbers but the pictures have 1 channel"):
        to_tensor([photo(mode="L")], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

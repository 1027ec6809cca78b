"""What a dual encoder knows of pictures and words that it never saw: retrieval both ways, and naming classes.

N pictures, K captions, T tokens, D features.
"""

import hashlib
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from fledge import distributed
from fledge.config import Config
from fledge.data.augment import EvalConfig, denormalise
from fledge.data.images import Images, ImagesConfig, WorldImages, eval_batch
from fledge.data.pairs import PairsConfig
from fledge.data.tokenizer import tokenize
from fledge.errors import InputError
from fledge.evals.retrieval import chance, recall_at, right_ranks
from fledge.evals.score import Score, bootstrap
from fledge.evals.vision import clusters
from fledge.evals.zero_shot import class_embeddings, fill, zero_shot_correct
from fledge.pictures import captioned_rows
from fledge.stream import Permutation


class Encoders(Protocol):
    """Pictures and texts into one space, as features of unit length."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, D)"""
        ...

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, T), (n, T) -> (n, D)"""
        ...


class ZeroShot(Config):
    """Labelled pictures, to be named by prompts about their class. One of `images` and `pairs`."""

    images: ImagesConfig | None = None
    """The world's glyphs by script, or a folder with one subfolder a class."""
    pairs: PairsConfig | None = None
    """JSON lines whose caption_field names the class."""
    templates: tuple[str, ...] | None = None
    """Prompts, {} being the class; their embeddings are averaged. null: the world's own, else the bare name."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.images is None) == (self.pairs is None):
            raise ValueError("give either images (labelled pictures) or pairs (JSON lines with the class as caption)")
        if self.templates is not None and not (self.templates and all("{}" in one for one in self.templates)):
            raise ValueError("templates needs at least one, each with {} where the class's name goes")
        return self


class ContrastiveEval(Config):
    """Held-out pairs to retrieve, and pictures to classify without training."""

    pairs: PairsConfig
    """Captions with all their pictures; none of them trained on."""
    limit: PositiveInt | None = None
    """The most captions, drawn once by a keyed permutation; null takes all."""
    zero_shot: ZeroShot | None = None


@torch.no_grad()
def embed_images(clip: Encoders, pixels: Tensor, batch: int = 256) -> Tensor:
    """(N, C, H, W) -> (N, D) on the CPU."""
    return torch.cat([clip.encode_image(part.to(distributed.device())).cpu() for part in pixels.split(batch)])


@torch.no_grad()
def embed_texts(clip: Encoders, table: dict[str, Tensor], batch: int = 256) -> Tensor:
    """Rows of ``tokenize`` -> (N, D) on the CPU."""
    stacked = torch.stack([table["input_ids"], table["attention_mask"]])  # (2, N, T)
    return torch.cat([clip.encode_text(*part.to(distributed.device())).cpu() for part in stacked.split(batch, dim=1)])


class Pictures:
    """One model's features of pictures; those that were asked for before are not embedded again."""

    def __init__(self, model: Encoders) -> None:
        self.model, self.known = model, dict[bytes, Tensor]()

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D) on the CPU."""
        names = [hashlib.blake2b(picture.numpy().tobytes()).digest() for picture in pixels]
        new = {name: i for i, name in enumerate(names) if name not in self.known}
        if new:
            self.known.update(zip(new, embed_images(self.model, pixels[list(new.values())]), strict=True))
        return torch.stack([self.known[name] for name in names])


class Embedded(NamedTuple):
    image: Tensor  # (N, D)
    text: Tensor  # (K, D)


class HeldOut(NamedTuple):
    """Pairs to retrieve: K captions and N pictures, each with the number of its caption."""

    captions: list[str]
    text: dict[str, Tensor]
    pixels: Tensor
    owner: Tensor

    @classmethod
    def open(cls, config: ContrastiveEval, view: EvalConfig, tokens: Any, max_length: int) -> "HeldOut":
        pairs = config.pairs.open()
        order = Permutation(len(pairs), "evaluation")
        chosen = [order[i] for i in range(min(config.limit or len(pairs), len(pairs)))]
        captions = [pairs.captions[i] for i in chosen]
        pictures = [(number, picture) for number, i in enumerate(chosen) for picture in pairs.members[i]]
        pixels = eval_batch(pairs.images, [picture for _, picture in pictures], view)
        return cls(captions, tokenize(tokens, captions, max_length), pixels, torch.tensor([n for n, _ in pictures]))

    def embedded(self, pictures: Pictures) -> Embedded:
        return Embedded(pictures(self.pixels), embed_texts(pictures.model, self.text))


def retrieval(after: Embedded, before: Embedded, held: HeldOut) -> list[Score]:
    """Recall of pictures by caption, and of captions by picture, resampled by caption."""
    number = torch.arange(len(held.captions))

    def ranks(found: Embedded) -> tuple[Tensor, Tensor]:
        image, text = found
        return right_ranks(text, image, number, held.owner), right_ranks(image, text, held.owner, number)

    ranked, first = ranks(after), ranks(before)
    owners = (number, held.owner)
    scores = []
    for way, name in enumerate(("text to image", "image to text")):
        right = recall_at(ranked[way], 1)
        low, high = bootstrap(right, owners[way].numpy())
        scores.append(
            Score(
                metric=f"{name} recall@1",
                after=float(right.mean()),
                before=float(recall_at(first[way], 1).mean()),
                baseline=chance(owners[way], owners[1 - way], 1),
                baseline_name="chance",
                low=low,
                high=high,
                n=len(held.captions),
                unit="captions",
                note=f"recall@5 {recall_at(ranked[way], 5).mean():.4f}, by chance "
                f"{chance(owners[way], owners[1 - way], 5):.4f}; {len(held.owner)} pictures",
            )
        )
    return scores


def prompts_of(config: ZeroShot, images: Images) -> list[list[str]]:
    """The prompts of each class."""
    if config.templates is None and isinstance(images, WorldImages):
        from fledge.data.world import script_prompts

        return [list(script_prompts(name)) for name in images.classes]
    return [fill(config.templates or ("{}",), name) for name in images.classes]


def zero_shot(
    clip: Pictures, before: Pictures, config: ZeroShot, view: EvalConfig, tokens: Any, max_length: int
) -> Score:
    """Accuracy of naming the class of held-out pictures, averaged over the classes that occur.

    How frequent a class is in the test set is chance, and nothing that never saw a label can know it; so each class
    counts the same, and naming one class every time scores as little as guessing.
    """
    images = config.images.open() if config.images else config.pairs.open().images  # type: ignore[union-attr]
    if images.labels is None:
        raise InputError("evaluation.zero_shot.images has no labels; give a folder with one subfolder a class")
    prompts, ids = prompts_of(config, images), list(range(len(images)))
    pixels, labels = eval_batch(images, ids, view), torch.tensor(list(images.labels))

    def right(model: Pictures) -> np.ndarray:
        classes = class_embeddings(lambda texts: embed_texts(model.model, tokenize(tokens, texts, max_length)), prompts)
        return zero_shot_correct(model(pixels), classes, labels).numpy()

    frequency = labels.bincount(minlength=len(images.classes))
    K, weights = int((frequency > 0).sum()), (1 / frequency[labels]).double().numpy()
    after = right(clip)
    groups, unit_name = clusters(images, ids)
    low, high = bootstrap(after, groups, weights=weights)
    return Score(
        metric="zero-shot accuracy, mean over classes",
        after=float(np.average(after, weights=weights)),
        before=float(np.average(right(before), weights=weights)),
        baseline=1 / K,
        baseline_name="chance",
        low=low,
        high=high,
        n=len(np.unique(groups)),
        unit=unit_name,
        note=f"{K} of {len(images.classes)} classes occur; {len(ids)} pictures, of which {after.mean():.4f} are right, "
        f"{float(frequency.max()) / len(labels):.4f} by naming the most frequent class",
    )


def retrieval_sheet(after: Embedded, held: HeldOut, view: EvalConfig, n: int = 10, k: int = 5):
    """Captions, each with the k pictures that it finds first; the right ones are framed. A PIL image."""
    asked = np.linspace(0, len(held.captions) - 1, min(n, len(held.captions))).astype(int).tolist()
    image, text = after
    found = (text[asked] @ image.T).topk(min(k, len(held.pixels)), dim=1).indices  # (n, k)
    pictures = denormalise(held.pixels[found], view.mean, view.std)
    right = held.owner[found] == torch.tensor(asked)[:, None]
    return captioned_rows([held.captions[i] for i in asked], pictures, right)


def evaluate(
    clip: Encoders, before: Encoders, config: ContrastiveEval, view: EvalConfig, tokens: Any, max_length: int
) -> tuple[list[Score], Any]:
    """The scores beside those of ``before``, and a sheet of what held-out captions find (a PIL image)."""
    held = HeldOut.open(config, view, tokens, max_length)
    pictures = Pictures(clip), Pictures(before)
    named = [zero_shot(*pictures, config.zero_shot, view, tokens, max_length)] if config.zero_shot else []
    after, first = (held.embedded(of) for of in pictures)
    return named + retrieval(after, first, held), retrieval_sheet(after, held, view)

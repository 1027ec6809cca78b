"""Naming pictures by sentences about their class: no label was ever trained on.

N pictures, K classes, D features of unit length.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def class_embeddings(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> Tensor:
    """One direction a class: the mean of its prompts' unit features, brought to unit length again. (K, D).

    Args:
        embed_text: texts -> (n, D), of unit length.
        prompts: K lists of at least one prompt each.
    """
    features = embed_text([text for texts in prompts for text in texts])
    return torch.stack([F.normalize(part.mean(dim=0), dim=0) for part in features.split([len(t) for t in prompts])])


def zero_shot_correct(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """(N,) 1. where the nearest class direction is the right one. images (N, D), classes (K, D), labels (N,)."""
    return ((images @ classes.T).argmax(dim=1) == labels).double()


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The prompts of one class; ``{}`` in a template stands for its name."""
    return [template.replace("{}", name) for template in templates]

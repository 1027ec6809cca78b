"""DINO's weighted k-nearest-neighbour classifier (its eval_knn.py): what features know without training anything.

N training and M test features of width D, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.evals.features import chunks


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, n_classes: int, *, k: int = 20, temp: float = 0.07, batch: int = 256
) -> Tensor:
    """(N, D), (N,), (M, D) -> (M, K): the k nearest by cosine vote for their classes with weight exp(cosine / temp).

    k is cut to N. Any M will do, also fewer than one batch; a row's votes do not depend on the others.
    """
    k = min(k, len(train))
    train = F.normalize(train, dim=1)
    classes = F.one_hot(labels, n_classes).to(train.dtype)  # (N, K)
    votes = [train.new_zeros(0, n_classes)]
    for rows in chunks(test, batch):
        cosines, nearest = (F.normalize(rows, dim=1) @ train.T).topk(k, dim=1)  # (b, k)
        votes.append(torch.einsum("bk,bkc->bc", (cosines / temp).exp(), classes[nearest]))
    return torch.cat(votes)


def knn_correct(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temp: float = 0.07, top: int = 1
) -> Tensor:
    """(M,) 1. where the right class is among the `top` most voted, else 0."""
    n_classes = int(torch.cat([labels, test_labels]).max()) + 1
    votes = knn_votes(train, labels, test, n_classes, k=k, temp=temp)
    # k neighbours name at most k classes (the authors' min(5, k)); equal votes in the order of classes.
    best = votes.argsort(dim=1, descending=True, stable=True)[:, : min(top, k)]
    return (best == test_labels[:, None]).any(dim=1).to(torch.float32)

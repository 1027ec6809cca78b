"""Linear probe: multinomial logistic regression on frozen, standardised features.

MAE's probe is BatchNorm without affine parameters and one linear layer, trained by LARS over augmented views. Here the
features are computed once and the convex problem is solved to its optimum by full-batch L-BFGS: deterministic, without
a learning rate, seconds instead of hours; its L2 penalty is chosen on a validation split. The standardisation is then
folded into the linear layer, so that the result is a plain head.

N features of width D, K classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of MAE's BatchNorm1d
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # from strong to weak: each solution starts the next


@dataclass(frozen=True)
class Linear:
    """logits = x @ weight.T + bias; weight (K, D), bias (K,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x), self.bias.to(x))


class Probe(NamedTuple):
    head: Linear
    """For the raw features: the standardisation is folded in."""
    l2: float
    val_accuracy: float


def standardiser(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> mean (D,), std (D,), as BatchNorm1d would normalise the whole set as one batch."""
    return x.mean(dim=0), (x.var(dim=0, correction=0) + EPS).sqrt()


def fold(head: Linear, mean: Tensor, std: Tensor) -> Linear:
    """The head that does on x what `head` does on (x - mean) / std."""
    weight = head.weight / std
    return Linear(weight, head.bias - weight @ mean)


def penalised_loss(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """Mean cross-entropy + l2 / 2 * |weight|^2; the bias is free."""
    return F.cross_entropy(F.linear(x, weight, bias), y) + 0.5 * l2 * weight.square().sum()


def solve(x: Tensor, y: Tensor, n_classes: int, l2: float, start: Linear | None = None, max_iter: int = 200) -> Linear:
    """The minimiser of `penalised_loss`, (N, D), (N,) -> a head. Convex: the start changes only the time."""
    weight = start.weight.clone() if start else x.new_zeros(n_classes, x.shape[1])
    bias = start.bias.clone() if start else x.new_zeros(n_classes)
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    exact = x.dtype == torch.float64
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9 if exact else 1e-5,
        tolerance_change=1e-15 if exact else 1e-8,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalised_loss(weight, bias, x, y, l2)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Linear(weight.detach(), bias.detach())


def accuracy(head: Linear, x: Tensor, y: Tensor) -> float:
    return (head(x).argmax(dim=1) == y).float().mean().item()


def fit_probe(
    x: Tensor,
    y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    n_classes: int,
    penalties: tuple[float, ...] = PENALTIES,
    max_iter: int = 200,
) -> Probe:
    """Solve for each penalty on (x, y) and keep the best on the validation rows, the stronger of equals.

    The validation rows choose the penalty and nothing else; they are not trained on.
    """
    mean, std = standardiser(x)
    x, val_x = (x - mean) / std, (val_x - mean) / std
    best: Probe | None = None
    head: Linear | None = None
    for l2 in sorted(penalties, reverse=True):
        head = solve(x, y, n_classes, l2, head, max_iter)
        right = accuracy(head, val_x, val_y)
        if best is None or right > best.val_accuracy:
            best = Probe(head, l2, right)
    assert best is not None, "no penalties given"
    return best._replace(head=fold(best.head, mean, std))


def prototypes(features: Tensor, labels: Tensor, n_classes: int, temp: float = 0.07) -> Linear:
    """(N, D), (N,) -> the head whose rows are the classes' mean directions.

    The nearest thing to k-NN that is a linear layer: with features of one length, softmax over cosine / temp.
    """
    classes = F.one_hot(labels, n_classes).to(features.dtype)  # (N, K)
    directions = F.normalize(classes.T @ F.normalize(features, dim=1), dim=1)  # (K, D)
    length = features.norm(dim=1).mean()
    return Linear(directions / (temp * length), features.new_zeros(n_classes))

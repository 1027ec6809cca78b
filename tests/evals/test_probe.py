"""The probe against the conditions of an optimum, and its head against the pipeline that it folds."""

import pytest
import torch
import torch.nn.functional as F

from fledge.evals.probe import fit_probe, fold, penalised_loss, prototypes, solve, standardiser


def blobs(n, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.tensor([[3.0, 0, 0, 10], [0, 3, 0, 10], [0, 0, 3, 10]], dtype=torch.float64)
    return centres[y] + spread * torch.randn(n, 4, generator=g, dtype=torch.float64), y


def test_solution_is_the_optimum():
    """The problem is strictly convex: where its gradient is zero is the only minimum."""
    x, y = blobs(60)
    head = solve(x, y, 3, l2=1e-2)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    penalised_loss(weight, bias, x, y, 1e-2).backward()
    assert weight.grad.abs().max() < 1e-7 and bias.grad.abs().max() < 1e-7
    # and it is what the gradient, written by hand, says: (p - onehot)' x / n + l2 w = 0
    p = head(x).softmax(dim=1) - F.one_hot(y, 3)
    torch.testing.assert_close(p.T @ x / 60, -1e-2 * head.weight, rtol=0, atol=1e-7)


def test_start_does_not_matter():
    x, y = blobs(60)
    warm = solve(x, y, 3, l2=1e-2, start=solve(x, y, 3, l2=1.0))
    torch.testing.assert_close(warm.weight, solve(x, y, 3, l2=1e-2).weight, rtol=1e-5, atol=1e-6)


def test_folding_is_exact_and_equals_batchnorm():
    x, y = blobs(90)
    mean, std = standardiser(x)
    norm = torch.nn.BatchNorm1d(4, eps=1e-6, affine=False).double()
    torch.testing.assert_close((x - mean) / std, norm(x))
    head = solve((x - mean) / std, y, 3, l2=1e-3)
    torch.testing.assert_close(fold(head, mean, std)(x), head((x - mean) / std), rtol=1e-9, atol=1e-9)


def test_validation_chooses_the_penalty():
    """Training rows with shuffled labels on a noise feature: the validation rows must prefer a strong penalty."""
    x, y = blobs(30, spread=2.0)
    noise = 5 * torch.randn(30, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    val_x, val_y = blobs(300, seed=2, spread=2.0)
    val_noise = 5 * torch.randn(300, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x, val_x = torch.cat([x, noise], 1), torch.cat([val_x, val_noise], 1)
    found = fit_probe(x, y, val_x, val_y, 3, penalties=(10.0, 1.0, 1e-6))
    alone = {l2: fit_probe(x, y, val_x, val_y, 3, penalties=(l2,)).val_accuracy for l2 in (10.0, 1.0, 1e-6)}
    assert found.val_accuracy == max(alone.values()) > alone[1e-6]
    assert alone[found.l2] == found.val_accuracy
    right = (found.head(val_x).argmax(1) == val_y).double().mean().item()
    assert right == pytest.approx(found.val_accuracy)


def test_prototypes_rank_by_cosine_to_the_class_mean():
    x, y = blobs(60)
    head = prototypes(x, y, 3)
    unit = F.normalize(x, dim=1)
    means = torch.stack([unit[y == c].mean(0) for c in range(3)])
    cosine = F.normalize(x, dim=1) @ F.normalize(means, dim=1).T
    assert torch.equal(head(x).argmax(1), cosine.argmax(1))
    assert not torch.allclose(head.weight, torch.zeros_like(head.weight)) and (head.bias == 0).all()

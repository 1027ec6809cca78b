"""Schedules against closed forms, end points and torch's own."""

import math

import pytest
import torch

from fledge.schedule import cosine, linear, warmup, warmup_then


def test_warmup():
    assert [warmup(s, peak=2.0, steps=4) for s in range(5)] == [0, 0.5, 1, 1.5, 2]
    assert [warmup(s, peak=5.0, steps=4, offset=1) for s in range(5)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [cosine, linear])
def test_ends_and_middle(shape):
    assert shape(0, start=3.0, end=1.0, steps=10) == 3
    assert shape(5, start=3.0, end=1.0, steps=10) == pytest.approx(2, abs=1e-15)
    assert shape(10, start=3.0, end=1.0, steps=10) == shape(99, start=3.0, end=1.0, steps=10) == 1
    assert shape(0, start=3.0, end=1.0, steps=0) == 3  # nothing to divide by


def test_cosine_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.5)
    for step in range(21):
        assert cosine(step, start=3.0, end=0.5, steps=20) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_mae_and_nanogpt():
    """Both written out from their papers' code in words: MAE per fractional epoch, nanoGPT per iteration."""
    for step in range(30):
        epoch = step / 5  # 5 iterations an epoch, 2 epochs of warm-up, 6 in all
        mae = epoch / 2 if epoch < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (epoch - 2) / (6 - 2)))
        assert warmup_then("cosine", step, peak=1.0, end=0.1, warmup_steps=10, steps=30) == pytest.approx(
            mae, rel=1e-12
        )
        if step < 10:
            gpt = (step + 1) / (10 + 1)
        else:
            gpt = 0.1 + 0.5 * (1 + math.cos(math.pi * (step - 10) / (30 - 10))) * (1 - 0.1)
        ours = warmup_then("cosine", step, peak=1.0, end=0.1, warmup_steps=10, steps=30, offset=1)
        assert ours == pytest.approx(gpt, rel=1e-12)


def test_constant_and_linear_after_warmup():
    lr = [warmup_then("constant", s, peak=1.0, end=0.0, warmup_steps=2, steps=6) for s in range(6)]
    assert lr == [0, 0.5, 1, 1, 1, 1]
    lr = [warmup_then("linear", s, peak=1.0, end=0.0, warmup_steps=2, steps=6) for s in range(7)]
    assert lr == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert warmup_then("linear", 0, peak=1.0, end=0.0, warmup_steps=0, steps=4) == 1

"""Clipping, groups and AdamW against closed forms and plain torch."""

import pytest
import torch
from torch import nn

from fledge.optim import Optim, OptimConfig, adamw, clip_each, clip_global, decay_groups


def parameters(*grads: list[float]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(len(grad), dtype=torch.float64)) for grad in grads]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = torch.tensor(grad, dtype=torch.float64)
    return made


def grads(made) -> list[list[float]]:
    return [p.grad.tolist() for p in made]


def test_global_clipping_scales_all_by_one_factor():
    made = parameters([3.0, 0.0], [4.0])  # norm 5
    assert clip_global(made, 1.0).item() == 5
    factor = 1 / (5 + 1e-6)
    assert grads(made) == [[3 * factor, 0], [4 * factor]]


def test_clipping_each_tensor_by_itself():
    made = parameters([3.0, 4.0], [0.5], [0.0])  # norms 5, .5, 0
    assert clip_each(made, 1.0).item() == pytest.approx((25 + 0.25) ** 0.5, abs=1e-15)
    factor = 1 / (5 + 1e-6)
    assert grads(made) == [[3 * factor, 4 * factor], [0.5], [0.0]]


@pytest.mark.parametrize("clip", [clip_global, clip_each])
@pytest.mark.parametrize("limit", [None, 100.0])
def test_small_gradients_stay(clip, limit):
    made = parameters([3.0, 0.0], [4.0])
    unused = nn.Parameter(torch.zeros(2))
    assert clip([*made, unused], limit).item() == 5
    assert grads(made) == [[3.0, 0.0], [4.0]] and unused.grad is None


def two_groups(start_step: int, clip: float | None = None, clip_mode="global"):
    early, late = parameters([3.0], [4.0])
    nn.init.ones_(early), nn.init.ones_(late)
    config = OptimConfig(lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, decay="constant", clip=clip)
    groups = [{"params": [early], "decay": False, "lr_scale": 2.0}, {"params": [late], "start_step": start_step}]
    return early, late, adamw(groups, config, batch=1, steps=10, steps_per_epoch=5, clip_mode=clip_mode)


def test_a_group_that_starts_later_neither_moves_nor_decays_nor_counts():
    early, late, optim = two_groups(start_step=2)
    for step in range(4):
        early.grad, late.grad = torch.full_like(early, 3.0), torch.full_like(late, 4.0)
        norm = optim.prepare(step)
        assert norm.item() == 5  # what is logged is the whole gradient
        optim.step()
        if step < 2:
            assert late.item() == 1 and late not in optim.optimizer.state
    # AdamW with a constant gradient moves by lr in each step; lr_scale doubles it; weight decay shrinks first
    assert early.item() == pytest.approx(1 - 4 * 0.2, abs=1e-7)
    value = 1.0
    for _ in range(2):
        value = value * (1 - 0.1 * 0.5) - 0.1
    assert late.item() == pytest.approx(value, abs=1e-7)
    assert optim.optimizer.state[late]["step"].item() == 2


def test_clipping_comes_before_gradients_are_dropped():
    """As in the authors' DINO: the frozen layer's gradient counts in a global norm."""
    early, _, optim = two_groups(start_step=1, clip=1.0)
    optim.prepare(0)
    assert early.grad.item() == 3 / (5 + 1e-6)
    early, _, optim = two_groups(start_step=1, clip=1.0, clip_mode="tensor")
    optim.prepare(0)
    assert early.grad.item() == 3 / (3 + 1e-6)


def test_rates_are_set_for_each_step():
    early, late = parameters([1.0], [1.0])
    optimizer = torch.optim.AdamW([{"params": [early], "lr_scale": 0.5}, {"params": [late], "decay": False}])
    optim = Optim(optimizer, lr=lambda step: 0.1 * step, weight_decay=lambda step: 0.01 * step)
    optim.prepare(3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.15000000000000002, 0.03),
        (0.30000000000000004, 0.0),
    ]


def test_decay_groups():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    module[2].weight = module[0].weight  # tied
    module.add_module("table", nn.Embedding(4, 3))
    module[3].weight.requires_grad_(False)
    decayed, spared = decay_groups(module, start_step=7)
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight)]
    names = {id(p): n for n, p in module.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert decayed["decay"] and not spared["decay"] and decayed["start_step"] == spared["start_step"] == 7
    assert len(decay_groups(module, exempt=lambda name, p: True)) == 1


def test_lr_is_stated_for_a_batch():
    assert OptimConfig(lr=1.5e-4, lr_batch=256).peak_lr(4096) == 1.5e-4 * 16
    assert OptimConfig(lr=1.5e-4).peak_lr(4096) == 1.5e-4
    lr = OptimConfig(lr=1.0, warmup="2 epochs", decay="linear").lr_at(batch=8, steps=30, steps_per_epoch=5)
    assert [lr(0), lr(5), lr(10), lr(20), lr(30)] == [0, 0.5, 1, 0.5, 0]


@pytest.mark.parametrize("lr", [-1e-4, 1e38])
def test_what_is_no_rate_is_refused(lr):
    with pytest.raises(ValueError, match="no learning rate"):
        OptimConfig(lr=lr)


def test_adamw_is_torchs():
    """Ten steps with clipping and rates against torch's own calls."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, clip=0.5, warmup=3, min_lr=0.01)
    optim = adamw(decay_groups(ours), config, batch=4, steps=10, steps_per_epoch=5)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    for step in range(10):
        x = torch.randn(4, 5)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
        norm = optim.prepare(step)
        for group in plain.param_groups:
            group["lr"] = optim.lr(step)
        assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        optim.step()
        plain.step()
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)

"""The slow copy: an exponential moving average of parameters. Its momentum is a `schedule.cosine` of the step."""

import torch
from torch import nn

from fledge import distributed


@torch.no_grad()
def update(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """target = momentum * target + (1 - momentum) * source, in place. Parameters only: buffers have their own rules."""
    slow, fast = ([distributed.local(p) for p in module.parameters()] for module in (target, source))
    torch._foreach_lerp_(slow, fast, 1 - momentum)


def copy(target: nn.Module, source: nn.Module) -> nn.Module:
    """Gives target the source's state by value (never its storage), and takes it out of training."""
    target.load_state_dict(source.state_dict())
    return target.requires_grad_(False)

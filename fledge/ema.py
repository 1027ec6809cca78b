"""The slow copy: an exponential moving average of parameters, as a model beside another one or in its place."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

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


class Average(nn.Module):
    """The average of those parameters of a model that learn, in buffers: checkpoints hold it.

    What is frozen is its own average and is not copied.

    Args:
        learning: some of the model's parameters; by default those that are trainable now.
    """

    def __init__(self, model: nn.Module, momentum: float, learning: Iterable[nn.Parameter] | None = None) -> None:
        super().__init__()
        self.momentum = momentum
        chosen = {id(p) for p in (model.parameters() if learning is None else learning) if p.requires_grad}
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen:
                self.register_buffer(name.replace(".", "/"), parameter.detach().clone())

    def pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """(average, parameter) of each."""
        parameters = dict(model.named_parameters())
        return [(slow, parameters[name.replace("/", ".")]) for name, slow in self.named_buffers()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average = momentum * average + (1 - momentum) * parameter."""
        slow, fast = zip(*self.pairs(model), strict=True)
        torch._foreach_lerp_(list(slow), list(fast), 1 - self.momentum)

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """In here the model's parameters are the average."""
        pairs = self.pairs(model)
        live = [parameter.detach().clone() for _, parameter in pairs]
        with torch.no_grad():
            for slow, parameter in pairs:
                parameter.copy_(slow)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), value in zip(pairs, live, strict=True):
                    parameter.copy_(value)

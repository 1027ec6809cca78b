"""FSDP2 (``torch.distributed.fsdp.fully_shard``): parameters, gradients and optimiser state in shards over the ranks.

What trains is a copy of the objective whose parameters are DTensors, each rank holding some rows of each. The objective
itself, to which its stage keeps references, is empty meanwhile and is filled whenever somebody wants to look at it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fledge import distributed
from fledge.checkpoint import module_tensors
from fledge.errors import InputError, RunError


def shard(
    objective: nn.Module, optimizer: torch.optim.Optimizer, blocks_of: Callable[[nn.Module], list[nn.Module]]
) -> nn.Module:
    """The copy of ``objective`` that trains: each block a unit that is gathered and freed by itself, the rest another.

    The optimiser, which must not have made a step yet, trains the copy from now on. The objective is left empty.

    Raises:
        InputError: there is one rank, or a parameter has no rows to deal out.
        RunError: some parameter is not in shards over all ranks after all.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check(objective)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    sharded = copy.deepcopy(objective)
    release(objective)
    mesh = init_device_mesh(distributed.device().type, (distributed.world_size(),))
    for block in reversed(blocks_of(sharded)):  # blocks inside of blocks come first
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    parameters: dict[str, Any] = dict(sharded.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameters[names[id(parameter)]] for parameter in group["params"]]
    whole = [name for name, p in parameters.items() if not distributed.is_sharded(p) or p.device_mesh != mesh]
    if distributed.engine_of(sharded) != "fsdp2" or whole:
        raise RunError(f"train.engine: fsdp2 was asked for, but {', '.join(whole[:4]) or 'the model'} is not in shards")
    return sharded


def check(objective: nn.Module) -> None:
    if distributed.world_size() == 1:
        raise InputError(
            "train.engine: fsdp2 deals parameters out over processes, and there is one; start several (fledge launch "
            "FILE --procs N), or go on with train.engine=ddp, which is the same run"
        )
    scalars = [name for name, parameter in objective.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise InputError(
            f"train.engine: fsdp2 deals out rows, and {', '.join(scalars)} has none; give it the shape (1,), or train "
            "with train.engine=ddp"
        )


@torch.no_grad()
def gather(objective: nn.Module, sharded: nn.Module) -> None:
    """Fill the objective on this rank's device with all of what is in shards, tensor by tensor. Every rank calls it.

    Raises:
        RunError: there is no memory for it.
    """
    live = module_tensors(sharded)
    try:
        for name, tensor in module_tensors(objective).items():
            tensor.data = distributed.whole(live[name])
        objective.to(distributed.device())  # what is no part of its state, such as tables of positions
    except torch.OutOfMemoryError:
        raise RunError(
            "the whole model does not fit on this device beside its shards, and evaluation and hand-over need it; "
            "train without train.eval_every, and hand over the last checkpoint: fledge export RUN DIR train.device=cpu"
        ) from None


def release(objective: nn.Module) -> None:
    """Let go of the memory of all its parameters and buffers; what is tied or referred to stays so."""
    for tensor in module_tensors(objective).values():
        tensor.data = tensor.new_empty(0)


@contextmanager
def gathered(objective: nn.Module, trained: nn.Module) -> Iterator[None]:
    """In here the objective has the parameters of ``trained``, which may be it or its copy in shards."""
    if trained is objective:
        yield
        return
    gather(objective, trained)
    try:
        yield
    finally:
        release(objective)

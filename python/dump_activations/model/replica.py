"""A run's own copy of a model that belongs to its caller."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from dump_activations.model.encoder import Encoder

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


def replicate(
    model: Encoder,
    device: torch.device,
    dtype_in: Callable[[nn.Module], torch.dtype | None] = lambda _: None,
) -> Encoder:
    """Return a model in eval mode on a device that shares all it can with the given one.

    It has the same weights, in the same memory where they need not be moved or cast, and the same
    hooks. Its mode, its device and the hooks that it gets are its own: whatever becomes of a run,
    the caller's model is as it was.

    Args:
        model: the model.
        device: where the weights are to be.
        dtype_in: module -> what its own weights are to be cast to; None leaves them as they are.
    """
    return _replica(model, device, dtype_in).eval()


def _replica(
    module: _ModuleT, device: torch.device, dtype_in: Callable[[nn.Module], torch.dtype | None]
) -> _ModuleT:
    replica = copy.copy(module)
    tables = {name: copy.copy(it) for name, it in vars(module).items() if isinstance(it, dict)}
    vars(replica).update(tables)
    for name, child in module.named_children():
        setattr(replica, name, _replica(child, device, dtype_in))
    dtype = dtype_in(module)
    for name, weight in module.named_parameters(recurse=False):
        moved = weight.detach().to(device, dtype or weight.dtype)
        if (moved.device, moved.dtype) != (weight.device, weight.dtype):
            moved = nn.Parameter(moved, requires_grad=weight.requires_grad)
            setattr(replica, name, moved)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(replica, name, buffer.to(device))
    return replica

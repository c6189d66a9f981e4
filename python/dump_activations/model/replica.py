"""A run's own copy of a model that belongs to its caller."""

import copy
from typing import TypeVar

import torch
from torch import nn

from dump_activations.model.encoder import Encoder

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


def replicate(model: Encoder, device: torch.device) -> Encoder:
    """Return a model in eval mode on a device that shares all it can with the given one.

    It has the same weights, where the device is the same in the same memory, and the same hooks.
    Its mode, its device and the hooks that it gets are its own: whatever becomes of a run, the
    caller's model is as it was.
    """
    return _replica(model, device).eval()


def _replica(module: _ModuleT, device: torch.device) -> _ModuleT:
    replica = copy.copy(module)
    tables = {name: copy.copy(it) for name, it in vars(module).items() if isinstance(it, dict)}
    vars(replica).update(tables)
    for name, child in module.named_children():
        setattr(replica, name, _replica(child, device))
    for name, weight in module.named_parameters(recurse=False):
        if weight.device != device:
            moved = nn.Parameter(weight.detach().to(device), requires_grad=weight.requires_grad)
            setattr(replica, name, moved)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(replica, name, buffer.to(device))
    return replica

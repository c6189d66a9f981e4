"""The model of a run: loaded or handed in, checked, digested on the host, moved to its device."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from dump_activations.errors import InvalidArgumentError, option
from dump_activations.model.checkpoint import load_encoder, misfits, one_line
from dump_activations.model.encoder import Encoder, empty_encoder

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_WAY_OUT = "give an Encoder, as load_encoder returns it, or a checkpoint's path"


def prepare_model(
    init: str | os.PathLike[str] | nn.Module,
    device: torch.device,
    *,
    random_init: bool = False,
    seed: int = 0,
) -> Encoder:
    """Return a run's own model in eval mode on a device, with `weights_sha256` set.

    Args:
        init: a checkpoint as `load_encoder` takes it; or an Encoder, which may be wrapped by
            torch.compile, DistributedDataParallel, DataParallel or AveragedModel. A run leaves it
            as it is.
        device: the run's device.
        random_init: load the checkpoint's architecture with untrained weights.
        seed: of the untrained weights.

    Raises:
        InvalidArgumentError: neither of these, or a model that does not match its config.
        DumpActivationsError: as `load_encoder` raises.
    """
    if isinstance(init, str | os.PathLike):
        model = load_encoder(init, random_init=random_init, seed=seed)
    elif random_init:
        raise InvalidArgumentError(
            f"{option('random_init')}: the model is loaded already; give load_encoder "
            "random_init=True"
        )
    else:
        model = unwrap_model(init)
    replica = replicate(model, device)
    # Of the model on the host, so that no weight comes back from the device.
    replica.weights_sha256 = weights_sha256(model)
    return replica


def unwrap_model(model: object) -> Encoder:
    """Take an Encoder out of the wrappers of training scripts, and check that it can be run.

    Raises:
        InvalidArgumentError: no Encoder, sharded, quantised or unloaded weights, or modules that
            differ from its config. The text says what to give instead.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Encoder):
        wrapped = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if not isinstance(wrapped, nn.Module):
            break
        inner = wrapped
    if not isinstance(inner, Encoder):
        raise InvalidArgumentError(f"the model is {_description(model)}")
    for name, tensor in inner.state_dict(keep_vars=True).items():
        fault = _weight_fault(tensor)
        if fault:
            raise InvalidArgumentError(f"the model's {one_line(name)} {fault}; {_WAY_OUT}")
    problems = misfits(empty_encoder(inner.config).state_dict(), inner.state_dict())
    # Modules of its own that a subclass adds do no harm.
    if problems and not problems.startswith("unexpected"):
        raise InvalidArgumentError(
            f"the model's weights do not fit its config: {problems}; give an Encoder without "
            "parametrizations, adapters (merge_and_unload) or quantisation, with every block"
        )
    return inner


def _description(model: object) -> str:
    kind = type(model)
    if isinstance(model, Mapping):
        return f"a state dict ({kind.__name__}); {_WAY_OUT}"
    if kind.__module__.partition(".")[0] == "peft":
        return f"a {kind.__name__} of peft; give its model.merge_and_unload()"
    if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        return f"a traced one ({kind.__name__}), which has no modules to hook; {_WAY_OUT}"
    return f"a {kind.__name__}; {_WAY_OUT}"


def _weight_fault(tensor: object) -> str:
    """Say in one clause why a weight cannot be run as it is; "" where it can."""
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"is a {type(tensor).__name__}, not a plain tensor (sharded or quantised)"
    if tensor.is_meta:
        return "is on the meta device, without values"
    return ""


def weights_sha256(model: Encoder) -> str:
    """Digest names, dtypes, shapes and bytes of a model's weights, as docs/file-format.md says."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def replicate(
    model: Encoder,
    device: torch.device,
    dtype_in: Callable[[nn.Module], torch.dtype | None] = lambda _: None,
) -> Encoder:
    """Return a model in eval mode on a device that shares all it can with the given one.

    It has the same hooks and the same weights, in the same memory where they are neither moved nor
    cast. Its mode, its device and the hooks that it gets later are its own, so that a run leaves
    the caller's model as it was.

    Args:
        model: the model.
        device: the replica's device.
        dtype_in: module -> dtype to cast its own weights to; None leaves them as they are.
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

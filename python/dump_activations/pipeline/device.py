"""Turns the option `device` into a torch device that is there."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from dump_activations.errors import DeviceError, InvalidArgumentError, option, switch
from dump_activations.place import Place

_ALONE = Place()


def find_device(name: str, place: Place = _ALONE) -> torch.device:
    """Return the device of that name.

    Args:
        name: `cuda`, `cuda:N` or `cpu`.
        place: of several processes of a machine, `cuda` is to each the one of its local rank.

    Raises:
        DeviceError: there is no such CUDA device.
        InvalidArgumentError: several processes would share one.
    """
    kind, _, number = name.partition(":")
    if kind != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise DeviceError(
            f"{option('device')}: no CUDA device for {name!r} ({_why_no_cuda()}); "
            f"{option('device', 'cpu')} {switch('allow_cpu')} runs on the CPU"
        )
    if place.local_size > 1:
        if number:
            raise InvalidArgumentError(
                f"{option('device', name)}: not for {place.local_size} processes of one machine; "
                f"{option('device', 'cuda')} gives each its own"
            )
        number = str(place.local_rank)
    if not number:
        return torch.device("cuda", torch.cuda.current_device())
    # Compared here: torch keeps no more than the low byte of a larger number.
    if int(number) >= count:
        raise DeviceError(f"{option('device')}: no cuda:{number}; the last one is cuda:{count - 1}")
    return torch.device("cuda", int(number))


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # torch raises several kinds, each with the reason in its text
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return "torch sees none"


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the device is the thread's current one.

    A thread that names no CUDA device sets up a context of some 500 MB on the first one, whichever
    device the run uses.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def shared_cores(place: Place) -> Iterator[None]:
    """Let torch use this process's share of its machine's cores inside the context.

    torchrun sets OMP_NUM_THREADS to 1 where nobody has; another number is what somebody wants.
    """
    threads = torch.get_num_threads()
    if place.local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(place.cores)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    """Name the hardware, on which the bits of a result may depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"

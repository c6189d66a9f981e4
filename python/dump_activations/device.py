"""Turns `--device` into a torch device that is there."""

import torch

from dump_activations.errors import DeviceError


def cuda_is_available() -> bool:
    """Whether there is a CUDA device that torch can use."""
    return torch.cuda.is_available()


def find_device(name: str) -> torch.device:
    """Return the device of that name.

    Args:
        name: `cuda`, `cuda:N` or `cpu`.

    Raises:
        DeviceError: there is no such CUDA device.
    """
    kind, _, number = name.partition(":")
    if kind != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise DeviceError(
            f"--device: no CUDA device for {name!r}; --device cpu --allow-cpu runs on the CPU"
        )
    if not number:
        return torch.device("cuda", torch.cuda.current_device())
    # Compared here: torch keeps no more than the low byte of a larger number.
    if int(number) >= count:
        raise DeviceError(f"--device: no {name}; the last one is cuda:{count - 1}")
    return torch.device("cuda", int(number))

"""One of several processes: its place in a launcher's variables, and `--nproc-per-node`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from dump_activations.commands.console import print_error
from dump_activations.errors import DeviceError, InvalidArgumentError, option
from dump_activations.pipeline.interrupts import (
    UNREAD,
    HeldInterrupts,
    handled_by,
    terminate_with_parent,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

# As a module, but without the working directory among the places that modules come from.
_COMMAND = (sys.executable, "-P", "-m", "dump_activations")
_LAUNCHER = "DUMP_ACTIVATIONS_LAUNCHER"
_POLL_SECONDS = 0.05


def variable(name: str, default: int) -> int:
    """Return a number that a launcher put in the environment: RANK, WORLD_SIZE, LOCAL_RANK, ...

    Raises:
        InvalidArgumentError: the variable holds something else.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InvalidArgumentError(f"{name} must be a whole number; got {text!r}")
    return int(text)


def follow_launcher() -> None:
    """Have a process of `launch` terminated when its launcher ends, even by SIGKILL."""
    if launcher := variable(_LAUNCHER, 0):
        terminate_with_parent(launcher)


def launch(arguments: Sequence[str], processes: str) -> int:
    """Run the command in several processes of this machine, and return the first error's code.

    Each gets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. Signals are passed on. After the
    first error the others are terminated: they keep what is on disk.

    Args:
        arguments: the command's own.
        processes: a number, or "gpu" for one per CUDA device.

    Raises:
        InvalidArgumentError: `processes` is something else.
        DeviceError: there is no CUDA device to count.
    """
    count = _count(processes)
    started: list[subprocess.Popen[bytes]] = []
    is_interrupted = False

    def send(number: int, _frame: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        for process in started:
            process.send_signal(number)

    with handled_by(send):
        try:
            with HeldInterrupts():  # So that each process gets a signal that comes meanwhile.
                for rank in range(count):
                    place = {"RANK": rank, "LOCAL_RANK": rank, _LAUNCHER: os.getpid()}
                    place |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                    environment = os.environ | {name: str(each) for name, each in place.items()}
                    started.append(subprocess.Popen([*_COMMAND, *arguments], env=environment))
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                time.sleep(_POLL_SECONDS)
            code = next(filter(None, codes), 0)
            if code < 0 and code != UNREAD and not is_interrupted:  # Such a process wrote no line.
                print_error(f"process {codes.index(code)} was ended by signal {-code}")
            return code
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


def _count(processes: str) -> int:
    if processes != "gpu":
        if not processes.isdecimal() or int(processes) == 0:
            raise InvalidArgumentError(
                f"{option('nproc_per_node')}: must be a number of processes, or gpu; got "
                f"{processes!r}"
            )
        return int(processes)
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            f"{option('nproc_per_node', 'gpu')}: no CUDA device here; give the number of processes"
        )
    return torch.cuda.device_count()

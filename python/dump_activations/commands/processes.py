"""One of several processes: its place in a launcher's variables, and `--nproc-per-node`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from dump_activations.errors import DeviceError, InvalidArgumentError, option

if TYPE_CHECKING:
    from collections.abc import Sequence

# As a module, but without the working directory among the places that modules come from.
_COMMAND = (sys.executable, "-P", "-m", "dump_activations")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def variable(name: str, default: int) -> int:
    """Return a number that a launcher put in the environment: RANK, WORLD_SIZE, LOCAL_RANK, ...

    Raises:
        InvalidArgumentError: the variable holds something else.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InvalidArgumentError(f"{name} must be a whole number; got {text!r}")
    return int(text)


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

    def pass_on(number: int, _frame: object) -> None:
        for process in started:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            place["LOCAL_WORLD_SIZE"] = count
            environment = os.environ | {name: str(value) for name, value in place.items()}
            started.append(subprocess.Popen([*_COMMAND, *arguments], env=environment))
        return _first_error(started)
    finally:
        for process in started:
            process.terminate()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_error(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for the first process that fails, or for all of them."""
    running = {process.pid: process for process in processes}
    while running:
        pid, status = os.waitpid(-1, 0)
        if (process := running.pop(pid, None)) is not None:
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                return process.returncode
    return 0


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

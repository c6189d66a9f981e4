"""Starts the processes of a run on this machine, as torchrun does, and says how they ended."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dump_activations.commands.failures import DIRECTORY, read_failures
from dump_activations.errors import (
    DeviceError,
    DumpActivationsError,
    InvalidArgumentError,
    option,
)
from dump_activations.pipeline.interrupts import (
    TERMINATED,
    interruption_by,
    signal_name,
    terminate_with_parent,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from dump_activations.commands.failures import Failure

# As a module, but without the working directory among the places that modules come from.
_COMMAND = ("-P", "-m", "dump_activations")

_LAUNCHER = "DUMP_ACTIVATIONS_LAUNCHER"


class LaunchError(DumpActivationsError):
    """One of the processes failed. Its text is that process's line."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def is_launched() -> bool:
    """Whether this process is one that `launch` started.

    Raises:
        InvalidArgumentError: torchrun started it by itself.
    """
    if "RANK" not in os.environ:
        return False
    if DIRECTORY not in os.environ:
        raise InvalidArgumentError(
            f"{option('nproc_per_node')}: torchrun has started this process already; give it to "
            "torchrun, or leave torchrun out"
        )
    return True


def end_with_launcher() -> None:
    """Have this process terminated when its launcher ends, however that is."""
    terminate_with_parent(int(os.environ[_LAUNCHER]))


def launch(
    arguments: Sequence[str], *, processes: str, max_restarts: int, numa_binding: str | None
) -> None:
    """Run the command in several processes, and return when all are done.

    Args:
        arguments: the command's.
        processes: how many; "gpu" for as many as there are CUDA devices.
        max_restarts: how often all are started again when one fails.
        numa_binding: the mode of `torchrun --numa-binding`.

    Raises:
        InvalidArgumentError: no such number of processes.
        LaunchError: one of them failed.
        KeyboardInterrupt: this process was interrupted; all have ended.
    """
    if processes != "gpu" and (not processes.isdecimal() or int(processes) == 0):
        raise InvalidArgumentError(
            f"{option('nproc_per_node')}: {processes!r} is no number, or gpu"
        )
    # What a lost connection makes torch print; its errors say it better.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    from torch.numa.binding import AffinityMode, NumaOptions

    _silence(logging.getLogger("torch.distributed.elastic"))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=_number(processes),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
        numa_options=NumaOptions(AffinityMode(numa_binding)) if numa_binding else None,
    )
    with TemporaryDirectory() as directory:
        os.environ |= {DIRECTORY: directory, _LAUNCHER: str(os.getpid())}
        try:
            elastic_launch(config, sys.executable)(*_COMMAND, *arguments)
        except ChildFailedError as error:
            raise _error_of(error, read_failures(Path(directory))) from None
        except SignalException as error:
            interrupt = interruption_by(error.sigval)
            if notes := _notes(read_failures(Path(directory))):
                interrupt.add_note(notes)
            raise interrupt from None
        finally:
            del os.environ[DIRECTORY], os.environ[_LAUNCHER]


def _number(processes: str) -> int:
    import torch

    if processes != "gpu":
        return int(processes)
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{option('nproc_per_node', 'gpu')}: no CUDA device here; a number starts so many "
            "processes on the CPU"
        )
    return torch.cuda.device_count()


def _error_of(error: ChildFailedError, failures: Sequence[Failure]) -> LaunchError:
    """Say in one line why the processes ended."""
    if failures and failures[0].code > 0:
        return LaunchError(failures[0].line, failures[0].code)
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    # The others were told to end when one had.
    rank = min(codes, key=lambda rank: (codes[rank] == TERMINATED, rank))
    code = codes[rank]
    how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return LaunchError("; ".join(filter(None, [f"rank {rank} {how}", _notes(failures)])))


def _notes(failures: Sequence[Failure]) -> str:
    """Return what a user should know beside the reason, as the most of them say."""
    return max((failure.notes for failure in failures), key=len, default="")


def _silence(logger: logging.Logger) -> None:
    """Keep what torch logs from the terminal."""
    logger.propagate = False
    logger.addHandler(logging.NullHandler())

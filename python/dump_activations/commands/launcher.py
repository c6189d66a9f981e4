"""Starts the processes of a run on this machine, as torchrun does, and says how they ended."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dump_activations.commands.failures import DIRECTORY, read_failures
from dump_activations.errors import (
    DeviceError,
    DumpActivationsError,
    InvalidArgumentError,
    Note,
    option,
)
from dump_activations.pipeline.interrupts import Terminated, signal_name
from dump_activations.pipeline.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from dump_activations.commands.failures import Failure

# As a module, but without the working directory among the places that modules come from.
_COMMAND = ("-P", "-m", "dump_activations")


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
    if Place.of_process() is None:
        return False
    if DIRECTORY not in os.environ:
        raise InvalidArgumentError(
            f"{option('nproc_per_node')}: torchrun has started this process already; give it to "
            "torchrun, or leave torchrun out"
        )
    return True


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
        LaunchError: one of them failed.
        KeyboardInterrupt: this process was interrupted; all have ended.
    """
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
        os.environ[DIRECTORY] = directory
        try:
            elastic_launch(config, sys.executable)(*_COMMAND, *arguments)
        except ChildFailedError as error:
            raise _error_of(error, read_failures(Path(directory))) from None
        except SignalException as error:
            interrupt = Terminated() if ... 

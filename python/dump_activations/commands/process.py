"""The process of a command: its exit code, signals, memory and last output, and its siblings."""

from __future__ import annotations

import atexit
import gc
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import click

from dump_activations import interrupts
from dump_activations.commands.console import (
    UnreadError,
    fresh_mode,
    mode,
    print_line,
    written_stdout,
)
from dump_activations.errors import (
    DeviceError,
    DumpActivationsError,
    InvalidArgumentError,
    OutputError,
    option,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

# From glibc's malloc.h. 32 MiB is the highest threshold that it accepts.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1

# As a module, but without the working directory among the places that modules come from.
_COMMAND = (sys.executable, "-P", "-m", "dump_activations")
_LAUNCHER = "DUMP_ACTIVATIONS_LAUNCHER"
_POLL_SECONDS = 0.05


def run_command(command: click.Command, arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code: 0, 2 for a wrong call, 1 for every other error.

    An interrupted command returns the signal's number, negative. So does a command whose reader
    closed stdout, as `head` does. An error is one line on stderr. Without arguments it takes the
    process's own.
    """
    name = command.name or ""
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    if arguments is None and (instruction := os.environ.get(variable)):
        from click.shell_completion import shell_complete

        return shell_complete(command, {}, name, variable, instruction)
    code = 0
    with fresh_mode():
        if arguments is not None:
            mode.started = time.monotonic()
        arguments = sys.argv[1:] if arguments is None else arguments
        try:
            # `click.main` would lose the notes of an interruption.
            with interrupts.terminated_like_interrupted():
                with written_stdout():  # --help and --version print while arguments are parsed.
                    context = command.make_context(name, [*arguments], obj=[*arguments])
                with context:
                    command.invoke(context)
        except click.exceptions.Exit as error:
            code = error.exit_code
        except UnreadError:
            code = interrupts.UNREAD
        except click.ClickException as error:
            mode.as_json |= "--json" in arguments  # Perhaps it was not reached.
            code = _failed(InvalidArgumentError.exit_code, error.format_message())
        except DumpActivationsError as error:
            code = _failed(error.exit_code, error.flags_text, error)
        except KeyboardInterrupt as error:
            code = interrupted(error)
        except Exception as error:
            if sys.flags.dev_mode:  # Developers want the traceback (python -X dev).
                raise
            code = _failed(1, f"{type(error).__name__}: {error}", error)
    return code


def interrupted(interrupt: KeyboardInterrupt) -> int:
    """Print that a command was interrupted, and return the signal's number, negative."""
    return _failed(-interrupts.signal_of(interrupt), "interrupted", interrupt)


def _failed(code: int, text: str, error: BaseException | None = None) -> int:
    """Print why a command failed, with the notes of the error, and return its exit code."""
    notes = getattr(error, "__notes__", [])
    print_line("error", "; ".join([text, *(getattr(note, "flags_text", note) for note in notes)]))
    return code


def leave(code: int) -> NoReturn:
    """End the process with an exit code, or by a signal where it is negative.

    A shell's loop stops only if the signal ended the command, and a scheduler reads it too. The
    functions registered with `atexit` run. Nothing is freed: the system does it at once, and
    freeing torch's objects one by one takes a tenth of a second.
    """
    interrupts.ignore_interrupts()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    try:
        with written_stdout():
            pass
    except UnreadError:
        code = code or interrupts.UNREAD
    except OutputError as error:
        code = code or _failed(error.exit_code, error.flags_text)
    except (ValueError, AttributeError):  # stdout is closed, or cannot be flushed.
        pass
    if code < 0:
        interrupts.die_of(-code)
    os._exit(abs(code))


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Exempt modules imported inside the context from garbage collection, and from interruption.

    torch makes a million objects that live until the end. Visiting them takes a quarter of its
    import. A signal waits until the context ends: modules catch KeyboardInterrupt as they load.
    """
    with interrupts.HeldInterrupts():
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()


def keep_freed_memory() -> None:
    """Let malloc reuse the memory that a forward pass frees, where the C library is glibc.

    By default malloc maps and zeroes the temporaries of each operation again, which takes as long
    as computing them.
    """
    import ctypes  # --help does not need it.

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


class Launched(NamedTuple):
    """The place of this process among those that a launcher started: torchrun, Slurm, `launch`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def join_launcher() -> Launched:
    """Find this process's place in the launcher's variables. It is alone without them.

    A process of `launch` is terminated when its launcher ends, even by SIGKILL.
    """
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, _LAUNCHER: 0}
    found = []
    for name, default in defaults.items():
        text = os.environ.get(name) or str(default)
        if not text.isdecimal():
            raise InvalidArgumentError(f"{name} must be a whole number; got {text!r}")
        found.append(int(text))
    *places, launcher = found
    place = Launched(*places)
    if place.rank >= place.world_size:
        raise InvalidArgumentError(
            f"RANK must be below WORLD_SIZE, {place.world_size}; got {place.rank}"
        )
    if launcher:
        interrupts.terminate_with_parent(launcher)
    return place


def launch(arguments: Sequence[str], processes: str) -> int:
    """Run the command in several processes of this machine, and return the first error's code.

    Each gets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. Signals are passed on. After the
    first error the others are terminated: they keep what is on disk.

    Raises:
        InvalidArgumentError: `processes` is neither a number nor "gpu", one per CUDA device.
        DeviceError: "gpu" finds no CUDA device.
    """
    count = _count(processes)
    started: list[subprocess.Popen[bytes]] = []
    is_interrupted = False

    def send(number: int, _frame: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        for process in started:
            process.send_signal(number)

    with interrupts.handled_by(send):
        try:
            with interrupts.HeldInterrupts():  # Each process gets a signal that comes meanwhile.
                for rank in range(count):
                    place = {"RANK": rank, "LOCAL_RANK": rank, _LAUNCHER: os.getpid()}
                    place |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                    environment = os.environ | {name: str(each) for name, each in place.items()}
                    started.append(subprocess.Popen([*_COMMAND, *arguments], env=environment))
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                time.sleep(_POLL_SECONDS)
            code = next(filter(None, codes), 0)
            # Such a process wrote no line.
            if code < 0 and code != interrupts.UNREAD and not is_interrupted:
                text = f"process {codes.index(code)} was ended by signal {-code}"
                print_line("error", text)
            return code
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


def _count(processes: str) -> int:
    if processes.isdecimal() and int(processes) > 0:
        return int(processes)
    if processes != "gpu":
        raise InvalidArgumentError(
            f"{option('nproc_per_node')}: must be a number of processes, or gpu; got {processes!r}"
        )
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            f"{option('nproc_per_node', 'gpu')}: no CUDA device here; give the number of processes"
        )
    return torch.cuda.device_count()

"""What can go wrong: one base class; each error is also the builtin a caller expects.

A text names options through `option`, so that a caller in Python reads arguments
(`batch_size=512`) and a user of the command flags (`--batch-size 512`) of the same error.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Self

# Of the private use area: no text has them by accident.
_OPEN, _CLOSE = "\ue000", "\ue001"
_OPTION = re.compile(f"{_OPEN}(\\w+)(?:=(.*?))?{_CLOSE}")

_PACKAGE = "dump_activations."


def option(name: str, value: object = None) -> str:
    """Name an option, or a choice of its value, in a text of this package."""
    return f"{_OPEN}{name}{_CLOSE}" if value is None else f"{_OPEN}{name}={value!r}{_CLOSE}"


def switch(name: str) -> str:
    """Name an option that is to be turned on, in a text of this package."""
    return option(name, value=True)


def with_arguments(text: str) -> str:
    """Write the options in a text as arguments of `dump`: `device='cpu'`."""
    return _OPTION.sub(lambda m: m[1] if m[2] is None else f"{m[1]}={m[2]}", text)


def with_flags(text: str) -> str:
    """Write the options in a text as flags of the command: `--device cpu`."""

    def flag(match: re.Match[str]) -> str:
        name, value = match[1].replace("_", "-"), match[2]
        if value is None or value == "True":
            return f"--{name}"
        if value == "False":
            return f"--no-{name}"
        return f"--{name} {value if ' ' in value else value.strip(chr(39))}"

    return _OPTION.sub(flag, text)


class Note(str):
    """A note on an error, for `add_note`: one line, as Python shows it.

    Attributes:
        flags_text: the line as the command shows it.
    """

    flags_text: str

    def __new__(cls, text: str) -> Self:
        """Render a text of this package."""
        note = super().__new__(cls, with_arguments(text))
        note.flags_text = with_flags(text)
        return note


class DumpActivationsError(Exception):
    """Base of every error this package raises on purpose. Its text is one line for the user."""

    exit_code = 1

    def __str__(self) -> str:
        return with_arguments(super().__str__())

    @property
    def flags_text(self) -> str:
        """The text as the command shows it."""
        return with_flags(super().__str__())


class InvalidArgumentError(DumpActivationsError, ValueError):
    """A call that no file or machine could make right: a bad option or combination."""

    exit_code = 2


class ActivationNotImplementedError(DumpActivationsError, NotImplementedError):
    """An activation key that is reserved but has no implementation."""

    exit_code = 2


class DatasetNotFoundError(DumpActivationsError, FileNotFoundError):
    """No such dataset, or no shards in it."""


class DatasetError(DumpActivationsError, ValueError):
    """A shard that cannot be read: its header, its fields, its size or its rows."""


class StepIndexError(DumpActivationsError, IndexError):
    """A step index outside the dataset."""


class IndicesError(DumpActivationsError, ValueError):
    """A list of step indices that cannot be used: its dtype, or no entries."""


class IndicesNotFoundError(DumpActivationsError, FileNotFoundError):
    """No such file of step indices."""


class CheckpointNotFoundError(DumpActivationsError, FileNotFoundError):
    """No such checkpoint, or no weights in it."""


class CheckpointError(DumpActivationsError, ValueError):
    """A checkpoint whose config or weights are missing, damaged or contradictory."""


class ActivationUnavailableError(DumpActivationsError, ValueError):
    """An activation key that this model does not have."""

    exit_code = 2


class VocabularyError(DumpActivationsError, ValueError):
    """A board with an exponent that the model has no embedding for."""


class DeviceError(DumpActivationsError, RuntimeError):
    """What the machine lacks: a compute device, memory, threads, or what compiling needs."""


class OutputError(DumpActivationsError, OSError):
    """An output file that cannot be written, resumed or read back."""

    @classmethod
    def of_system(cls, what: str, cause: OSError) -> Self:
        """Make an error with the system's reason, as text and as `errno`."""
        error = cls(f"{what}: {cause.strerror or cause}")
        # `errno` alone: with `strerror` too, OSError would make up its own text.
        error.errno = cause.errno
        return error

    @classmethod
    @contextmanager
    def when(cls, what: str) -> Iterator[None]:
        """Turn what the system refuses inside the context into an error that says what failed."""
        try:
            yield
        except DumpActivationsError:
            raise
        except OSError as error:
            raise cls.of_system(what, error) from error


class RowIndexError(DumpActivationsError, IndexError):
    """A row that a file does not have."""


class DumpActivationsWarning(UserWarning):
    """Something a user should know that does not stop the run."""

    def __str__(self) -> str:
        return with_arguments(super().__str__())

    @property
    def flags_text(self) -> str:
        """The text as the command shows it."""
        return with_flags(super().__str__())


class DumpActivationsNote(DumpActivationsWarning):
    """Something worth knowing where all is as it should be. A caller from Python has to ask."""


warnings.simplefilter("ignore", DumpActivationsNote, append=True)


_is_muted = ContextVar("_is_muted", default=False)


@contextmanager
def muted_notes() -> Iterator[None]:
    """Drop notes inside the context: another process writes the same."""
    token = _is_muted.set(True)
    try:
        yield
    finally:
        _is_muted.reset(token)


def warn(warning: str | DumpActivationsWarning) -> None:
    """Warn whoever called this package, at the line of the call."""
    if isinstance(warning, str):
        warning = DumpActivationsWarning(warning)
    if _is_muted.get() and isinstance(warning, DumpActivationsNote):
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(warning, stacklevel=level)


def note(text: str) -> None:
    """Say something worth knowing; it never ends a run, also where warnings are errors."""
    with suppress(DumpActivationsNote):
        warn(DumpActivationsNote(text))

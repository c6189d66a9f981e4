"""Errors and warnings: one base class each. Every error is also the builtin that a caller expects.

A message names options through `option`. A caller in Python reads arguments (`batch_size=512`), and
a user of the command reads flags (`--batch-size 512`), in the same message.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

# Characters for private use, which no message contains by accident.
_OPEN, _CLOSE = "\ue000", "\ue001"
_OPTION = re.compile(f"{_OPEN}(\\w+)(?:=(.*?))?{_CLOSE}")

_PACKAGE = "dump_activations."


def option(name: str, value: object = None) -> str:
    """Name an option, or an option with its value, in a message of this package."""
    return f"{_OPEN}{name}{_CLOSE}" if value is None else f"{_OPEN}{name}={value!r}{_CLOSE}"


def switch(name: str) -> str:
    """Name an option that is turned on, in a message of this package."""
    return option(name, value=True)


def with_arguments(text: str) -> str:
    """Write the options in a message as arguments of `dump`: `device='cpu'`."""
    return _OPTION.sub(lambda m: m[1] if m[2] is None else f"{m[1]}={m[2]}", text)


def with_flags(text: str) -> str:
    """Write the options in a message as flags of the command: `--device cpu`."""

    def flag(match: re.Match[str]) -> str:
        name, value = match[1].replace("_", "-"), match[2]
        if value is None or value == "True":
            return f"--{name}"
        return f"--{name} {value if ' ' in value else value.strip(chr(39))}"

    return _OPTION.sub(flag, text)


class Note(str):
    """A note on an error, for `add_note`: one line, as Python shows it.

    Attributes:
        flags_text: the line as the command shows it.
    """

    flags_text: str

    def __new__(cls, text: str) -> Self:
        """Render a message of this package."""
        note = super().__new__(cls, with_arguments(text))
        note.flags_text = with_flags(text)
        return note


class _Message(Exception):  # noqa: N818 -- the base of warnings too
    """A message of this package, rendered when it is made, so that `args` and pickles show it.

    Attributes:
        flags_text: the message as the command shows it.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(with_arguments(text))
        self.flags_text = with_flags(text)


class DumpActivationsError(_Message):
    """Base of every error that this package raises on purpose. Its text is one line."""

    exit_code = 1

    @classmethod
    def of_system(cls, what: str, cause: OSError) -> Self:
        """Make an error with the reason of the system, as text and as `errno`."""
        error = cls(f"{what}: {cause.strerror or cause}")
        if isinstance(error, OSError):
            # Set `errno` alone: with `strerror` too, OSError would write its own text.
            error.errno = cause.errno
        return error

    @classmethod
    @contextmanager
    def when(cls, what: str) -> Iterator[None]:
        """Turn an error of the system inside the context into one that says what failed."""
        try:
            yield
        except DumpActivationsError:
            raise
        except OSError as error:
            raise cls.of_system(what, error) from error


class InvalidArgumentError(DumpActivationsError, ValueError):
    """An option, or a combination of options, that is wrong with any file on any machine."""

    exit_code = 2


class MissingKeyError(InvalidArgumentError, KeyError):
    """A key or label that a file does not have."""

    __str__ = Exception.__str__  # which, unlike KeyError's, has no quotes


class ActivationNotImplementedError(DumpActivationsError, NotImplementedError):
    """An activation key that is reserved and has no implementation."""

    exit_code = 2


class DatasetNotFoundError(DumpActivationsError, FileNotFoundError):
    """A dataset that does not exist or has no shards."""


class DatasetError(DumpActivationsError, ValueError):
    """A shard that cannot be read: its header, its fields, its size or its rows."""


class StepIndexError(DumpActivationsError, IndexError):
    """A step index outside the dataset."""


class IndicesError(DumpActivationsError, ValueError):
    """Step indices of a wrong dtype, or none."""


class IndicesNotFoundError(DumpActivationsError, FileNotFoundError):
    """A file of step indices that does not exist."""


class CheckpointNotFoundError(DumpActivationsError, FileNotFoundError):
    """A checkpoint that does not exist or has no weights."""


class CheckpointError(DumpActivationsError, ValueError):
    """A checkpoint whose config or weights are missing, damaged or contradictory."""


class ActivationUnavailableError(DumpActivationsError, ValueError):
    """An activation key that this model does not have."""

    exit_code = 2


class VocabularyError(DumpActivationsError, ValueError):
    """A board with an exponent that the model has no embedding for."""


class DeviceError(DumpActivationsError, RuntimeError):
    """A compute device, memory, threads or a compiler that this machine lacks."""


class OutputError(DumpActivationsError, OSError):
    """An output file that cannot be written, resumed or read back."""


class RemoteError(DumpActivationsError, RuntimeError):
    """A file behind a URL that cannot be read, or its local copy."""


class RowIndexError(DumpActivationsError, IndexError):
    """A row that a file does not have."""


class DumpActivationsWarning(_Message, UserWarning):
    """A warning to the user. The run continues."""


class DumpActivationsNote(DumpActivationsWarning):
    """Information about a run. Python ignores it unless a caller turns it on."""


warnings.simplefilter("ignore", DumpActivationsNote, append=True)


def warn(warning: str | DumpActivationsWarning) -> None:
    """Warn the caller of this package, at the line of the call."""
    if isinstance(warning, str):
        warning = DumpActivationsWarning(warning)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(warning, stacklevel=level)


def note(text: str) -> None:
    """Issue a note. It never ends a run, even where warnings are errors."""
    with suppress(DumpActivationsNote):
        warn(DumpActivationsNote(text))

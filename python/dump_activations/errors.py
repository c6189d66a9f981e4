"""Messages to people: errors and warnings, the quantities in them, and checks of arguments.

Every error has one base class and is also the builtin that a caller expects. A message names
options through `option`. A caller in Python reads arguments (`batch_size=512`), and a user of the
command reads flags (`--batch-size 512`), in the same message.
"""

from __future__ import annotations

import operator
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

# Characters for private use, which no message contains by accident.
_OPEN, _CLOSE = "\ue000", "\ue001"
_OPTION = re.compile(f"{_OPEN}(\\w+)(?:=(.*?))?{_CLOSE}")

_PACKAGE = "dump_activations."

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_UNITS = ("B", "kB", "MB", "GB", "TB")
_SPANS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


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


def size_text(nbytes: int) -> str:
    """Write a number of bytes: `1.61 GB`, `256 B`."""
    if nbytes < 1000:
        return f"{nbytes} B"
    scaled, unit = float(nbytes), 0
    # A value that rounds to 1000 belongs to the next unit.
    while scaled >= 999.5 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{digits}f} {_UNITS[unit]}"


def duration_text(seconds: float) -> str:
    """Write a duration in its two largest units: `42 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller in _SPANS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


def shape_text(shape: Sequence[int | str]) -> str:
    """Write a shape as Python does, without the comma of a single axis."""
    return f"({', '.join(map(str, shape))})"


def ranges_text(numbers: Iterable[int]) -> str:
    """Write a set of numbers as ranges: `0-3, 7`."""
    known = set(numbers)
    starts = sorted(n for n in known if n - 1 not in known)
    ends = sorted(n for n in known if n + 1 not in known)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def slice_text(value: slice) -> str:
    """Write a slice as it is typed: `20000:30000`, `::2`."""
    parts = [value.start, value.stop, *([] if value.step is None else [value.step])]
    return ":".join("" if part is None else str(part) for part in parts)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint at the known name that is nearest to a wrong one; empty where none is near."""
    near = get_close_matches(name.lower(), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def printable(text: str, stream: object = None) -> str:
    """Escape control characters, which a terminal would obey, and what a stream cannot encode."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_url(path: object) -> bool:
    """Return True for text of the form `scheme://...`."""
    return isinstance(path, str) and _URL.match(path) is not None


def locate(path: str | os.PathLike[str], name: str = "") -> Path:
    """Turn a path argument into an absolute path, with `~` expanded and links kept.

    A program may change its directory later, so a relative path is resolved when it is given.
    `name` is the option it was given for.

    Raises:
        InvalidArgumentError: the path is empty, a URL, or names a home that does not exist.
    """
    text = os.fsdecode(path)
    if not text:
        raise InvalidArgumentError(f"{option(name) if name else 'a path'}: must not be empty")
    if _URL.match(text):
        raise InvalidArgumentError(
            f"{text}: must be a path, got a URL; copy it to a disk, or mount it, and give its path"
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise InvalidArgumentError(
            f"{text}: this user has no home directory; write the path without ~"
        ) from None


def check_ordinary(path: Path, error: type[DumpActivationsError]) -> None:
    """Raise `error` where the path leads to a directory, a named pipe or a device.

    Reading a pipe or a device could block or never end.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError) as refusal:  # The path is too long, or locked up.
        reason = getattr(refusal, "strerror", None) or refusal
        raise error(f"{path}: {reason}; choose another path") from refusal
    if path.exists() and not path.is_file():
        raise error(f"{path}: not an ordinary file")


def whole_number(index: Any) -> int | None:
    """Return an index as a number; None for any other. An array of one element is not a number."""
    if getattr(index, "ndim", 0):
        return None
    try:
        return operator.index(index)
    except TypeError:
        return None

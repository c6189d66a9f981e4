"""The journal that a process writes beside an unfinished file."""

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dump_activations.errors import OutputError
from dump_activations.storage.writing.private_files import create, is_at
from dump_activations.storage.writing.records import (
    BatchDigests,
    BatchRecord,
    Header,
    batch_line,
    header_line,
    token_line,
)
from dump_activations.storage.writing.targets import replacement_path


class Journal:
    """Records batches; each call returns once the records are on disk.

    Attributes:
        path: where it is.
        token: of the processes that share the file; None for a process alone.
        batches: numbers of those that are recorded.
    """

    def __init__(self, path: Path, header: Header, token: int | None) -> None:
        self.token = token
        self.batches: set[int] = set()
        self.path = path
        self._new_path = replacement_path(path)
        self._header = header
        self._fd: int | None = None

    def start(self, batches: Mapping[int, BatchDigests]) -> None:
        """Put a journal of these batches alone in the place of what is there, in one step.

        Raises:
            OutputError: the system refused; it names the file.
        """
        with OutputError.when(f"cannot write {self._new_path}"):
            self._new_path.unlink(missing_ok=True)
            self._create(self._new_path, batches)
        with OutputError.when(f"cannot write {self.path}"):
            self._new_path.replace(self.path)
            sync_directory(self.path.parent)

    def join(self) -> None:
        """Begin a journal of no batches, where there is none.

        Raises:
            OutputError: there is one, or the system refused; it names the file.
        """
        with OutputError.when(f"cannot write {self.path}"):
            self._create(self.path, {})
            sync_directory(self.path.parent)

    def append(self, batches: Mapping[int, BatchRecord]) -> None:
        """Record batches, whose data is on disk already."""
        self._write(batch_line(self._header, *item) for item in batches.items())
        self.batches |= batches.keys()

    def close(self) -> None:
        """Leave the journal where it is."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Close the journal, and remove it if its name still leads to it."""
        if self._fd is not None:
            for path in (self._new_path, self.path):
                if is_at(self._fd, path):
                    path.unlink()
        self.close()

    def _create(self, path: Path, batches: Mapping[int, BatchDigests]) -> None:
        self._fd = create(path, os.O_WRONLY | os.O_APPEND)
        lines = [header_line(self._header)]
        lines += [batch_line(self._header, b, BatchRecord(each)) for b, each in batches.items()]
        if self.token is not None:
            lines.append(token_line(self.token))
        self._write(lines)
        self.batches |= batches.keys()

    def _write(self, lines: Iterable[bytes]) -> None:
        assert self._fd is not None
        data = b"".join(lines)
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)


def remove_journals(paths: Iterable[Path]) -> None:
    """Remove journals, whatever they are; those that are not there are no error.

    Raises:
        OutputError: the system refused; it names the file.
    """
    for path in paths:
        with OutputError.when(f"cannot remove {path}"):
            path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Return once the names in a directory are on disk, where the file system can say."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)

"""Statistics that a process hands over to the one that completes the file: CRC-32, token, state."""

import os
import zlib
from contextlib import suppress

from dump_activations.errors import OutputError
from dump_activations.storage.statistics import RunningStatistics
from dump_activations.storage.writing.journal import Journal, sync_directory
from dump_activations.storage.writing.private_files import create, open_ours
from dump_activations.storage.writing.recorded import Recorded
from dump_activations.storage.writing.targets import statistics_path

_CRC_NBYTES = 4
_TOKEN_NBYTES = 8


def hand_over(statistics: RunningStatistics, journal: Journal) -> None:
    """Write what a process has seen to a file beside its journal.

    Raises:
        OutputError: the system refused; it names the file.
    """
    assert journal.token is not None
    path = statistics_path(journal.path)
    data = journal.token.to_bytes(_TOKEN_NBYTES, "little") + statistics.state()
    with OutputError.when(f"cannot write {path}"):
        path.unlink(missing_ok=True)
        with os.fdopen(create(path, os.O_WRONLY), "wb") as file:
            file.write(_crc32(data) + data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)


def take_over(statistics: RunningStatistics, other: Recorded) -> bool:
    """Add what another process has seen; say whether there was a whole file of its token."""
    assert other.token is not None
    token = other.token.to_bytes(_TOKEN_NBYTES, "little")
    path = statistics_path(other.path)
    data = b""
    with suppress(OSError, OutputError):
        longest = _CRC_NBYTES + _TOKEN_NBYTES + len(statistics.state())
        with os.fdopen(open_ours(path, os.O_RDONLY), "rb") as file:
            data = file.read(longest)
    crc32, data = data[:_CRC_NBYTES], data[_CRC_NBYTES:]
    if crc32 != _crc32(data) or data[:_TOKEN_NBYTES] != token:
        return False
    statistics.merge(data[_TOKEN_NBYTES:])
    return True


def _crc32(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC_NBYTES, "little")

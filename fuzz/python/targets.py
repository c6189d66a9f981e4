"""What is fuzzed: each target hands bytes, as a file, to a reader of files that are not trusted.

It raises where the reader raises anything else than the package's own error, takes more than a
second of the processor, or more than 200 MB.
"""

import io
import resource
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dump_activations.errors import CheckpointError, OutputError
from dump_activations.storage.reading.inspection import find_damage, inspect
from dump_activations.storage.writing.journal import read_journal

SECONDS = 1.0
NBYTES = 200 << 20

_DIRECTORY = Path(tempfile.mkdtemp(prefix="fuzz-"))


def _inspected(suffix: str) -> Callable[[bytes], None]:
    path = _DIRECTORY / f"x{suffix}"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(OutputError):
            inspection = inspect(path)
            assert sum(tensor.nbytes for tensor in inspection.contents.tensors) >= 0
            assert inspection.digests is not None
            find_damage(inspection, threads=1)

    return run


def _header(run: Callable[[bytes], None], *, data_nbytes: int) -> Callable[[bytes], None]:
    """Fuzz the header of a .safetensors file, whose length is right."""
    return lambda data: run(len(data).to_bytes(8, "little") + data + bytes(data_nbytes))


def _checkpoint(suffix: str) -> Callable[[bytes], None]:
    path = _DIRECTORY / f"weights{suffix}"

    def run(data: bytes) -> None:
        from dump_activations.model import weight_files

        path.write_bytes(data)
        with suppress(CheckpointError):
            if suffix == ".pt":
                weight_files.read_bundle(path)
            else:
                weight_files.read_safetensors(path)

    return run


def _journal(data: bytes) -> None:
    """Read a journal as it is, and with the right CRC-32 on every line."""
    path = _DIRECTORY / "x.journal"
    lines = b"".join(b"%s %08x\n" % (line, zlib.crc32(line)) for line in data.split(b"\n"))
    for content in (data, lines):
        path.write_bytes(content)
        read_journal(path)


def _in_archive(name: str, run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Fuzz a member of an archive rather than the archive, whose sizes and CRC-32 are right."""

    def run_member(data: bytes) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as members:
            members.writestr(name, data)
            for key in "01":
                members.writestr(f"archive/data/{key}", bytes(32))
            members.writestr("archive/version", b"3\n")
        run(archive.getvalue())

    return run_member


def measured(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Hold a target to its bounds; not for its first call, which imports and allocates."""

    def run_measured(data: bytes) -> None:
        peak, start = _peak_nbytes(), time.process_time()
        run(data)
        assert time.process_time() - start < SECONDS, "slow"
        assert _peak_nbytes() - peak < NBYTES, "large"

    return run_measured


def _peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": _inspected(".safetensors"),
    "safetensors_header": _header(_inspected(".safetensors"), data_nbytes=96),
    "pt": _inspected(".pt"),
    "pt_pickle": _in_archive("archive/data.pkl", _inspected(".pt")),
    "npz": _inspected(".npz"),
    "npz_array": _in_archive("hidden.npy", _inspected(".npz")),
    "npz_metadata": _in_archive("metadata.npy", _inspected(".npz")),
    "journal": _journal,
    "checkpoint_safetensors": _checkpoint(".safetensors"),
    "checkpoint_header": _header(_checkpoint(".safetensors"), data_nbytes=24),
    "checkpoint_bundle": _checkpoint(".pt"),
    "checkpoint_pickle": _in_archive("archive/data.pkl", _checkpoint(".pt")),
}

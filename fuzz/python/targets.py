"""Fuzz targets: each hands bytes, as a file, to a reader of files that are not trusted.

A target fails if the reader raises an error other than the package's own, takes over a second of
processor time, or takes over 200 MB.
"""

import io
import json
import resource
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dataset_targets import (
    make_labels_target,
    make_runs_schema_target,
    make_runs_target,
    make_selection_target,
)

from dump_activations import load_encoder
from dump_activations.errors import DumpActivationsError, OutputError
from dump_activations.storage.reading.damage import find_damage
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.writing.journal import Header, JournalError, read_journal
from dump_activations.storage.writing.paths import journal_path

SECONDS = 1.0
NBYTES = 200 << 20

_CORPUS = Path(__file__).with_name("corpus")
_DIRECTORY = Path(tempfile.mkdtemp(prefix="fuzz-"))

_HEADER = Header(
    fingerprint="f" * 64,
    work={"outputs": "pooled"},
    shard="",
    rows=40,
    batch_rows=8,
    tensors=("pooled", "boards"),
)


def _inspected(suffix: str) -> Callable[[bytes], None]:
    path = _DIRECTORY / f"x{suffix}"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(OutputError):
            dump = inspect_dump(path)
            assert sum(tensor.nbytes for tensor in dump.tensors.values()) >= 0
            assert dump.digests is not None
            find_damage(dump, threads=1)

    return run


def _header(run: Callable[[bytes], None], *, data_nbytes: int) -> Callable[[bytes], None]:
    """Fuzz the header of a .safetensors file, whose length is right."""
    return lambda data: run(len(data).to_bytes(8, "little") + data + bytes(data_nbytes))


def _checkpoint(name: str) -> Callable[[bytes], None]:
    """Load a checkpoint with one file fuzzed: `name` in a directory that is right, or a bundle."""
    directory = _DIRECTORY / name.replace(".", "-")
    directory.mkdir(exist_ok=True)
    path = directory / name
    if name != "bundle.pt":
        shutil.copy(_CORPUS / "checkpoint_config" / "base", directory / "config.json")
        shutil.copy(_CORPUS / "checkpoint_safetensors" / "base", directory / "model.safetensors")

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(DumpActivationsError):
            load_encoder(path if name == "bundle.pt" else directory)

    return run


def _journal(data: bytes) -> None:
    """Read a journal as it is, with the right CRC-32 on every line, and after a right header."""
    target = _DIRECTORY / "x.npz"
    header = json.dumps(asdict(_HEADER)).encode()
    records = _with_crc32s(data.split(b"\n"))
    for content in (data, records, _with_crc32s([header]) + records):
        journal_path(target).write_bytes(content)
        with suppress(JournalError):
            found = read_journal(target)
            assert found.header.count_rows(found.batches) >= 0
            for digests in found.batches.values():
                assert digests.keys() == {*found.header.tensors}


def _with_crc32s(lines: Iterable[bytes]) -> bytes:
    return b"".join(b"%s %08x\n" % (line, zlib.crc32(line)) for line in lines)


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
    """Hold a target to its bounds, except in its first call, which imports and allocates."""

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
    "checkpoint_config": _checkpoint("config.json"),
    "checkpoint_safetensors": _checkpoint("model.safetensors"),
    "checkpoint_bundle": _checkpoint("bundle.pt"),
    "labels": make_labels_target(_DIRECTORY / "labels"),
    "selection": make_selection_target(_DIRECTORY / "selection"),
    "runs": make_runs_target(_DIRECTORY / "runs"),
    "runs_schema": make_runs_schema_target(_DIRECTORY / "runs_schema"),
}

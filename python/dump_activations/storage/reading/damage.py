"""Damage: every byte of a finished dump against what its digests and its layout say."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dump_activations import _rust
from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.errors import OutputError
from dump_activations.interrupts import sum_in_parallel
from dump_activations.remote.mirror import fetch_span
from dump_activations.storage.digests import INTEGRITY_KEY, METADATA_NAME, Digest, integrity_text
from dump_activations.storage.formats.layout import are_disjoint, data_ranges, read_exactly
from dump_activations.storage.reading.dump_files import DumpFiles
from dump_activations.storage.reading.inspection import READ_NBYTES, Inspection, open_again

STRUCTURE = "structure"
"""Name, among damaged tensors, of all bytes that are neither tensor nor metadata."""


def find_damage(
    dump: DumpFiles,
    *,
    threads: int,
    progress: Callable[[int, int], object] | None = None,
) -> dict[Path, list[str]]:
    """Read a dump and return, for each file, the names of tensors that differ from those written.

    `METADATA_NAME` and `STRUCTURE` are among them if other bytes are damaged. `INTEGRITY_KEY` alone
    is returned if the digests are damaged, or of other tensors: nothing can be compared then.
    `progress` is called in this thread with the bytes read and the bytes in all.
    """
    files = {file.path: (file, _written_specs(file)) for file in dump.files}
    lengths = {
        (path, spec.name): (spec.nbytes, READ_NBYTES)
        for path, (_, specs) in files.items()
        for spec in specs or ()
    }

    def digest(tensor: tuple[Path, str], start: int, stop: int) -> Digest:
        path, name = tensor
        stored, nbytes = files[path][0].tensors[name], stop - start
        assert stored.offset is not None
        with open_again(files[path][0]) as file:
            offset = stored.offset + start
            fetch_span(path, offset, nbytes)
            return Digest(nbytes, *_rust.digest_span(file.fileno(), offset, nbytes, stored.dtype))

    found = sum_in_parallel(digest, lengths, threads, progress)
    damage = {}
    for path, (file, specs) in files.items():
        if specs is None:
            damage[path] = [INTEGRITY_KEY]
            continue
        of_file = {spec.name: replace(found[path, spec.name], nbytes=0) for spec in specs}
        damage[path] = [name for name, each in of_file.items() if each != file.digests[name]]
        damage[path] += _other_damage(file, specs)
    return damage


def _written_specs(file: Inspection) -> list[TensorSpec] | None:
    """Return the specs of digested tensors; None if the tensors or the digests are others."""
    if INTEGRITY_KEY not in file.metadata:
        raise OutputError(f"{file.path} carries no digests to verify it by")
    tensors = file.tensors.values()
    ranges = data_ranges(tensors)
    if (
        file.tensors.keys() != file.digests.keys()
        or not all(each.dtype in DTYPES and each.shape and each.nbytes for each in tensors)
        or len(ranges) < len(tensors)  # one is compressed
        or not are_disjoint(ranges)
    ):
        return None
    return [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


def _other_damage(file: Inspection, specs: list[TensorSpec]) -> list[str]:
    """Name damage in metadata, and in bytes around the tensors: all must be as laid out."""
    metadata = file.metadata
    others = {key: text for key, text in metadata.items() if key != INTEGRITY_KEY}
    text = integrity_text(specs, others, file.digests)
    damage = [] if text == metadata[INTEGRITY_KEY] else [METADATA_NAME]
    try:
        crc32s = {name: digest.crc32 for name, digest in file.digests.items()}
        layout = file.format.layout(specs, metadata, crc32s)
        with open_again(file) as opened:
            is_whole = (layout.size, layout.offsets) == (
                file.size,
                {tensor.name: tensor.offset for tensor in file.tensors.values()},
            ) and all(read_exactly(opened, at, len(data)) == data for at, data in layout.skeleton)
    except (ValueError, struct.error):  # names or texts that cannot be laid out, or it was cut
        is_whole = False
    return damage if is_whole else [*damage, STRUCTURE]

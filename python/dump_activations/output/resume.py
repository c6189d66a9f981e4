"""What of an unfinished file can be trusted: batches that the journal has and the disk confirms."""

import os
from collections.abc import Mapping
from itertools import takewhile

from dump_activations import _rust
from dump_activations.output.digest import Digest
from dump_activations.output.journal import BatchDigests, Header
from dump_activations.output.layout import Layout, TensorSpec

CHECKED = 8
"""Batches at the end of the journal that are read back; all of them if one of these is damaged."""


def confirmed_batches(
    fd: int,
    layout: Layout,
    specs: Mapping[str, TensorSpec],
    header: Header,
    batches: Mapping[int, BatchDigests],
) -> dict[int, BatchDigests]:
    """Those of the journal's batches that come before any damaged one.

    Args:
        fd: the partial file.
        layout: that of the finished file.
        specs: the file's tensors by name.
        header: the journal's.
        batches: the journal's, numbered from 0 without a gap.
    """
    if os.fstat(fd).st_size != layout.size:
        return {}
    # Pages that could not be written back may still be in the cache, and look right there.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def is_on_disk(batch: int) -> bool:
        first_row = batch * header.batch_rows
        for name, digest in batches[batch].items():
            spec = specs[name]
            offset = layout.offsets[name] + first_row * spec.row_nbytes
            found = _rust.digest_span(fd, offset, digest.nbytes, spec.dtype)
            if Digest(digest.nbytes, *found) != digest:
                return False
        return True

    numbers = list(batches)
    if not all(map(is_on_disk, numbers[-CHECKED:])):
        numbers = list(takewhile(is_on_disk, numbers))
    return {batch: batches[batch] for batch in numbers}

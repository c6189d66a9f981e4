"""The .safetensors format: an 8-byte header length, a JSON header, then all tensors.

Format: https://github.com/huggingface/safetensors#format. Offsets in the header count from its end;
the data has no holes; spaces may follow the JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from dump_activations.dtypes import DTYPES, READABLE_DTYPES, TensorSpec
from dump_activations.storage.formats.layout import (
    ALIGNMENT,
    MAX_JSON_CHARACTERS,
    Contents,
    Format,
    Layout,
    StoredTensor,
    are_disjoint,
    data_ranges,
    fits,
    is_shape,
    parse_json,
    read_exactly,
    storage_order,
    text_metadata,
)

LENGTH_NBYTES = 8
_NAMES = {dtype.safetensors: name for name, dtype in READABLE_DTYPES.items()}


def layout(
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str],
    crc32s: Mapping[str, int] | None,  # noqa: ARG001 - the format itself has no checksums
) -> Layout:
    """Lay out a .safetensors file; the length word comes last, which makes the file readable."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    starts: dict[str, int] = {}
    for spec in storage_order(specs):
        starts[spec.name] = position
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype].safetensors,
            "shape": spec.shape,
            "data_offsets": (position, position + spec.nbytes),
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    data_start = -(-(LENGTH_NBYTES + len(text)) // ALIGNMENT) * ALIGNMENT
    text = text.ljust(data_start - LENGTH_NBYTES)
    return Layout(
        size=data_start + position,
        offsets={name: data_start + start for name, start in starts.items()},
        skeleton=((LENGTH_NBYTES, text), (0, len(text).to_bytes(LENGTH_NBYTES, "little"))),
    )


def read(file: BinaryIO, size: int) -> Contents:
    """Read the header of a .safetensors file."""
    length = int.from_bytes(read_exactly(file, 0, LENGTH_NBYTES), "little")
    data_start = LENGTH_NBYTES + length
    if length == 0 or data_start > size:
        raise ValueError("its header is missing, or cut short")
    # One character past the limit is enough to see that there are too many.
    header = parse_json(read_exactly(file, LENGTH_NBYTES, min(length, MAX_JSON_CHARACTERS + 1)))
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    metadata = text_metadata(header.pop("__metadata__", {}))
    tensors = {n: _stored_tensor(n, entry, data_start, size) for n, entry in header.items()}
    if not are_disjoint(data_ranges(tensors.values())):
        raise ValueError("its tensors overlap")
    return Contents(tensors, metadata)


def _stored_tensor(name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            dtype = _NAMES.get(code, code)
            nbytes = end - begin
            is_inside = 0 <= begin <= end <= size - data_start
            if is_inside and is_shape(shape) and fits(dtype, shape, nbytes):
                return StoredTensor(name, dtype, tuple(shape), nbytes, data_start + begin)
    raise ValueError(f"its entry for tensor {name!r} is damaged, or its data is cut short")


FORMAT = Format("safetensors", ".safetensors", frozenset(DTYPES), layout, read)

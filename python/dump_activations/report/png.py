"""Small images of numbers between 0 and 1: one colour, as deep as the number is large."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_LEVELS = 16

# It stands out from a light page and from a dark one.
_COLOUR = (0, 114, 178)


def data_url(values: NDArray[np.floating]) -> str:
    """Return an image, (height, width), as the address of a PNG; what is 0 or NaN is clear."""
    levels = np.nan_to_num(values * (_LEVELS - 1)).round().clip(0, _LEVELS - 1).astype(np.uint8)
    height, width = levels.shape
    padded = np.zeros((height, width + width % 2), np.uint8)
    padded[:, :width] = levels
    packed = (padded[:, ::2] << 4) | padded[:, 1::2]
    lines = b"".join(b"\0" + line.tobytes() for line in packed)
    alphas = bytes(255 * level // (_LEVELS - 1) for level in range(_LEVELS))
    image = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            # 4 bits a pixel, with a palette.
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),
            (b"PLTE", bytes(_COLOUR) * _LEVELS),
            (b"tRNS", alphas),
            (b"IDAT", zlib.compress(lines, 9)),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

"""Small images of numbers between 0 and 1, in sixteen shades from white to black."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from dump_activations.report.markup import Markup, tag

_DEPTH = 4
_DARKEST = (1 << _DEPTH) - 1


def data_url(values: NDArray[np.floating]) -> str:
    """Return an image, (height, width), as the address of a PNG; 0 and NaN are white."""
    shades = _DARKEST - np.nan_to_num(_DARKEST * values).round().clip(0, _DARKEST)
    height, width = shades.shape
    even = np.zeros((height, width + width % 2), np.uint8)
    even[:, :width] = shades
    pixels = (even[:, ::2] << _DEPTH) | even[:, 1::2]
    image = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            # The zeros: shades of grey, and the only ways to compress, filter and order there are.
            (b"IHDR", struct.pack(">IIBBBBB", width, height, _DEPTH, 0, 0, 0, 0)),
            # Each line begins with its filter, none.
            (b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels), 9)),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(image).decode()


def heat_filter() -> Markup:
    """Return the filter that makes shades from white to black those from clear to one colour."""
    darkness = tag("feColorMatrix", values="0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 -1 0 0 1 0", result="it")
    colour = tag("feFlood", class_="heat")
    inside = tag("feComposite", in2="it", operator="in")
    filters = (darkness, colour, inside)
    return tag("filter", *filters, id="heat", color_interpolation_filters="sRGB")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

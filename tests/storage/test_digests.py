"""Digests of runs that were digested one by one."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from dump_activations.dtypes import TensorSpec
from dump_activations.storage.digests import Digest, RunningDigest, integrity_text, parse_integrity

POLYNOMIAL = 0xEDB88320


def product(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2) modulo the CRC's, bit 31 of each being x**0."""
    total = 0
    for i in range(32):
        if a >> (31 - i) & 1:
            total ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return total


def combined(first: int, second: int, second_nbytes: int) -> int:
    """Shift the first CRC past the second's bytes, by squaring x**8."""
    power, factor, nbytes = 1 << 31, 1 << 23, second_nbytes
    while nbytes:
        power = product(power, factor) if nbytes & 1 else power
        factor, nbytes = product(factor, factor), nbytes >> 1
    return product(first, power) ^ second


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(2**32 - 9, 2**42))
def test_runs_longer_than_32_bits_can_count(first, second, nbytes):
    assert combined(zlib.crc32(b"a"), zlib.crc32(b"bc"), 2) == zlib.crc32(b"abc")
    whole = RunningDigest()
    whole.add(7, Digest(nbytes, second, nan=2, inf=1))
    whole.add(0, Digest(7, first, nan=1, inf=0))
    assert whole.whole == Digest(7 + nbytes, combined(first, second, nbytes), nan=3, inf=1)


def test_the_text_is_as_long_whatever_is_counted():
    specs = [TensorSpec("a", "float16", (123_456_789,)), TensorSpec("b", "float32", (10**12, 3))]
    counts = [Digest(), *(Digest(0, 2**32 - 1, n, n) for n in (9, 10, specs[0].numel))]
    known = [None, *(dict.fromkeys("ab", count) for count in counts)]
    texts = [integrity_text(specs, {"x": "y"}, digests) for digests in known]
    assert len({len(text) for text in texts}) == 1
    assert parse_integrity(texts[-1])["b"].nan == specs[0].numel

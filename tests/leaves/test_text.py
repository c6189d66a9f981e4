"""Text for people: quantities, hints, and characters that a terminal may get."""

import pytest

from dump_activations.text import (
    did_you_mean,
    duration_text,
    printable,
    shape_text,
    size_text,
    slice_text,
)


@pytest.mark.parametrize(
    ("make", "value", "text"),
    [
        *[(size_text, 0, "0 B"), (size_text, 999, "999 B"), (size_text, 1000, "1.00 kB")],
        *[(size_text, 9_995, "10.0 kB"), (size_text, 99_949, "99.9 kB")],
        *[(size_text, 999_499, "999 kB"), (size_text, 999_500, "1.00 MB")],
        (size_text, 12_345 * 10**12, "12,345 TB"),
        *[(duration_text, 0.4, "0 s"), (duration_text, 59.5, "1 min 0 s")],
        *[(duration_text, 200, "3 min 20 s"), (duration_text, 3900, "1 h 5 min")],
        (duration_text, 90_000, "1 d 1 h"),
        *[(shape_text, (), "()"), (shape_text, ("N", 16), "(N, 16)")],
        *[(slice_text, slice(20, None), "20:"), (slice_text, slice(None, 3, 2), ":3:2")],
        *[(printable, "a\tb\x1b", r"a\tb\x1b"), (printable, "盤\u202e", r"盤\u202e")],
    ],
)
def test_text(make, value, text):
    assert make(value) == text


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pooledd", " (did you mean 'pooled'?)"), ("POOLED", " (did you mean 'pooled'?)"), ("x", "")],
)
def test_a_hint_at_the_nearest_name(name, hint):
    assert did_you_mean(name, ["head_probs", "pooled"]) == hint

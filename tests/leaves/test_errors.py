"""Messages: with arguments for Python and flags for the command, and the quantities in them."""

import pickle

import pytest

from dump_activations import errors
from dump_activations.errors import (
    DumpActivationsError,
    DumpActivationsWarning,
    InvalidArgumentError,
    Note,
    OutputError,
    did_you_mean,
    duration_text,
    option,
    printable,
    shape_text,
    size_text,
    slice_text,
    switch,
)

TEXT = (
    f"{option('batch_size', 4)}: set {option('device', 'cpu')} and {switch('allow_cpu')}, or "
    f"{option('where', 'max_exponent < 9')}"
)
ARGUMENTS = "batch_size=4: set device='cpu' and allow_cpu=True, or where='max_exponent < 9'"
FLAGS = "--batch-size 4: set --device cpu and --allow-cpu, or --where 'max_exponent < 9'"


@pytest.mark.parametrize("kind", [InvalidArgumentError, OutputError, DumpActivationsWarning])
def test_every_view_of_an_error_reads_as_its_text(kind):
    error = kind(TEXT)
    error.add_note(Note(TEXT))
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert str(each) == ARGUMENTS
        assert each.args == (ARGUMENTS,)
        assert repr(each) == f"{kind.__name__}({ARGUMENTS!r})"
        assert each.flags_text == FLAGS
        assert each.__notes__ == [ARGUMENTS]
        assert each.__notes__[0].flags_text == FLAGS


def test_an_error_of_the_system_keeps_its_reason():
    text = "cannot write x: No such file"
    with pytest.raises(OutputError, match=text) as caught, OutputError.when("cannot write x"):
        raise FileNotFoundError(2, "No such file")
    assert caught.value.errno == 2


def test_an_error_of_this_package_stays_as_it_is():
    with pytest.raises(OutputError, match=r"^x is a link$"), OutputError.when("cannot write x"):
        raise OutputError("x is a link")


def test_every_error_is_a_builtin_and_says_what_it_means():
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, DumpActivationsError):
            assert kind.__doc__
            is_base = kind is DumpActivationsError or name.startswith("_")
            assert is_base or len(kind.__bases__) == 2


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

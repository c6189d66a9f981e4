"""Errors and warnings: one message, with arguments for Python and flags for the command."""

import pickle

import pytest

from dump_activations import errors
from dump_activations.errors import (
    DumpActivationsError,
    DumpActivationsWarning,
    InvalidArgumentError,
    Note,
    OutputError,
    option,
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

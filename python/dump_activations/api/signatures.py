"""Shows the options of a run where people look for them: in signatures and docstrings."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from dump_activations.errors import with_arguments
from dump_activations.options import Described, Options, describe

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., object])

# What stands in a docstring where the options of a call are described.
_PLACE = """            *args: none.
            **options: as below."""
_WIDTH = 100


class _Shown(str):
    """An annotation that is shown as it is, without quotes."""

    __repr__ = str.__str__


def documented(options: type[Options]) -> Callable[[_FunctionT], _FunctionT]:
    """Give a function that takes an options class's fields their signature and descriptions."""

    def document(function: _FunctionT) -> _FunctionT:
        function.__qualname__ = function.__name__  # Errors of Python's own show it.
        own = inspect.signature(function)
        keywords = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = [each for each in own.parameters.values() if each.kind not in keywords]
        parameters += inspect.signature(options).parameters.values()
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [each.replace(annotation=_shown(each.annotation)) for each in parameters],
            return_annotation=_shown(own.return_annotation),
        )
        text = "\n".join(map(_line, describe(options)))
        function.__doc__ = (function.__doc__ or "").replace(_PLACE, text)
        return function

    return document


def check_names(function: str, options: type[Options], given: Iterable[str]) -> None:
    """Refuse keyword arguments that a function does not have, in its own name.

    Raises:
        TypeError: names the first, and the nearest that there is.
    """
    names = [each.name for each in describe(options)]
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def _shown(annotation: Any) -> _Shown:
    """Write an annotation without the modules of its names."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return _Shown(re.sub(r"(\w+\.)+", "", text))


def _line(described: Described) -> str:
    choices = f": {', '.join(described.choices)}" if described.choices else ""
    return textwrap.fill(
        f"{described.name}: {with_arguments(described.text)}{choices}.",
        _WIDTH,
        initial_indent=" " * 12,
        subsequent_indent=" " * 16,
    )

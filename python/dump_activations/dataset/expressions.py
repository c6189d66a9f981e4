"""Filters and lists of names as text.

A filter is a subset of Python's expressions. It is parsed, and never run as code. This module
imports no NumPy, so that `--help` and usage errors answer quickly.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from dump_activations.errors import InvalidArgumentError, option

_EXAMPLE = "max_exponent >= 11 and run_id % 10 != 0"
OPERATIONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
"""Operators that compute with two values; on columns, NumPy's."""

_OTHERS = (ast.And, ast.Or, ast.Not, ast.Invert, ast.USub, ast.UAdd, ast.In, ast.NotIn)
_NODES = (ast.Name, ast.Constant, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare)
# Operators of other languages, and Python's.
_FOREIGN = {
    r"&&": "and",
    r"\|\|": "or",
    r"<>": "!=",
    r"(?<![=!<>])=(?!=)": "==",
    r"!(?!=)": "not",
    r"\bAND\b": "and",
    r"\bOR\b": "or",
    r"\bNOT\b": "not",
}


def split_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Split comma-separated names, or a list of such, and drop repeats."""
    texts = [names] if isinstance(names, str) else names
    split = (name.strip() for text in texts for name in text.split(","))
    return tuple(dict.fromkeys(name for name in split if name))


@dataclass(frozen=True)
class Expression:
    """A parsed filter."""

    text: str  # the filter on one line
    tree: ast.expr  # only nodes that the grammar allows

    @cached_property
    def names(self) -> list[str]:
        """The fields and labels that it names, each once."""
        nodes = ast.walk(self.tree)
        return list(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name)))

    def source(self, node: ast.expr) -> str:
        """Return the text of one of its nodes."""
        return ast.get_source_segment(self.text, node) or self.text

    def refuse(self, node: ast.expr, reason: str) -> NoReturn:
        """Raise InvalidArgumentError for one of its nodes."""
        raise InvalidArgumentError(f"{option('where')}: {self.source(node)!r}: {reason}")


def parse(text: str) -> Expression:
    """Parse a filter: comparisons, `in (1, 2)`, arithmetic, `and`, `or`, `not`, `&`, `|`, `~`.

    Line breaks count as spaces, and comments are dropped.
    """
    text = " ".join(re.sub("#.*", "", text).split())
    try:
        expression = Expression(text, ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "too long or not text"
        for foreign, right in _FOREIGN.items():
            if wrong := re.search(foreign, text):
                reason = f"write {right!r} for {wrong[0]!r}"
                break
        raise InvalidArgumentError(
            f"{option('where')} must be an expression such as {_EXAMPLE!r}; got {text!r} ({reason})"
        ) from None
    _check(expression)
    return expression


def _check(expression: Expression) -> None:
    """Refuse what the grammar does not have."""
    lists: list[ast.expr] = []
    for node in ast.walk(expression.tree):  # An `in` comes before its list.
        if not isinstance(node, ast.expr) or node in lists:
            continue
        operators = [getattr(node, "op", ast.And()), *getattr(node, "ops", ())]
        if not isinstance(node, _NODES) or not all(
            isinstance(op, (*OPERATIONS, *_OTHERS)) for op in operators
        ):
            reason = f"a filter only compares fields, labels and numbers, e.g. {_EXAMPLE!r}"
            expression.refuse(node, reason)
        if isinstance(node, ast.Compare):
            for op, right in zip(node.ops, node.comparators, strict=True):
                if isinstance(op, ast.In | ast.NotIn):
                    is_list = isinstance(right, ast.Tuple | ast.List | ast.Set)
                    if not is_list or right is not node.comparators[-1]:
                        expression.refuse(node, "'in' must be followed by a list, e.g. in (1, 2)")
                    lists.append(right)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                expression.refuse(node, "compare with 1 or 0, or leave the comparison out")
            if not isinstance(node.value, int | float):
                expression.refuse(node, "values must be integers or floats")
            if isinstance(node.value, int) and node.value >= 2**64:
                expression.refuse(node, "integers must be below 2**64")

"""Filters as they are written: Python's syntax, of which little is allowed, and nothing is run.

Importing this module does not import NumPy, so that a wrong call is found out quickly.
"""

import ast
from dataclasses import dataclass
from functools import cached_property

from dump_activations.errors import InvalidArgumentError, option

_EXAMPLE = "max_rank >= 11 and run_id % 10 != 0"
_PARTS = (ast.Name, ast.Constant, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare)
_OPERATORS = (
    ast.And, ast.Or, ast.Not, ast.Invert, ast.USub, ast.UAdd,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """A filter that can be read.

    Attributes:
        text: as it was written.
        tree: only what the grammar allows.
    """

    text: str
    tree: ast.expr

    @cached_property
    def names(self) -> list[str]:
        """The names in it, each once."""
        nodes = ast.walk(self.tree)
        return list(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name)))

    def part(self, node: ast.expr) -> str:
        """Return a part of it as it was written."""
        return ast.get_source_segment(self.text, node) or self.text


def parse(text: str) -> Expression:
    """Read a filter: comparisons, arithmetic, `and`, `or`, `not`, `&`, `|`, `~` over names.

    Raises:
        InvalidArgumentError: it is no such expression.
    """
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval")
        parts = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "too long or not text"
        raise InvalidArgumentError(
            f"{option('where')}: {text!r} is no expression ({reason}); one is {_EXAMPLE!r}"
        ) from None
    odd = next((part for part in parts if not _is_allowed(part)), None)
    if odd is not None:
        what = "calls nothing" if isinstance(odd, ast.Call) else "takes no"
        raise InvalidArgumentError(
            f"{option('where')}: a filter {what}: {ast.get_source_segment(text, odd)!r}; it "
            f"compares fields and labels, as in {_EXAMPLE!r}"
        )
    return Expression(text, tree.body)


def _is_allowed(part: ast.expr) -> bool:
    if isinstance(part, ast.Constant):
        return type(part.value) in (int, float)
    operators = [getattr(part, "op", None), *getattr(part, "ops", ())]
    known = all(each is None or isinstance(each, _OPERATORS) for each in operators)
    return isinstance(part, _PARTS) and known

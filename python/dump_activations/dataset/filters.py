"""Evaluates a filter on columns of rows, as Python would on the numbers of each row.

Integers are exact, whatever their size, floats are float64, and so are integers beside a float.
A division by zero is an error, where Python would come to it: not behind an `and` that is false
already.

NumPy's own functions on whole columns: they work on a column's own bytes, let other threads go
on, and beat a compiler of expressions that widens its operands first.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.expressions import Expression
from dump_activations.errors import DatasetError, InvalidArgumentError, option

_INT64 = np.iinfo(np.int64)
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_BITWISE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_DIVISIONS = (ast.Div, ast.FloorDiv, ast.Mod)


def evaluate(
    expression: Expression,
    columns: Mapping[str, NDArray[Any]],
    *,
    rows: int,
    first: int = 0,
    wanted: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Say for which of consecutive rows an expression holds, (N,).

    Args:
        expression: the filter.
        columns: name -> values (N,), booleans, integers or floats of any width.
        rows: N.
        first: step index of the first row, for errors.
        wanted: rows that are looked at, (N,); None for all.

    Raises:
        InvalidArgumentError: it mixes numbers and comparisons, or is no comparison.
        DatasetError: it divides by zero.
    """
    try:
        with np.errstate(all="ignore"):
            value = _Evaluation(expression, columns, first, wanted).value(expression.tree)
    except RecursionError:
        raise InvalidArgumentError(f"{option('where')}: the expression is too long") from None
    if not _is_bool(value):
        raise InvalidArgumentError(
            f"{option('where')}: {expression.text!r} is a number, not a comparison"
        )
    holds = np.broadcast_to(np.asarray(value, np.bool_), rows)
    return holds if wanted is None else holds & wanted


class _Evaluation:
    """One evaluation; `reached` are the rows where Python would come to the part at hand."""

    def __init__(
        self,
        expression: Expression,
        columns: Mapping[str, NDArray[Any]],
        first: int,
        wanted: NDArray[np.bool_] | None,
    ) -> None:
        self._expression = expression
        self._columns = columns
        self._first = first
        self._reached: Any = wanted

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name():
                return self._columns[node.id]
            case ast.Constant():
                return node.value
            case ast.BoolOp():
                return self._joined(node)
            case ast.Compare():
                return self._compared(node)
            case ast.UnaryOp():
                return self._signed(node)
            case ast.BinOp():
                return self._combined(node)
        raise AssertionError(node)

    def _joined(self, node: ast.BoolOp) -> Any:
        reached = self._reached
        result = self._truth(node.values[0], node)
        for each in node.values[1:]:
            if isinstance(node.op, ast.And):
                self._reached = _both(reached, result)
                result = result & self._truth(each, node)
            else:
                self._reached = _both(reached, np.logical_not(result))
                result = result | self._truth(each, node)
        self._reached = reached
        return result

    def _truth(self, node: ast.expr, of: ast.expr) -> Any:
        value = self.value(node)
        if not _is_bool(value):
            self._refuse(of, f"{self._expression.part(node)!r} is a number, not a comparison")
        return np.asarray(value)

    def _compared(self, node: ast.Compare) -> Any:
        reached, result = self._reached, None
        left = self.value(node.left)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            self._reached = _both(reached, result)
            right = self.value(right_node)
            if _is_bool(left) != _is_bool(right):
                self._refuse(node, "it compares a comparison with a number; mind the parentheses")
            result = _both(result, _compare(_COMPARISONS[type(op)], left, right))
            left = right
        self._reached = reached
        return result

    def _signed(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return np.logical_not(self._truth(node.operand, node))
        value = self.value(node.operand)
        if isinstance(node.op, ast.Invert):
            if _is_bool(value):
                return np.logical_not(value)
            if _is_float(value):
                self._refuse(node, "~ takes no fraction")
            return _calculate(operator.sub, -1, value)
        if _is_bool(value):
            self._refuse(node, "a comparison has no sign")
        return _calculate(operator.sub, 0, value) if isinstance(node.op, ast.USub) else value

    def _combined(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        kinds = _is_bool(left) + _is_bool(right)
        if (bitwise := _BITWISE.get(type(node.op))) is not None:
            if kinds == 1 or _is_float(left) or _is_float(right):
                self._refuse(node, "& and | bind tighter than comparisons; mind the parentheses")
            return bitwise(left, right) if kinds else _calculate(bitwise, left, right)
        if kinds:
            self._refuse(node, "it calculates with a comparison; mind the parentheses")
        if isinstance(node.op, _DIVISIONS):
            right = self._divisor(node, right)
        return _calculate(_ARITHMETIC[type(node.op)], left, right)

    def _divisor(self, node: ast.BinOp, divisor: Any) -> Any:
        """Return the divisor with 1 for the zeros that Python would not come to."""
        zero = np.equal(divisor, 0)
        if not zero.any():
            return divisor
        bad = _both(zero, self._reached)
        if bad.any():
            at = self._first + int(np.argmax(bad)) if bad.shape else self._first
            raise DatasetError(
                f"{option('where')}: {self._expression.part(node)!r} divides by zero at step {at}; "
                "let a comparison and an 'and' before it leave such rows out"
            )
        return np.where(zero, np.ones((), np.asarray(divisor).dtype), divisor)

    def _refuse(self, node: ast.expr, reason: str) -> None:
        raise InvalidArgumentError(f"{option('where')}: {self._expression.part(node)!r}: {reason}")


def _both(left: Any, right: Any) -> Any:
    """Join two conditions; None holds everywhere."""
    if left is None or right is None:
        return left if right is None else right
    return left & right


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or getattr(value, "dtype", np.dtype(int)).kind == "f"


def _compare(op: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if _is_bool(left):
        return op(left, right)
    if _is_float(left) or _is_float(right):
        return op(_float64(left), _float64(right))
    return op(*_same_integers(left, right))


def _same_integers(left: Any, right: Any) -> tuple[Any, Any]:
    """Return integers that compare as they are, without widening them where their types allow."""
    for array, other in ((left, right), (right, left)):
        if isinstance(other, int) and isinstance(array, np.ndarray) and array.dtype != object:
            limits = np.iinfo(array.dtype)
            # NumPy 1 would compare others as floats.
            if limits.min <= other <= limits.max:
                return left, right
    arrays = isinstance(left, np.ndarray) and isinstance(right, np.ndarray)
    if arrays and np.result_type(left, right).kind in "iu":
        return left, right
    return _int64_or_exact(left, right)


def _calculate(op: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """Calculate with numbers: whole ones in int64 where they fit, or else in Python's own."""
    if op is operator.truediv or _is_float(left) or _is_float(right):
        return op(_float64(left), _float64(right))
    if isinstance(left, int) and isinstance(right, int):
        return op(left, right)
    if _surely_fits(op, _limits(left), _limits(right)) or _surely_fits(
        op, _extremes(left), _extremes(right)
    ):
        return op(_int64(left), _int64(right))
    return op(_exact(left), _exact(right))


def _int64_or_exact(left: Any, right: Any) -> tuple[Any, Any]:
    if all(_surely_fits(operator.and_, _extremes(each), (0, 0)) for each in (left, right)):
        return _int64(left), _int64(right)
    return _exact(left), _exact(right)


def _surely_fits(
    op: Callable[[Any, Any], Any], left: tuple[int, int], right: tuple[int, int]
) -> bool:
    """Say whether no result of operands between these bounds, nor they, can leave int64."""
    bounds = [*left, *right]
    if op in (operator.add, operator.sub, operator.mul):
        bounds += [op(a, b) for a in left for b in right]
    return all(_INT64.min < bound <= _INT64.max for bound in bounds)


def _limits(value: Any) -> tuple[int, int]:
    """Return the bounds of an operand by its type."""
    if isinstance(value, int):
        return value, value
    if value.dtype == object:
        return _extremes(value)
    limits = np.iinfo(value.dtype)
    return int(limits.min), int(limits.max)


def _extremes(value: Any) -> tuple[int, int]:
    """Return the bounds of an operand by its values."""
    if isinstance(value, int):
        return value, value
    return (int(value.min()), int(value.max())) if np.size(value) else (0, 0)


def _int64(value: Any) -> Any:
    return value if isinstance(value, int) else value.astype(np.int64)


def _exact(value: Any) -> Any:
    return value if isinstance(value, int) else value.astype(object)


def _float64(value: Any) -> Any:
    return np.asarray(value).astype(np.float64)

"""Finds rows on all cores, in one pass over the shards: by a filter, or by their run and step.

Integers of a filter are int64, or uint64 where an operand is uint64 and none can be negative. An
operation whose result does not fit is an error. Floats are float64, and an integer next to a float
becomes float64. A division by zero is an error. Neither error is raised for rows that Python would
not evaluate the operation on, such as those that fail a condition before an `and`.

Shape letters: N consecutive rows.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.columns import ColumnReader, Columns, Values
from dump_activations.dataset.expressions import OPERATIONS, Expression
from dump_activations.dataset.runs import find_sorted
from dump_activations.dataset.sampling import Matches, Steps
from dump_activations.errors import DatasetError, IndicesError, InvalidArgumentError, option
from dump_activations.progress import Count

RUN = "run_id"
STEPS = ("step_index", "step_idx")
"""Names that rows may have for the number of their step in its run."""

_BITWISE = (operator.and_, operator.or_)
_DIVISIONS = (operator.truediv, operator.floordiv, operator.mod)


def find_matches(
    columns: Columns, where: Expression, steps: range, progress: Count | None
) -> Matches:
    """Find which of `steps`, ascending, match a filter. Raises as `StepsDataset.find` does."""
    named = {name: columns.find(name, of="where") for name in where.names}
    for name, column in named.items():
        if column.shape:
            elements = ["_".join(map(str, (name, *at))) for at in np.ndindex(column.shape)]
            raise InvalidArgumentError(
                f"{option('where')}: {name!r} is an array; name one of its elements, "
                f"{elements[0]} to {elements[-1]}"
            )
        if column.dtype.kind not in "biuf":
            raise InvalidArgumentError(
                f"{option('where')}: {name!r} must be a number; it is {column.dtype}"
            )
    # Refuse a wrong filter before any row is read.
    none = {name: np.empty(0, column.dtype) for name, column in named.items()}
    _evaluate(where, none, np.empty(0, np.bool_), first=0)

    def look(rows: range, values: Values) -> tuple[int, NDArray[np.uint8], int]:
        selected_N = np.zeros(len(rows), np.bool_)
        selected_N[(steps.start - rows.start) % steps.step :: steps.step] = True
        matches_N = _evaluate(where, values, selected_N, rows.start)
        return rows.start, np.packbits(matches_N), int(np.count_nonzero(matches_N))

    rows = range(steps.start, steps[-1] + 1)
    return Matches(ColumnReader(columns, named).scan(rows, look, progress))


def locate_rows(
    columns: Columns, run_ids: Steps, run_steps: Steps, progress: Count | None
) -> Steps:
    """Find the rows of these runs and steps, int64 (n,), as `StepsDataset.locate` does."""
    if len(run_ids) == 0:
        return np.empty(0, np.int64)
    step = next((name for name in STEPS if name in columns.fields), STEPS[0])
    read = {name: columns.find(name, of="indices") for name in (RUN, step)}
    for name, column in read.items():
        if column.shape or column.dtype.kind not in "iu":
            raise InvalidArgumentError(
                f"{option('indices')}: {name!r} of {columns.dataset.path} must be an integer "
                f"field; it is {column.dtype}"
            )
    runs, run_places = np.unique(run_ids, return_inverse=True)
    steps, step_places = np.unique(run_steps, return_inverse=True)
    # One int64 below n**2 per run and step, so that pairs can be sorted.
    pairs, places = np.unique(run_places * len(steps) + step_places, return_inverse=True)

    def look(rows: range, values: Values) -> tuple[Steps, Steps]:
        run_places, is_found = find_sorted(values[RUN], runs)
        at = np.flatnonzero(is_found)
        step_places, is_found = find_sorted(values[step][at], steps)
        of_pairs = run_places[at] * len(steps) + step_places
        pair_places, is_pair = find_sorted(of_pairs, pairs)
        at, pair_places = at[is_found & is_pair], pair_places[is_found & is_pair]
        return rows.start + at, pair_places

    rows, counts = np.zeros((2, len(pairs)), np.int64)
    reader = ColumnReader(columns, read)
    for found, of_pairs in reader.scan(range(columns.dataset.rows), look, progress):
        rows[of_pairs] = found
        np.add.at(counts, of_pairs, 1)
    wrong = counts[places] != 1
    if wrong.any():
        at = int(np.argmax(wrong))
        raise IndicesError(
            f"{option('indices')}: {counts[places[at]] or 'no'} rows of {columns.dataset.path} are "
            f"step {run_steps[at]} of run {run_ids[at]}"
        )
    return rows[places]


def _evaluate(
    expression: Expression,
    columns: Mapping[str, NDArray[Any]],
    selected_N: NDArray[np.bool_],
    first: int,
) -> NDArray[np.bool_]:
    """Evaluate a filter on the selected ones of rows from step `first` on: bool (N,)."""
    try:
        with np.errstate(all="ignore"):
            value = _Evaluation(expression, columns, first).value(expression.tree, selected_N)
    except RecursionError:
        raise InvalidArgumentError(f"{option('where')}: the expression is too long") from None
    if not _is_condition(value):
        expression.refuse(expression.tree, "a filter must be a condition; this is a number")
    matches_N: NDArray[np.bool_] = value & selected_N
    return matches_N


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation. Each node is given the rows, bool (N,), that Python would evaluate it on.

    A value is a column (N,) or Python's number; conditions are bool.
    """

    expression: Expression
    columns: Mapping[str, NDArray[Any]]
    first: int

    def value(self, node: ast.expr, reached_N: NDArray[np.bool_]) -> Any:
        if isinstance(node, ast.Name):
            return self.columns[node.id]
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BoolOp):
            return self._joined(node, reached_N)
        if isinstance(node, ast.Compare):
            return self._compared(node, reached_N)
        if isinstance(node, ast.UnaryOp):
            return self._signed(node, reached_N)
        assert isinstance(node, ast.BinOp), node
        return self._combined(node, reached_N)

    def _condition(self, node: ast.expr, reached_N: NDArray[np.bool_]) -> Any:
        value = self.value(node, reached_N)
        if not _is_condition(value):
            self.expression.refuse(node, "must be a condition; this is a number")
        return value

    def _joined(self, node: ast.BoolOp, reached_N: NDArray[np.bool_]) -> Any:
        is_and = isinstance(node.op, ast.And)
        result = self._condition(node.values[0], reached_N)
        for each in node.values[1:]:
            reached_N = reached_N & (result if is_and else np.logical_not(result))
            right = self._condition(each, reached_N)
            result = result & right if is_and else result | right
        return result

    def _compared(self, node: ast.Compare, reached_N: NDArray[np.bool_]) -> Any:
        result: Any = np.True_
        left = self.value(node.left, reached_N)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                assert isinstance(right_node, ast.Tuple | ast.List | ast.Set)
                is_in: Any = np.False_
                for element in right_node.elts:
                    right = self.value(element, reached_N)
                    is_in = is_in | self._holds(node, operator.eq, left, right)
                return result & (is_in if isinstance(op, ast.In) else np.logical_not(is_in))
            right = self.value(right_node, reached_N)
            result = result & self._holds(node, OPERATIONS[type(op)], left, right)
            left, reached_N = right, reached_N & result
        return result

    def _holds(
        self, node: ast.Compare, op: Callable[[Any, Any], Any], left: Any, right: Any
    ) -> Any:
        if _is_condition(left) != _is_condition(right):
            self.expression.refuse(node, "compares a condition with a number; add parentheses")
        if _is_float(left) or _is_float(right):
            left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        return np.asarray(op(left, right))

    def _signed(self, node: ast.UnaryOp, reached_N: NDArray[np.bool_]) -> Any:
        if isinstance(node.op, ast.Not):
            return np.logical_not(self._condition(node.operand, reached_N))
        value = self.value(node.operand, reached_N)
        if _is_condition(value):
            if isinstance(node.op, ast.Invert):
                return np.logical_not(value)
            self.expression.refuse(node, "a condition has no sign; add parentheses")
        if isinstance(node.op, ast.UAdd):
            return value
        if isinstance(node.op, ast.USub):
            return self._calculated(node, operator.sub, 0, value, reached_N)
        if _is_float(value):
            self.expression.refuse(node, "~ takes conditions and integers")
        return self._calculated(node, operator.sub, -1, value, reached_N)

    def _combined(self, node: ast.BinOp, reached_N: NDArray[np.bool_]) -> Any:
        op = OPERATIONS[type(node.op)]
        left, right = self.value(node.left, reached_N), self.value(node.right, reached_N)
        conditions = _is_condition(left) + _is_condition(right)
        if op in _BITWISE:
            if conditions == 2:
                return op(left, right)
            if conditions or _is_float(left) or _is_float(right):
                self.expression.refuse(
                    node, "& and | bind tighter than comparisons; add parentheses"
                )
        if conditions:
            self.expression.refuse(node, "calculates with a condition; add parentheses")
        if op in _DIVISIONS:
            is_zero = np.equal(right, 0)
            self._check(node, is_zero & reached_N, "divides by zero")
            # 1 stands for the zeros of rows that are not reached.
            right = np.where(is_zero, 1, right) if is_zero.any() else right
        return self._calculated(node, op, left, right, reached_N)

    def _calculated(
        self,
        node: ast.expr,
        op: Callable[[Any, Any], Any],
        left: Any,
        right: Any,
        reached_N: NDArray[np.bool_],
    ) -> Any:
        if op is operator.truediv or _is_float(left) or _is_float(right):
            return op(np.asarray(left, np.float64), np.asarray(right, np.float64))
        unsigned = op is not operator.sub and _is_uint64(left, right)
        limits = np.iinfo(np.uint64 if unsigned else np.int64)
        # The smallest int64 is left out, because // -1 overflows on it.
        least = 0 if unsigned else limits.min + 1
        bounds = [*_bounds(left), *_bounds(right)]
        if op in (operator.add, operator.sub, operator.mul):
            bounds += [op(a, b) for a in bounds[:2] for b in bounds[2:]]
        if all(least <= bound <= limits.max for bound in bounds):
            return op(np.asarray(left, limits.dtype), np.asarray(right, limits.dtype))
        # Python's own integers: `np.asarray(left, object)` would keep a NumPy scalar, which wraps.
        exact = np.asarray(op(np.asarray(left).astype(object), np.asarray(right).astype(object)))
        overflows = np.asarray((exact < limits.min) | (exact > limits.max), np.bool_)
        self._check(node, overflows & reached_N, f"overflows {limits.dtype}")
        return np.where(overflows, 0, exact).astype(limits.dtype)

    def _check(self, node: ast.expr, bad_N: NDArray[np.bool_], problem: str) -> None:
        """Raise DatasetError where an operation fails on a row that Python would reach."""
        if bad_N.any():
            raise DatasetError(
                f"{option('where')}: {self.expression.source(node)!r} {problem} at step "
                f"{self.first + int(np.argmax(bad_N))}; leave such rows out with a condition and "
                "'and' before it"
            )


def _is_condition(value: Any) -> bool:
    return getattr(value, "dtype", None) == np.bool_


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or getattr(value, "dtype", np.dtype(int)).kind == "f"


def _is_uint64(*values: Any) -> bool:
    """Return True if one operand is uint64 and the other one cannot be negative."""
    is_unsigned = (each.dtype.kind == "u" if np.ndim(each) else each >= 0 for each in values)
    return all(is_unsigned) and np.uint64 in (getattr(each, "dtype", 0) for each in values)


def _bounds(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (int(value.min()), int(value.max())) if np.size(value) else (0, 0)

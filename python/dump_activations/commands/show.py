"""Tables and JSON about dumps: finished, unfinished, damaged, or compared. Imports no torch.

Each function raises OutputError if a file cannot be read, or stdout cannot be written.
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dump_activations.commands.console import Table, mode, print_line, show
from dump_activations.dtypes import STATISTICS_PREFIX
from dump_activations.errors import OutputError, duration_text, shape_text, size_text
from dump_activations.model.activations import ACTIVATIONS, WeightActivation
from dump_activations.progress import BYTES, Phase, counted, shown_progress
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.storage.reading.comparison import compare
from dump_activations.storage.reading.damage import find_damage
from dump_activations.storage.reading.dump_files import find_shards, inspect_dump
from dump_activations.storage.reading.keys import Catalog
from dump_activations.storage.reading.stored_statistics import compute_statistics, stored_statistics
from dump_activations.storage.writing.existing import find_unfinished
from dump_activations.storage.writing.paths import partial_path, target_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dump_activations.dtypes import TensorSpec
    from dump_activations.storage.digests import Digest
    from dump_activations.storage.formats.layout import StoredTensor
    from dump_activations.storage.reading.comparison import Comparison, TensorPair
    from dump_activations.storage.reading.dump_files import DumpShards
    from dump_activations.storage.statistics import TensorStatistics
    from dump_activations.storage.writing.existing import Unfinished

    Tensor = StoredTensor | TensorSpec

COLUMNS = ("tensor", "dtype", "shape", "size")
_ALL_STATISTICS = f"{STATISTICS_PREFIX}KEY/NAME"

_GROUPS = ("boards", "labels", "activations", "statistics", "parameters")
_GROUP_OF = {
    "indices": "boards",
    "boards": "boards",
    "labels": "labels",
    "stats": "statistics",
    **{each.key: "parameters" for each in ACTIVATIONS if isinstance(each, WeightActivation)},
}

_THREADS = len(os.sched_getaffinity(0))

# A tokenizer in the metadata of a checkpoint may have 64 KiB.
_LONGEST_VALUE = 400

# Metadata that users typed. A directory may be called 42.
_TYPED = frozenset({"checkpoint", "dataset", "layers"})

# Work that users cannot read, or that a table shows as tensors.
_HIDDEN_WORK = frozenset({"config", "indices", "tensors", "threads", "format"})


def show_dump(file: Path, *, verify: bool, stats: bool) -> None:
    """Show the contents of a dump, or how much of an unfinished one is written.

    `verify` compares it with its digests. `stats` shows statistics in JSON too, and computes them
    where it stores none.
    """
    if verify or stats:
        reason = "there is nothing to verify it by" if verify else "it has no statistics yet"
        refuse_unfinished(file, reason)
    elif _show_unfinished(file):
        return
    dump = inspect_dump(file)
    with shown_progress(as_json=mode.as_json) if verify or stats else nullcontext():
        damage: Mapping[Path, Sequence[str]] = {}
        if verify:
            count = counted(Phase("verifying", BYTES))
            damage = find_damage(dump, threads=_THREADS, progress=count)
        statistics = stored_statistics(dump)
        if stats and not statistics:
            count = counted(Phase("computing statistics", BYTES))
            statistics = compute_statistics(dump, threads=_THREADS, progress=count)
    its = dump.format.name, dump.size, [*dump.tensors.values()], dump.metadata, dump.digests
    contents = _Contents(dump.path, *its)
    content, damaged = contents.as_dict(), None
    if verify:
        damaged = sorted({name for names in damage.values() for name in names})
        content["damaged"] = damaged
    if stats:
        content["stats"] = {
            tensor: {name: values.tolist() for name, values in found.items()}
            for tensor, found in statistics.items()
        }
    table = _statistics_table(statistics, contents.layers or []) if statistics else None
    show(content, contents.parts(damaged=damaged, statistics=table))
    if (left := partial_path(target_of(file))).exists():
        print_line("note", f"{left} is next to it: another dump to its name, not finished")
    texts = [f"{path} is damaged: {', '.join(names)}" for path, names in damage.items() if names]
    if texts:
        raise OutputError("; ".join(texts))


def _show_unfinished(file: Path) -> bool:
    """Show how much of an unfinished dump is written. Return False for any other."""
    shards = None if os.path.lexists(file) else find_shards(file)
    if shards is not None and shards.missing:
        _show_shards(shards)
        return True
    if shards is not None or (unfinished := find_unfinished(file)) is None:
        return False
    _show_partial(unfinished)
    return True


def refuse_unfinished(file: Path, reason: str) -> None:
    """Raise OutputError, with a reason, where only a partial file is there."""
    if find_shards(file) is None and (found := find_unfinished(file)) is not None:
        raise OutputError(f"{found.path} is not finished: {reason}")


def _show_shards(shards: DumpShards) -> None:
    """Show how much of a dump in shards is written."""
    done, in_all = shards.boards
    for path in shards.partial.values():
        with suppress(OutputError):  # A partial file has no journal in its first moment.
            unfinished = find_unfinished(path)
            done += 0 if unfinished is None else unfinished.rows
    finished = len(shards.finished)
    progress = {"shards": shards.count, "shards_done": finished, "boards_done": done}
    of = "" if in_all is None else f" of {in_all:,}"
    lines = [
        f"{shards.whole}: unfinished: {finished:,} of {shards.count:,} shards are finished, "
        f"{done:,}{of} boards are on disk",
        *(f"{path.name} is unfinished" for path in shards.partial.values()),
    ]
    show({"file": str(shards.whole), "boards": in_all, "unfinished": progress}, lines)


def _show_partial(found: Unfinished) -> None:
    """Show the contents of a partial file, and how much of it is written."""
    work, done, of = found.header.work, found.rows, found.header.rows
    metadata = {key: value for key, value in work.items() if key not in _HIDDEN_WORK}
    contents = _Contents(found.path, work.get("format", ""), found.size, found.specs, metadata, {})
    unfinished = {
        "boards_done": done,
        "batches": found.header.batches,
        "batches_done": len(found.batches),
        "being_written": found.is_being_written,
        "written_at": found.modified,
    }
    state = (
        f"unfinished: {done:,} of {of:,} boards ({done / of:.0%}) are on disk, "
        f"{len(found.batches):,} of {found.header.batches:,} batches; "
        f"{'a' if found.is_being_written else 'no'} process is writing it; "
        f"the last batch is {duration_text(max(time.time() - found.modified, 0))} old"
    )
    title, *tables = contents.parts()
    show({**contents.as_dict(), "unfinished": unfinished}, [title, state, *tables])


@dataclass(frozen=True)
class _Contents:
    """The contents of a file, finished or not."""

    path: Path
    format: str
    size: int
    tensors: Sequence[Tensor]
    metadata: Mapping[str, str]
    digests: Mapping[str, Digest]

    @property
    def boards(self) -> int | None:
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        return (shapes.get("indices") or (None,))[0]

    @property
    def layers(self) -> list[int] | None:
        """Numbers of the layers that are stored; None where the file has none."""
        tensors = {tensor.name: tensor for tensor in self.tensors}
        with suppress(OutputError):  # A file of another program may be no dump.
            return Catalog(self.path, tensors, self.metadata).layers or None
        return None

    @property
    def has_nonfinite(self) -> bool:
        return any(digest.nan or digest.inf for digest in self.digests.values())

    def as_dict(self) -> dict[str, object]:
        return {
            "file": str(self.path),
            "format": self.format,
            "bytes": self.size,
            "boards": self.boards,
            "layers": self.layers,
            "tensors": [
                {
                    "key": tensor.name,
                    "group": _group_of(tensor.name),
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "bytes": tensor.nbytes,
                    "nan": (digest := self.digests.get(tensor.name)) and digest.nan,
                    "inf": digest and digest.inf,
                }
                for tensor in self.tensors
            ],
            "metadata": {key: _json_value(key, text) for key, text in self.metadata.items()},
        }

    def parts(
        self, *, damaged: Sequence[str] | None = None, statistics: Table | None = None
    ) -> Iterator[str | Table]:
        """Yield a title and tables. The table of statistics replaces the row of their tensors."""
        facts = [f"{size_text(self.size)} ({self.size:,} bytes)"]
        if self.boards is not None:
            facts.append(f"{self.boards:,} boards")
        if self.layers is not None:
            of = f" of {self.metadata['num_layers']}" if "num_layers" in self.metadata else ""
            facts.append(f"{len(self.layers)}{of} layers")
        if self.digests and not self.has_nonfinite:
            facts.append("all values finite")
        yield f"{self.path}: {', '.join(facts)}"
        yield self._tensor_table(damaged, has_statistics=statistics is None)
        if statistics is not None:
            yield statistics
        hidden = INTEGRITY_KEY if self.digests else ""
        shown = [(key, _shortened(text)) for key, text in self.metadata.items() if key != hidden]
        if shown:
            yield Table(("metadata", "value"), shown)

    def _tensor_table(self, damaged: Sequence[str] | None, *, has_statistics: bool) -> Table:
        """Show tensors in groups; NaN and infinity have columns where a tensor contains any."""
        counts = ["nan", "inf"] * self.has_nonfinite
        groups: dict[str, list[list[str]]] = {group: [] for group in _GROUPS}
        for name, *cells in tensor_rows(self.tensors, has_statistics=has_statistics):
            digest = self.digests.get(name)
            if counts:
                cells.extend([f"{digest.nan:,}", f"{digest.inf:,}"] if digest else ["", ""])
            if damaged is not None and name != _ALL_STATISTICS:
                is_unknown = [*damaged] == [INTEGRITY_KEY]  # The digests themselves are damaged.
                verdict = "DAMAGED" if name in damaged else "ok"
                cells.append("unknown" if is_unknown else verdict)
            groups[_group_of(name)].append([name, *cells])
        rows = [row for group, own in groups.items() if own for row in ([group], *own)]
        verified = ["digest"] * (damaged is not None)
        return Table((*COLUMNS, *counts, *verified), rows, ("size", *counts))


def _statistics_table(statistics: Mapping[str, TensorStatistics], layers: Sequence[int]) -> Table:
    """Show one row per tensor and layer."""
    numbers = ("vectors", "mean norm", "rms", "min", "max", "outliers")
    rows = []
    for tensor, found in statistics.items():
        is_stacked = found["mean"].ndim == 2
        for at in range(len(found["count"])):
            of = {name: values[at] if is_stacked else values for name, values in found.items()}
            mean_square = of["mean_squared_norm"].item() / of["mean"].size
            figures = [
                f"{of['count'].item():,.0f}",
                f"{of['norm_mean'].item():.5g}",
                f"{math.sqrt(mean_square):.5g}",
                f"{of['min'].min():.5g}",
                f"{of['max'].max():.5g}",
                f"{of['count_abs_gt_6'].sum():,.0f}",
            ]
            layer = str(layers[at]) if is_stacked and at < len(layers) else ""
            rows.append([tensor, layer, *figures])
    return Table(("statistics", "layer", *numbers), rows, numbers)


def tensor_rows(tensors: Sequence[Tensor], *, has_statistics: bool = True) -> list[list[str]]:
    """Return a row per tensor, and one for all statistics, which are eight tensors per key."""
    statistics = [tensor for tensor in tensors if tensor.name.startswith(STATISTICS_PREFIX)]
    rows = [
        [tensor.name, tensor.dtype, shape_text(tensor.shape), size_text(tensor.nbytes)]
        for tensor in tensors
        if not tensor.name.startswith(STATISTICS_PREFIX)
    ]
    if statistics and has_statistics:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in statistics}))
        size = size_text(sum(tensor.nbytes for tensor in statistics))
        rows.append([_ALL_STATISTICS, dtypes, f"{len(statistics):,} tensors", size])
    return rows


def _group_of(name: str) -> str:
    return _GROUP_OF.get(name.partition("/")[0], "activations")


def _shortened(value: str) -> str:
    value = value.rstrip()  # `computed_by` is padded.
    if len(value) <= _LONGEST_VALUE:
        return value
    return f"{value[:_LONGEST_VALUE]}... ({len(value):,} characters, all of them in --json)"


def _json_value(key: str, text: str | None) -> Any:
    """Return the JSON in a text of the metadata: a table, a list, a whole number, true or false.

    Every other text stays a text: a version such as 2.10 must not become a number.
    """
    if text is None or key in _TYPED:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_whole = isinstance(value, int) and json.dumps(value) == text
    return value if is_whole or isinstance(value, dict | list) else text


def show_differences(first: Path, second: Path, *, rtol: float, atol: float) -> bool:
    """Show what differs in two dumps, and return True where their tensors are equal."""
    for path in (first, second):
        refuse_unfinished(path, "there is nothing to compare yet")
    dumps = inspect_dump(first), inspect_dump(second)
    with shown_progress(as_json=mode.as_json):
        count = counted(Phase("comparing", "values"))
        comparison = compare(*dumps, threads=_THREADS, rtol=rtol, atol=atol, progress=count)
    value = {
        "files": [str(first), str(second)],
        "equal": comparison.is_equal,
        "metadata": {
            key: [_json_value(key, text) for text in texts]
            for key, texts in comparison.metadata.items()
        },
        "tensors": [
            {
                "key": pair.name,
                "equal": pair.is_equal,
                "dtypes": [tensor and tensor.dtype for tensor in (pair.first, pair.second)],
                "shapes": [tensor and tensor.shape for tensor in (pair.first, pair.second)],
                "difference": pair.difference and asdict(pair.difference),
            }
            for pair in comparison.tensors
        ],
    }
    show(value, [f"a: {first}", f"b: {second}", *_difference_parts(comparison)])
    return comparison.is_equal


def _difference_parts(comparison: Comparison) -> Iterator[str | Table]:
    """Yield tables of what differs, and a verdict. Other differences hide those in statistics."""
    differing = [pair for pair in comparison.tensors if not pair.is_equal]
    others = [pair for pair in differing if not pair.name.startswith(STATISTICS_PREFIX)]
    shown = others or differing
    tables = []
    if comparison.metadata:
        rows = [
            (key if side == "a" else "", side, "-" if text is None else _shortened(text))
            for key, texts in comparison.metadata.items()
            for side, text in zip("ab", texts, strict=True)
        ]
        tables.append(Table(("metadata", "", "value"), rows))
    described = [(pair.name, _described(pair.first), _described(pair.second)) for pair in shown]
    if shapes := [row for row in described if row[1] != row[2]]:
        tables.append(Table(("tensor", "a", "b"), shapes))
    if any(pair.difference and pair.difference.elements for pair in shown):
        tables.append(_value_table(shown))
    yield from tables
    if tables:
        yield ""
    of = len(comparison.tensors)
    if not differing:
        yield f"all {of:,} tensors are equal"
        return
    text = f"{len(differing):,} of {of:,} tensors differ"
    if statistics := len(differing) - len(others):
        text += f", {statistics:,} of them statistics"
    if "indices" in [pair.name for pair in differing]:
        text += "; their rows are of other boards, so the values are not comparable"
    yield text


def _described(tensor: StoredTensor | None) -> str:
    return "-" if tensor is None else f"{tensor.dtype} {shape_text(tensor.shape)}"


def _value_table(pairs: Sequence[TensorPair]) -> Table:
    """Show how the values of tensors differ."""
    found = [(pair, pair.difference) for pair in pairs if pair.difference]
    numbers = ("differing", "share", "not finite", "largest", "relative")
    rows = []
    for pair, difference in found:
        if pair.first is None or not difference.elements:
            continue
        share = difference.elements / math.prod(pair.first.shape)
        row = [pair.name, f"{difference.elements:,}", f"{share:.2%}", f"{difference.nonfinite:,}"]
        if difference.place is None:
            rows.append([*row, "-", "-", "-"])
            continue
        largest = difference.largest
        row.append(f"{largest:,.0f}" if 1000 <= largest < 1e15 else f"{largest:.3g}")
        place = ", ".join(map(str, difference.place))
        rows.append([*row, f"{difference.relative:.2g}", f"[{place}]"])
    return Table(("tensor", *numbers, "largest at"), rows, numbers)

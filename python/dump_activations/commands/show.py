"""Tables and JSON about files, runs and keys: everything that the commands show on stdout.

Each function raises OutputError if stdout cannot be written.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dump_activations.commands.console import Table, print_json, print_parts
from dump_activations.dtypes import STATISTICS_PREFIX, STORAGE_DTYPES
from dump_activations.errors import OutputError
from dump_activations.model.activations import (
    ACTIVATIONS,
    Activation,
    WeightActivation,
    find_layers,
)
from dump_activations.progress import shown_progress
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.text import duration_text, shape_text, size_text

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dump_activations.dtypes import TensorSpec
    from dump_activations.model.config import EncoderConfig
    from dump_activations.options import Options
    from dump_activations.pipeline.plan import Preview
    from dump_activations.pipeline.run import Summary
    from dump_activations.storage.digests import Digest
    from dump_activations.storage.formats.layout import StoredTensor
    from dump_activations.storage.reading.comparison import Comparison, Difference, TensorPair
    from dump_activations.storage.reading.dump_files import DumpFiles, DumpShards
    from dump_activations.storage.statistics import TensorStatistics
    from dump_activations.storage.writing.existing import Unfinished

    Tensor = StoredTensor | TensorSpec

_COLUMNS = ("tensor", "dtype", "shape", "size")
_ALL_STATISTICS = f"{STATISTICS_PREFIX}KEY/NAME"

_ACTIVATIONS = "activations"
_GROUPS = ("boards", "labels", _ACTIVATIONS, "statistics", "parameters")
_GROUP_OF = {
    "indices": "boards",
    "boards": "boards",
    "labels": "labels",
    "stats": "statistics",
    **{each.key: "parameters" for each in ACTIVATIONS if isinstance(each, WeightActivation)},
}

# A tokenizer in the metadata of a checkpoint may have 64 KiB.
_LONGEST_VALUE = 400

# Metadata that users typed. A directory may be called 42.
_TYPED = frozenset({"checkpoint", "dataset", "layers"})

# Work that users cannot read, or that a table shows as tensors.
_HIDDEN_WORK = frozenset({"config", "indices", "tensors", "threads", "format"})


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
        """Numbers of the layers that are stacked in a tensor; None where the file has none."""
        numbers = self.metadata.get("layers", "").split(",")
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            return None
        return [*map(int, numbers)]

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
        """Yield a title and tables; the table of statistics replaces the row of their tensors."""
        yield self._title()
        yield self._tensor_table(damaged, has_statistics=statistics is None)
        if statistics is not None:
            yield statistics
        shown = {key: _shortened(value) for key, value in self.metadata.items()}
        if self.digests:
            shown.pop(INTEGRITY_KEY, None)
        if shown:
            yield Table(("metadata", "value"), [*shown.items()])

    def _title(self) -> str:
        facts = [f"{size_text(self.size)} ({self.size:,} bytes)"]
        if self.boards is not None:
            facts.append(f"{self.boards:,} boards")
        if self.layers is not None:
            of = f" of {self.metadata['num_layers']}" if "num_layers" in self.metadata else ""
            facts.append(f"layers {_ranges(self.layers)}{of}")
        if self.digests and not self.has_nonfinite:
            facts.append("all values finite")
        return f"{self.path}: {', '.join(facts)}"

    def _tensor_table(self, damaged: Sequence[str] | None, *, has_statistics: bool) -> Table:
        """Show tensors in groups; NaN and infinity have columns where a tensor contains any."""
        counts = ["nan", "inf"] * self.has_nonfinite
        groups: dict[str, list[list[str]]] = {group: [] for group in _GROUPS}
        for name, *cells in _tensor_rows(self.tensors, has_statistics=has_statistics):
            digest = self.digests.get(name)
            if counts:
                cells.extend([f"{digest.nan:,}", f"{digest.inf:,}"] if digest else ["", ""])
            if damaged is not None:
                cells.append("" if name == _ALL_STATISTICS else _digest_verdict(name, damaged))
            groups[_group_of(name)].append([name, *cells])
        rows = [row for group, own in groups.items() if own for row in ([group], *own)]
        verified = ["digest"] * (damaged is not None)
        return Table((*_COLUMNS, *counts, *verified), rows, ("size", *counts))


def print_file(
    dump: DumpFiles,
    *,
    damaged: Sequence[str] | None,
    statistics: Mapping[str, TensorStatistics],
    stats: bool,
    as_json: bool,
) -> None:
    """Print the contents of a finished file.

    Args:
        dump: the file.
        damaged: names of damaged tensors; None if the file was not verified.
        statistics: statistics of its tensors, by tensor name. JSON has them only with `stats`.
        stats: include the statistics in JSON.
        as_json: print JSON instead of tables.
    """
    tensors = [*dump.tensors.values()]
    contents = _Contents(
        dump.path, dump.format.name, dump.size, tensors, dump.metadata, dump.digests
    )
    if not as_json:
        table = _statistics_table(statistics, contents.layers or []) if statistics else None
        print_parts(*contents.parts(damaged=damaged, statistics=table))
        return
    content = contents.as_dict()
    if damaged is not None:
        content["damaged"] = damaged
    if stats:
        content["stats"] = {
            tensor: {name: values.tolist() for name, values in found.items()}
            for tensor, found in statistics.items()
        }
    print_json(content)


def print_shards(shards: DumpShards, *, as_json: bool) -> None:
    """Print how much of a dump in shards is written."""
    from dump_activations.storage.writing.existing import find_unfinished

    done, in_all = shards.boards
    for path in shards.partial.values():
        with suppress(OutputError):  # A partial file has no journal in its first moment.
            unfinished = find_unfinished(path)
            done += 0 if unfinished is None else unfinished.rows
    finished = len(shards.finished)
    if as_json:
        progress = {"shards": shards.count, "shards_done": finished, "boards_done": done}
        print_json({"file": str(shards.whole), "boards": in_all, "unfinished": progress})
        return
    boards = f"{done:,} boards" if in_all is None else f"{done:,} of {in_all:,} boards"
    print_parts(
        f"{shards.whole}: unfinished: {finished:,} of {shards.count:,} shards are finished, "
        f"{boards} are on disk",
        *(f"{path.name} is unfinished" for path in shards.partial.values()),
    )


def print_unfinished(found: Unfinished, *, as_json: bool) -> None:
    """Print the contents of a partial file, and how much of it is written."""
    work = found.header.work
    metadata = {key: value for key, value in work.items() if key not in _HIDDEN_WORK}
    contents = _Contents(
        found.path, work.get("format", ""), found.size, found.specs, metadata, digests={}
    )
    if as_json:
        unfinished = {
            "boards_done": found.rows,
            "batches": found.header.batches,
            "batches_done": len(found.batches),
            "being_written": found.is_being_written,
            "written_at": found.written_at,
        }
        print_json({**contents.as_dict(), "unfinished": unfinished})
        return
    done, of = found.rows, found.header.rows
    idle = duration_text(max(time.time() - found.written_at, 0))
    state = (
        f"unfinished: {done:,} of {of:,} boards ({done / of:.0%}) are on disk, "
        f"{len(found.batches):,} of {found.header.batches:,} batches; "
        f"{'a' if found.is_being_written else 'no'} process is writing it; "
        f"the last batch is {idle} old"
    )
    title, *tables = contents.parts()
    print_parts(title, state, *tables)


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


def _tensor_rows(tensors: Sequence[Tensor], *, has_statistics: bool = True) -> list[list[str]]:
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
    return _GROUP_OF.get(name.partition("/")[0], _ACTIVATIONS)


def _digest_verdict(name: str, damaged: Sequence[str]) -> str:
    if [*damaged] == [INTEGRITY_KEY]:  # The digests themselves are damaged.
        return "unknown"
    return "DAMAGED" if name in damaged else "ok"


def _ranges(numbers: list[int]) -> str:
    """Write a set of numbers as ranges: `0-3, 7`."""
    known = set(numbers)
    starts = sorted(n for n in known if n - 1 not in known)
    ends = sorted(n for n in known if n + 1 not in known)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


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


def print_differences(first: Path, second: Path, comparison: Comparison, *, as_json: bool) -> None:
    """Print what differs in two files."""
    if not as_json:
        print_parts(f"a: {first}", f"b: {second}", *_difference_parts(comparison))
        return
    metadata = {
        key: [_json_value(key, text) for text in texts]
        for key, texts in comparison.metadata.items()
    }
    tensors = [
        {
            "key": pair.name,
            "equal": pair.is_equal,
            "dtypes": [tensor and tensor.dtype for tensor in (pair.first, pair.second)],
            "shapes": [tensor and tensor.shape for tensor in (pair.first, pair.second)],
            "difference": pair.difference and asdict(pair.difference),
        }
        for pair in comparison.tensors
    ]
    files, equal = [str(first), str(second)], comparison.is_equal
    print_json({"files": files, "equal": equal, "metadata": metadata, "tensors": tensors})


def _difference_parts(comparison: Comparison) -> Iterator[str | Table]:
    """Yield tables of what differs, and a verdict. Other differences hide those in statistics."""
    differing = [pair for pair in comparison.tensors if not pair.is_equal]
    shown = [pair for pair in differing if not _is_statistics(pair)] or differing
    if comparison.metadata:
        rows = [
            (key if side == "a" else "", side, "-" if text is None else _shortened(text))
            for key, texts in comparison.metadata.items()
            for side, text in zip("ab", texts, strict=True)
        ]
        yield Table(("metadata", "", "value"), rows)
    described = [(pair.name, _described(pair.first), _described(pair.second)) for pair in shown]
    shapes = [row for row in described if row[1] != row[2]]
    if shapes:
        yield Table(("tensor", "a", "b"), shapes)
    found = {
        pair.name: (pair.difference, math.prod(pair.first.shape))
        for pair in shown
        if pair.first is not None and pair.difference is not None and pair.difference.elements
    }
    if found:
        yield _value_table(found)
    if comparison.metadata or shapes or found:
        yield ""
    of = len(comparison.tensors)
    if not differing:
        yield f"all {of:,} tensors are equal"
        return
    text = f"{len(differing):,} of {of:,} tensors differ"
    if statistics := sum(map(_is_statistics, differing)):
        text += f", {statistics:,} of them statistics"
    if "indices" in [pair.name for pair in differing]:
        text += "; their rows are of other boards, so the values are not comparable"
    yield text


def _is_statistics(pair: TensorPair) -> bool:
    return pair.name.startswith(STATISTICS_PREFIX)


def _described(tensor: StoredTensor | None) -> str:
    return "-" if tensor is None else f"{tensor.dtype} {shape_text(tensor.shape)}"


def _value_table(found: Mapping[str, tuple[Difference, int]]) -> Table:
    """Show how values differ: tensor name -> the difference, and the number of values."""
    with_nonfinite = any(difference.nonfinite for difference, _ in found.values())
    numbers = ["differing", "share", *["not finite"] * with_nonfinite, "largest", "relative"]
    rows = []
    for name, (difference, elements) in found.items():
        row = [name, f"{difference.elements:,}", f"{difference.elements / elements:.2%}"]
        if with_nonfinite:
            row.append(f"{difference.nonfinite:,}")
        if difference.place is None:
            rows.append([*row, "-", "-", "-"])
            continue
        largest = difference.largest
        row.append(f"{largest:,.0f}" if 1000 <= largest < 1e15 else f"{largest:.3g}")
        rows.append(
            [*row, f"{difference.relative:.2g}", f"[{', '.join(map(str, difference.place))}]"]
        )
    return Table(("tensor", *numbers, "largest at"), rows, numbers)


_LEGEND = (
    "N boards, L layers, H hidden size, I of the MLP, Q query and K key/value heads of size D; "
    "with --init in numbers"
)
# Sizes that every model has.
_AXES = {"S": (16,), "O": (4, "bins")}


def print_keys(init: str | os.PathLike[str] | None, options: Options, *, as_json: bool) -> None:
    """Print every key with its shape and, for the model of a checkpoint, its bytes per board."""
    config = None
    if init is not None:
        from dump_activations.model.checkpoint import load_encoder

        with shown_progress():
            config = load_encoder(init, random_init=options.random_init).config
    keys = [_describe(activation, config, options) for activation in ACTIVATIONS]
    if as_json:
        print_json(keys)
        return
    rows = []
    for key in keys:
        shape = shape_text(key["shape"]) if key["shape"] else "one tensor per norm"
        if config is None:
            rows.append([key["key"], key["alias"], shape, key["text"]])
        elif key["lacking"]:
            rows.append([key["key"], "-", "-", key["lacking"]])
        else:
            nbytes = "" if key["bytes"] is None else f"{key['bytes']:,}"
            rows.append([key["key"], shape, nbytes, key["text"]])
    if config is None:
        print_parts(_LEGEND, Table(("key", "TransformerLens", "shape", "description"), rows))
    else:
        headings = ("key", "shape", "bytes/board", "description")
        print_parts(f"{init}, {options.dtype}", Table(headings, rows, ["bytes/board"]))


def _describe(
    activation: Activation, config: EncoderConfig | None, options: Options
) -> dict[str, Any]:
    """Describe a key. Letters are sizes that only a model has."""
    of_boards = not isinstance(activation, WeightActivation)
    axes: list[int | str]
    nbytes = None
    if config is None:
        axes = ["L"] * activation.per_layer
        axes += [size for letter in activation.shape for size in _AXES.get(letter, (letter,))]
    else:
        layers = find_layers(options.layers, config.num_hidden_layers)
        sizes = [len(layers)] * activation.per_layer + [*activation.shape_in(config)]
        axes = [*sizes]
        if of_boards:
            nbytes = math.prod(sizes) * STORAGE_DTYPES[options.dtype].nbytes
    return {
        "key": activation.key,
        "alias": activation.alias,
        "shape": ["N", *axes] if of_boards else axes,
        "bytes": nbytes,
        "text": activation.text,
        "lacking": "" if config is None else activation.lacking(config),
    }


def print_preview(preview: Preview, *, as_json: bool) -> None:
    """Print the tensors that a run would write, with one row for all statistics."""
    if as_json:
        print_json(preview.as_dict())
        return
    print_parts(preview.text, Table(_COLUMNS, _tensor_rows(preview.tensors), ["size"]))


def print_summary(summary: Summary, *, as_json: bool) -> None:
    """Print the work of a run and how long each stage took."""
    try:
        if as_json:
            print_json(summary.as_dict())
        else:
            print_parts(*_summary_parts(summary))
    except OutputError as error:
        done = f"{summary.output} is complete" if summary.output else "the run is done"
        raise OutputError(f"{done}, but its summary is lost: {error}") from error


def _summary_parts(summary: Summary) -> Iterator[str | Table]:
    where = str(summary.output) if summary.output else "nothing written"
    resumed = f" (and {summary.resumed_boards:,} resumed)" if summary.resumed_boards else ""
    shards = f", {summary.shards_written:,} of its shards" if summary.shards_written else ""
    yield f"{summary.boards:,} boards{resumed}: {where}{shards}"
    if not summary.boards:
        return
    stages = {
        f"{stage} (slowest)" if stage == summary.slowest_stage else stage: seconds
        for stage, seconds in summary.stage_seconds.items()
    }
    stages |= {"waiting for boards": summary.waiting_seconds, "whole loop": summary.seconds}
    rows = []
    for stage, seconds in stages.items():
        share = f"{seconds / summary.seconds:.0%}" if summary.seconds else "-"
        # A time that rounds to zero gives no rate.
        rate = f"{summary.boards / seconds:,.0f}" if seconds >= 0.0005 else "-"
        rows.append([stage, f"{seconds:.3f}", share, rate])
    numbers = ("seconds", "share of the run", "boards/s")
    yield Table(("stage", *numbers), rows, numbers)
    yield ""
    yield (
        f"{size_text(summary.bytes_written)} on disk; {summary.setup_seconds:.2f} s to start, "
        f"{summary.commit_seconds:.2f} s to commit"
    )

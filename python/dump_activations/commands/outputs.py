"""What `--list-outputs` and `--dry-run` show: the keys there are, and the tensors of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dump_activations.commands.console import print_json, print_parts
from dump_activations.commands.contents import split_statistics, statistics_row
from dump_activations.commands.tables import Table
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.model.activations import (
    ACTIVATIONS,
    Activation,
    WeightActivation,
    find_layers,
)
from dump_activations.progress import shown_progress
from dump_activations.text import shape_text, size_text

if TYPE_CHECKING:
    import os

    from dump_activations.model.config import EncoderConfig
    from dump_activations.options import Options
    from dump_activations.pipeline.plan import Preview

_LEGEND = (
    "N boards, L layers, H hidden size, I of the MLP, Q query and K key/value heads of size D; "
    "with --init in numbers"
)
_NORMS = "a tensor a norm"
# Letters that say less than this without a model.
_AXES = {"S": (16,), "O": (4, "bins")}


def print_keys(init: str | os.PathLike[str] | None, options: Options, *, as_json: bool) -> None:
    """Print every key with its shape and, of a model, its bytes a board.

    Args:
        init: the model's checkpoint; without one the shapes are letters.
        options: which layers, and the storage dtype.
        as_json: print JSON instead of a table.

    Raises:
        DumpActivationsError: the checkpoint cannot be loaded, or has no such layer.
    """
    config = None
    if init is not None:
        from dump_activations.model.checkpoint import load_encoder

        with shown_progress():
            config = load_encoder(init, random_init=options.random_init).config
    rows = [_describe(activation, config, options) for activation in ACTIVATIONS]
    if as_json:
        print_json(rows)
        return
    headings = ["key", "TransformerLens", "shape", *["bytes a board"] * (init is not None)]
    cells = [
        [
            row["key"],
            row["alias"],
            row["lacking"] or (shape_text(row["shape"]) if row["shape"] else _NORMS),
            "" if row["bytes"] is None else f"{row['bytes']:,}",
        ][: len(headings)]
        for row in rows
    ]
    print_parts(
        _LEGEND if init is None else f"{init}, {options.dtype}",
        Table(headings, cells, ["bytes a board"]),
    )


def _describe(
    activation: Activation, config: EncoderConfig | None, options: Options
) -> dict[str, Any]:
    """Describe a key: shape with letters for what is not known, bytes a board where they are."""
    of_boards = not isinstance(activation, WeightActivation)
    lacking = "" if config is None else activation.lacking(config)
    axes: list[int | str]
    nbytes = None
    if config is None:
        axes = ["L"] * activation.per_layer
        axes += [size for letter in activation.shape for size in _AXES.get(letter, (letter,))]
    else:
        layers = find_layers("layers", options.layers, config.num_hidden_layers)
        sizes = [len(layers)] * activation.per_layer + [*activation.shape_in(config)]
        axes = [*sizes]
        if of_boards:
            nbytes = math.prod(sizes) * STORAGE_DTYPES[options.dtype].nbytes
    return {
        "key": activation.key,
        "alias": activation.alias,
        "shape": ["N", *axes] if of_boards else axes,
        "bytes": nbytes,
        "lacking": lacking,
    }


def print_preview(preview: Preview, *, as_json: bool) -> None:
    """Print what a run is going to write, tensor by tensor: a table, or JSON for scripts.

    The table has one row for all statistics.
    """
    if as_json:
        print_json(preview.as_dict())
        return
    tensors, statistics = split_statistics(preview.tensors)
    cells = [
        [each.name, each.dtype, shape_text(each.shape), size_text(each.nbytes)] for each in tensors
    ]
    cells += [statistics_row(statistics)] if statistics else []
    print_parts(preview.text, Table(("tensor", "dtype", "shape", "size"), cells, ["size"]))

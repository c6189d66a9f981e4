"""Tables and JSON about runs: the keys they can capture, a preview, and the work they have done.

The list of keys imports neither torch nor NumPy where no checkpoint is given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dump_activations.commands.console import Table, mode, show
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import InvalidArgumentError, OutputError, option, shape_text
from dump_activations.model.activations import (
    ACTIVATIONS,
    Activation,
    WeightActivation,
    find_layers,
)
from dump_activations.progress import shown_progress

if TYPE_CHECKING:
    import os

    from dump_activations.model.config import EncoderConfig
    from dump_activations.pipeline.options import Options
    from dump_activations.pipeline.plan import Preview
    from dump_activations.pipeline.run import Summary

_LEGEND = (
    "N boards, L layers, H hidden size, I of the MLP, Q query and K key/value heads of size D; "
    "with --init in numbers"
)
# Sizes that every model has.
_AXES = {"S": (16,), "O": (4, "bins")}


def show_keys(init: str | os.PathLike[str] | None, options: Options) -> None:
    """Show every key with its shape and, for the model of a checkpoint, its bytes per board."""
    config = None
    if init is not None:
        from dump_activations.model.checkpoint import load_encoder

        with shown_progress(as_json=mode.as_json):
            config = load_encoder(init, random_init=options.random_init).config
    keys = [_describe(activation, config, options) for activation in ACTIVATIONS]
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
        table = Table(("key", "TransformerLens", "shape", "description"), rows)
        show(keys, [_LEGEND, table])
    else:
        headings = ("key", "shape", "bytes/board", "description")
        show(keys, [f"{init}, {options.dtype}", Table(headings, rows, ["bytes/board"])])


def _describe(
    activation: Activation, config: EncoderConfig | None, options: Options
) -> dict[str, Any]:
    """Describe a key. Letters are sizes that only a model has."""
    of_boards = not isinstance(activation, WeightActivation)
    axes: list[int | str]
    if config is None:
        axes = ["L"] * activation.per_layer
        axes += [size for letter in activation.shape for size in _AXES.get(letter, (letter,))]
    else:
        layers = find_layers(options.layers, config.num_hidden_layers)
        axes = [*[len(layers)] * activation.per_layer, *activation.shape_in(config)]
    has_size = of_boards and config is not None
    return {
        "key": activation.key,
        "alias": activation.alias,
        "shape": ["N", *axes] if of_boards else axes,
        "bytes": math.prod(axes) * STORAGE_DTYPES[options.dtype].nbytes if has_size else None,
        "text": activation.text,
        "lacking": "" if config is None else activation.lacking(config),
    }


def show_labels(dataset: str | None) -> None:
    """Show every label of a dataset, with its dtype and shape as it is stored."""
    if not dataset:
        raise InvalidArgumentError(f"{option('dataset')}: required to list its labels")
    from dump_activations.dataset.columns import LABEL_TEXTS
    from dump_activations.dataset.dataset import StepsDataset

    opened = StepsDataset(dataset)
    reader = opened.label_reader("*")
    rows = [
        (name, dtype.name, reader.shapes[name], LABEL_TEXTS.get(name, "field of the rows"))
        for name, dtype in reader.dtypes.items()
    ]
    value = [dict(zip(("label", "dtype", "shape", "text"), row, strict=True)) for row in rows]
    table = Table(
        ("label", "dtype", "shape per board", "description"),
        [(name, dtype, shape_text(shape), text) for name, dtype, shape, text in rows],
    )
    show(value, [f"{opened.path}: {len(opened):,} rows", table])


def show_preview(preview: Preview) -> None:
    """Show the tensors that a run would write, with one row for all statistics."""
    from dump_activations.commands.show import COLUMNS, tensor_rows

    table = Table(COLUMNS, tensor_rows(preview.tensors), ["size"])
    show(preview.as_dict(), [preview.text, table])


def show_summary(summary: Summary, *, stages: bool) -> None:
    """Show the work of a run in one line, and how long each of its stages took."""
    headings, rows = summary.stage_table()
    table = Table(headings, rows, headings[1:])
    try:
        show(summary.as_dict(), [str(summary), *[table] * stages])
    except OutputError as error:
        done = f"{summary.output} is complete" if summary.output else "the run is done"
        raise OutputError(f"{done}, but its summary is lost: {error}") from error

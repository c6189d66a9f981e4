"""The command `dump-activations`: its flags, turned into one call of `dump`, and what it shows.

`--help` and usage errors import neither torch nor NumPy, which take seconds.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dump_activations import demo
from dump_activations.commands.console import (
    CONTEXT_SETTINGS,
    Table,
    common_options,
    mode,
    show,
)
from dump_activations.commands.process import (
    Launched,
    join_launcher,
    keep_freed_memory,
    launch,
    run_command,
    uncollected_imports,
)
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import (
    InvalidArgumentError,
    OutputError,
    is_url,
    locate,
    option,
    shape_text,
    with_flags,
)
from dump_activations.model.activations import (
    ACTIVATIONS,
    Activation,
    WeightActivation,
    find_layers,
)
from dump_activations.pipeline.options import DEFAULT_OUTPUT, DumpOptions, Group
from dump_activations.progress import Reporter, begin, reported_to, shown_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dump_activations.model.config import EncoderConfig
    from dump_activations.pipeline.options import Options
    from dump_activations.pipeline.plan import Preview
    from dump_activations.pipeline.run import Summary


_LOOK = "Look before you run"
_OTHER = "Other options"

_LEGEND = (
    "N boards, L layers, H hidden size, I of the MLP, Q query and K key/value heads of size D; "
    "with --init in numbers"
)
# Sizes that every model has.
_AXES = {"S": (16,), "O": (4, "bins")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; None takes the process's own arguments."""
    return run_command(dump_activations, arguments)


class _Command(click.Command):
    """A command whose help shows its options in groups, and then examples."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section per group."""
        sections: dict[str, list[tuple[str, str]]] = {
            group: [] for group in (*Group, _LOOK, _OTHER)
        }
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections[_GROUPS.get(parameter.name or "", _OTHER)].append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples. They are for copying, so their lines do not wrap."""
        with formatter.section("Examples"):
            for effect, call in _EXAMPLES.items():
                formatter.write_text(f"{effect}:")
                formatter.write(f"{'':{formatter.current_indent + 2}}{call}\n")


# Options of `dump` that the command has too.
_FIELDS = [each for each in fields(DumpOptions) if "text" in each.metadata]

_GROUPS: dict[str, str] = {
    **dict.fromkeys(("init", "dataset", "use_demo"), Group.RUN),
    **{"output": Group.KEEP, "nproc_per_node": Group.SHARE},
    **dict.fromkeys(("list_outputs", "list_labels", "dry_run"), _LOOK),
    **{each.name: each.metadata["group"] for each in _FIELDS},
}

_EXAMPLES = {
    "The embedded demo, to see what a dump is": "dump-activations --demo -o demo.safetensors",
    "The last layer of 100,000 boards in 16 bits": (
        "dump-activations --init hf://org/repo --dataset dataset --n-samples 100000 \\\n"
        "      --outputs layer_outputs --layers=-1 --dtype bf16 -o last.safetensors"
    ),
}


def _flag(described: Field[Any]) -> Callable[[Any], Any]:
    """Make an option of the command of one of `dump`."""
    name, default, choices = described.name, described.default, described.metadata["choices"]
    text = with_flags(described.metadata["text"])
    names = [f"--{name.replace('_', '-')}"]
    attributes: dict[str, Any] = {"help": f"{text[:1].upper()}{text[1:]}.", "default": default}
    if choices:
        attributes["metavar"] = f"[{'|'.join(choices)}]"
    if completed := choices or _COMPLETIONS.get(name):
        attributes["shell_complete"] = partial(_complete, completed)
    if name == "indices":
        attributes["type"] = click.Path()
    elif name in ("outputs", "labels"):
        attributes["multiple"] = True
    elif default is True:
        names = [f"--no-{names[0][2:]}", name]
        attributes |= {"flag_value": False, "show_default": False}
    elif default is False:
        attributes["is_flag"] = True
    else:
        attributes["type"] = str if default is None else type(default)
    return click.option(*names, **attributes)


def _complete(choices: Sequence[str], _: click.Context, __: Any, incomplete: str) -> list[str]:
    """Complete the last of some values that are separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{each}" for each in choices if each.startswith(last)]


def _options_of_dump(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command a flag for each option that `dump` has."""
    for described in reversed(_FIELDS):
        command = _flag(described)(command)
    return command


# Values that a shell completes, by the option's name. Labels of a dataset are in its files.
_COMPLETIONS = {"outputs": ("all", *(each.key for each in ACTIVATIONS)), "device": ("cuda", "cpu")}


@click.command(cls=_Command, context_settings=CONTEXT_SETTINGS)
@click.option(
    "--init",
    type=click.Path(),
    help="Checkpoint directory, .pt bundle, or hf://org/repo. [required without --demo]",
)
@click.option(
    "--dataset",
    type=click.Path(),
    help="Directory of steps.npy or steps-*.npy, or its URL. [required without --demo]",
)
@click.option(
    "--demo",
    "use_demo",
    is_flag=True,
    help="Use the embedded checkpoint and dataset; --allow-cpu is implied.",
)
@click.option(
    "-o",
    "--output",
    default=DEFAULT_OUTPUT,
    type=click.Path(),
    help="Output file or URL; .safetensors, .pt or .npz selects the format.",
)
@_options_of_dump
@click.option(
    "--list-outputs", is_flag=True, help="Show every key, with its sizes for --init, and exit."
)
@click.option(
    "--list-labels",
    is_flag=True,
    help="Show every label of --dataset, with its dtype and meaning, and exit.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything, show what would be written, and exit."
)
@click.option("-v", "--verbose", is_flag=True, help="Show how long each stage took.")
@click.option(
    "--nproc-per-node", help="Start this many processes on this machine; gpu starts one per GPU."
)
@common_options
@click.pass_context
def dump_activations(
    context: click.Context,
    /,
    *,
    use_demo: bool,
    list_outputs: bool,
    list_labels: bool,
    output: str,
    nproc_per_node: str | None,
    **flags: Any,
) -> None:
    """Dump selected transformer activations to disk for offline analysis."""
    place = join_launcher()
    if place.rank:  # The first process speaks for all. The others write warnings and errors.
        mode.speaker, mode.quiet = f"rank {place.rank}", True
        context.with_resource(reported_to(Reporter()))
    init, dataset = flags["init"], flags["dataset"]
    flags["allow_cpu"] |= use_demo
    if list_labels:
        _show_labels(str(demo.DATASET) if use_demo else dataset)
        return
    if list_outputs:
        _show_keys(demo.CHECKPOINT if use_demo else init, DumpOptions.of(flags))
        return
    inputs = _sources(init, dataset, use_demo=use_demo)
    options = DumpOptions.of(flags)
    path = Path(output)
    if options.write:
        from dump_activations.storage.writing.paths import check_output

        path, given = _output_path(output), flags["indices"]
        indices = [] if given is None or is_url(given) else [locate(given, "indices")]
        check_output(path, [STORAGE_DTYPES[options.dtype].name], inputs=indices)
    if nproc_per_node is not None and not context.params["dry_run"] and "RANK" not in os.environ:
        context.exit(launch(context.obj, nproc_per_node))
    with shown_progress(as_json=mode.as_json):
        shown = _run(context, inputs, path, options, place)
    if not place.rank:
        shown()


def _output_path(output: str) -> Path:
    if not is_url(output):
        return locate(output, "output")
    from dump_activations.remote.upload import output_path  # It imports NumPy.

    return output_path(output)


def _run(
    context: click.Context,
    inputs: tuple[str, str],
    path: Path,
    options: DumpOptions,
    launched: Launched,
) -> Callable[[], None]:
    """Run, or check a run, and return the function that shows it on stdout."""
    keep_freed_memory()
    begin("loading torch")
    with uncollected_imports():
        from dump_activations.api.dump import dump_to_file, preview
        from dump_activations.dataset.dataset import StepsDataset
        from dump_activations.pipeline.device import lack_of_cuda, share_cores
        from dump_activations.storage.writing.shards import Place
    if options.device == "cuda" and launched.world_size > 1 and not lack_of_cuda():
        options = replace(options, device=f"cuda:{launched.local_rank}")
    begin("opening the dataset")
    init, dataset = inputs[0], StepsDataset(inputs[1])
    place, processes = Place(launched.rank, launched.world_size), launched.local_world_size
    share_cores(processes)
    if context.params["dry_run"]:
        return partial(_show_preview, preview(init, dataset, path, options, place))
    loaded = time.monotonic() - mode.started
    summary = dump_to_file(init, dataset, path, options, place=place, local_processes=processes)
    summary = replace(summary, setup_seconds=summary.setup_seconds + loaded)
    return partial(_show_summary, summary, stages=context.params["verbose"])


def _sources(init: str | None, dataset: str | None, *, use_demo: bool) -> tuple[str, str]:
    """Return the checkpoint and the dataset that were given, or the demo's."""
    given = {"init": init, "dataset": dataset}
    if use_demo:
        if clash := [name for name, value in given.items() if value is not None]:
            raise InvalidArgumentError(
                f"{option(clash[0])}: {option('demo')} brings its own; leave out one of them"
            )
        return str(demo.CHECKPOINT), str(demo.DATASET)
    if missing := [option(name) for name, value in given.items() if not value]:
        raise InvalidArgumentError(
            f"{' and '.join(missing)}: required without {option('demo')}; {option('help')} shows "
            "all flags"
        )
    return str(init), str(dataset)


def _show_keys(init: str | os.PathLike[str] | None, options: Options) -> None:
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


def _show_labels(dataset: str | None) -> None:
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


def _show_preview(preview: Preview) -> None:
    """Show the tensors that a run would write, with one row for all statistics."""
    from dump_activations.commands.show import COLUMNS, tensor_rows

    table = Table(COLUMNS, tensor_rows(preview.tensors), ["size"])
    show(preview.as_dict(), [preview.text, table])


def _show_summary(summary: Summary, *, stages: bool) -> None:
    """Show the work of a run in one line, and how long each of its stages took."""
    headings, rows = summary.stage_table()
    table = Table(headings, rows, headings[1:])
    try:
        show(summary.as_dict(), [str(summary), *[table] * stages])
    except OutputError as error:
        done = f"{summary.output} is complete" if summary.output else "the run is done"
        raise OutputError(f"{done}, but its summary is lost: {error}") from error

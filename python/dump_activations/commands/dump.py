"""The command `dump-activations`: its flags, turned into one call of `dump`.

`--help` and usage errors import neither torch nor NumPy, which take seconds.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dump_activations import demo
from dump_activations.commands.console import (
    CONTEXT_SETTINGS,
    common_options,
    mode,
    print_line,
)
from dump_activations.commands.process import (
    Launched,
    join_launcher,
    keep_freed_memory,
    launch,
    run_command,
    uncollected_imports,
)
from dump_activations.commands.runs import show_keys, show_labels, show_preview, show_summary
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import InvalidArgumentError, locate, option, with_flags
from dump_activations.model.activations import ACTIVATIONS
from dump_activations.pipeline.options import (
    DEFAULT_OUTPUT,
    Described,
    DumpOptions,
    Group,
    describe,
)
from dump_activations.progress import begin, shown_progress, silent_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


_LOOK = "Look before you run"
_OTHER = "Other options"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; None takes the process's own arguments."""
    return run_command(dump_activations, arguments)


class _Option(click.Option):
    """An option with the title of its group."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class _Command(click.Command):
    """A command whose help shows its options in groups, and then examples.

    Args:
        groups: titles of the groups, in the order of the help.
        examples: calls of the command, each with its effect.
    """

    def __init__(
        self,
        *args: Any,
        groups: tuple[str, ...],
        examples: tuple[tuple[str, str], ...],
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self._groups = (*groups, _OTHER)
        self._examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section per group."""
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in self._groups}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[getattr(parameter, "group", _OTHER)].append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples. They are for copying, so their lines do not wrap."""
        with formatter.section("Examples"):
            for effect, call in self._examples:
                formatter.write_text(f"{effect}:")
                formatter.write(f"{'':{formatter.current_indent + 2}}{call}\n")


# Help of the flags that turn an option off.
_TURNED_OFF = {
    "write": "Run the model and write nothing.",
    "cuda_graph": "Launch each kernel, in place of replaying batches as CUDA graphs.",
}


def _flag(described: Described) -> Callable[[Any], Any] | None:
    """Make an option of the command of one of `dump`; None where only Python has it."""
    name, default = described.name, described.default
    text = with_flags(described.text)
    attributes: dict[str, Any] = {"help": f"{text[:1].upper()}{text[1:]}.", "default": default}
    if described.choices:
        attributes["metavar"] = f"[{'|'.join(described.choices)}]"
    if choices := described.choices or _COMPLETIONS.get(name):
        attributes["shell_complete"] = partial(_complete, choices)
    flag = f"--{name.replace('_', '-')}"
    if name == "indices":
        attributes |= {"type": click.Path(), "help": f"An .npy or .npz file, or a dump: {text}."}
    elif name in ("outputs", "labels"):
        attributes["multiple"] = True
    elif default is True:
        attributes |= {"flag_value": False, "show_default": False, "help": _TURNED_OFF[name]}
        return _option(f"--no-{flag[2:]}", name, group=described.group, **attributes)
    elif isinstance(default, bool):
        attributes["is_flag"] = True
    elif name in ("layers", "steps", "where", "shard_size", "shards") or isinstance(
        default, int | str
    ):
        attributes["type"] = str if default is None else type(default)
    else:
        return None
    return _option(flag, group=described.group, **attributes)


def _complete(choices: Sequence[str], _: click.Context, __: Any, incomplete: str) -> list[str]:
    """Complete the last of some values that are separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{each}" for each in choices if each.startswith(last)]


def _options_of_dump(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command a flag for each option that `dump` has."""
    for described in reversed(describe(DumpOptions)):
        if (flag := _flag(described)) is not None:
            command = flag(command)
    return command


# Values that a shell completes, by the option's name. Labels of a dataset are in its files.
_COMPLETIONS = {
    "outputs": ("all", *(each.key for each in ACTIVATIONS)),
    "device": ("cuda", "cpu"),
}

_option = partial(click.option, cls=_Option)


@click.command(
    cls=_Command,
    context_settings=CONTEXT_SETTINGS,
    groups=(Group.RUN, Group.KEEP, Group.COMPUTE, Group.SHARE, Group.AGAIN, _LOOK),
    examples=(
        ("The embedded demo, to see what a dump is", "dump-activations --demo -o demo.safetensors"),
        (
            "The last layer of 100,000 boards in 16 bits",
            "dump-activations --init hf://org/repo --dataset dataset --n-samples 100000 \\\n"
            "      --outputs layer_outputs --layers=-1 --dtype bf16 -o last.safetensors",
        ),
    ),
)
@_option(
    "--init",
    group=Group.RUN,
    type=click.Path(),
    help="Checkpoint directory, .pt bundle, or hf://org/repo. [required]",
)
@_option(
    "--dataset",
    group=Group.RUN,
    type=click.Path(),
    help="Directory of steps.npy or steps-*.npy. [required]",
)
@_option(
    "--demo",
    "use_demo",
    group=Group.RUN,
    is_flag=True,
    help="Use the embedded checkpoint and dataset; --allow-cpu is implied.",
)
@_option(
    "-o",
    "--output",
    group=Group.KEEP,
    default=DEFAULT_OUTPUT,
    type=click.Path(),
    help="Output file; .safetensors, .pt or .npz selects the format.",
)
@_options_of_dump
@_option(
    "--list-outputs",
    group=_LOOK,
    is_flag=True,
    help="Show every key, with its sizes for --init, and exit.",
)
@_option(
    "--list-labels",
    group=_LOOK,
    is_flag=True,
    help="Show every label of --dataset, with its dtype and meaning, and exit.",
)
@_option(
    "--dry-run",
    group=_LOOK,
    is_flag=True,
    help="Check everything, show what would be written, and exit.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show how long each stage took.")
@_option(
    "--nproc-per-node",
    group=Group.SHARE,
    help="Start this many processes on this machine; gpu starts one per GPU.",
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
    dry_run: bool,
    output: str,
    nproc_per_node: str | None,
    verbose: bool,
    **flags: Any,
) -> None:
    """Dump selected transformer activations to disk for offline analysis."""
    place = join_launcher()
    if place.rank:  # The first process speaks for all. The others write warnings and errors.
        mode.speaker, mode.quiet = f"rank {place.rank}", True
        context.with_resource(silent_progress())
    init, dataset = flags.pop("init"), flags.pop("dataset")
    flags["allow_cpu"] |= use_demo
    if list_labels:
        show_labels(str(demo.DATASET) if use_demo else dataset)
        return
    if list_outputs:
        show_keys(demo.CHECKPOINT if use_demo else init, DumpOptions(**flags))
        return
    init, dataset = _sources(init, dataset, use_demo=use_demo)
    options = DumpOptions(**flags)
    path = locate(output, "output")
    if options.write:
        from dump_activations.storage.writing.paths import check_output

        inputs = [] if options.indices is None else [locate(flags["indices"], "indices")]
        check_output(path, [STORAGE_DTYPES[options.dtype].name], inputs=inputs)
    if nproc_per_node is not None and not dry_run and "RANK" not in os.environ:
        context.exit(launch(context.obj, nproc_per_node))
    is_chosen = context.get_parameter_source("device") is not ParameterSource.DEFAULT
    with shown_progress(as_json=mode.as_json):
        show = _run(
            init,
            dataset,
            path,
            options,
            place,
            any_device=not is_chosen,
            dry_run=dry_run,
            verbose=verbose,
        )
    if not place.rank:
        show()


def _run(
    init: str,
    dataset: str,
    path: Path,
    options: DumpOptions,
    launched: Launched,
    *,
    any_device: bool,
    dry_run: bool,
    verbose: bool,
) -> Callable[[], None]:
    """Run, or check a run, and return the function that shows it on stdout."""
    keep_freed_memory()
    begin("loading torch")
    with uncollected_imports():
        from dump_activations.api.dump import dump_to_file, preview
        from dump_activations.dataset.dataset import StepsDataset
        from dump_activations.pipeline.device import lack_of_cuda, share_cores
        from dump_activations.storage.writing.shards import Place
    if options.allow_cpu and any_device and (reason := lack_of_cuda()):
        print_line("note", f"no CUDA device ({reason}): running on the CPU")
        options = replace(options, device="cpu")
    elif options.device == "cuda" and launched.world_size > 1:
        options = replace(options, device=f"cuda:{launched.local_rank}")
    begin("opening the dataset")
    opened, place = StepsDataset(dataset), Place(launched.rank, launched.world_size)
    share_cores(launched.local_world_size)
    if dry_run:
        return partial(show_preview, preview(init, opened, path, options, place))
    loaded = time.monotonic() - mode.started
    summary = dump_to_file(
        init, opened, path, options, place=place, local_processes=launched.local_world_size
    )
    summary = replace(summary, setup_seconds=summary.setup_seconds + loaded)
    return partial(show_summary, summary, stages=verbose)


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
            f"{' and '.join(missing)}: required; {option('demo')} needs neither, and "
            f"{option('help')} shows all flags"
        )
    return str(init), str(dataset)

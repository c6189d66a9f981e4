"""The command `dump-activations`: its flags, turned into one call of `dump`.

`--help` and usage errors import neither torch nor NumPy, which take seconds.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dump_activations import demo
from dump_activations.commands.cli import (
    CONTEXT_SETTINGS,
    GroupedCommand,
    GroupedOption,
    common_options,
)
from dump_activations.commands.console import print_note, quietly, speak_as
from dump_activations.commands.process import (
    keep_freed_memory,
    run_command,
    uncollected_imports,
)
from dump_activations.commands.processes import follow_launcher, launch, variable
from dump_activations.commands.show import print_keys, print_preview, print_summary
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import InvalidArgumentError, option, with_flags
from dump_activations.options import DEFAULT_OUTPUT, Described, DumpOptions, Group, describe
from dump_activations.paths import locate
from dump_activations.progress import begin, shown_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; None takes the process's own arguments."""
    return run_command(dump_activations, arguments)


def _flag(described: Described) -> Callable[[Any], Any] | None:
    """Make an option of the command of one of `dump`; None where only Python has it."""
    name, default = described.name, described.default
    text = with_flags(described.text)
    attributes: dict[str, Any] = {"help": f"{text[:1].upper()}{text[1:]}.", "default": default}
    if described.choices:
        attributes["metavar"] = f"[{'|'.join(described.choices)}]"
    flag = f"--{name.replace('_', '-')}"
    if name == "indices":
        attributes["help"] = f"An .npy or .npz file, or a dump: {text}."
    elif name in ("outputs", "labels"):
        attributes["multiple"] = True
    elif name == "write":
        attributes |= {"flag_value": False, "show_default": False}
        attributes["help"] = "Run the model and write nothing."
        return _option("--no-write", "write", group=described.group, **attributes)
    elif isinstance(default, bool):
        attributes["is_flag"] = True
    elif name in ("layers", "steps", "where", "shard_size", "shards") or isinstance(
        default, int | str
    ):
        attributes["type"] = str if default is None else type(default)
    else:
        return None
    return _option(flag, group=described.group, **attributes)


def _options_of_dump(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command a flag for each option that `dump` has."""
    for described in reversed(describe(DumpOptions)):
        if (flag := _flag(described)) is not None:
            command = flag(command)
    return command


_option = partial(click.option, cls=GroupedOption)

_LOOK = "Look before you run"


@click.command(
    cls=GroupedCommand,
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
    "--init", group=Group.RUN, help="Checkpoint directory, .pt bundle, or hf://org/repo. [required]"
)
@_option("--dataset", group=Group.RUN, help="Directory of steps.npy or steps-*.npy. [required]")
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
    "--dry-run",
    group=_LOOK,
    is_flag=True,
    help="Check everything, show what would be written, and exit.",
)
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
    dry_run: bool,
    as_json: bool,
    output: str,
    nproc_per_node: str | None,
    **flags: Any,
) -> None:
    """Dump selected transformer activations to disk for offline analysis."""
    follow_launcher()
    # The first process speaks for all. The others write only warnings and errors.
    rank, processes = variable("RANK", 0), variable("WORLD_SIZE", 1)
    if rank >= processes:
        raise InvalidArgumentError(f"RANK must be below WORLD_SIZE, {processes}; got {rank}")
    if rank:
        speak_as(f"rank {rank}")
        context.with_resource(quietly())
    init, dataset_path = flags.pop("init"), flags.pop("dataset")
    flags["allow_cpu"] |= use_demo
    if list_outputs:
        print_keys(demo.CHECKPOINT if use_demo else init, DumpOptions(**flags), as_json=as_json)
        return
    init, dataset_path = _sources(init, dataset_path, use_demo=use_demo)
    options = DumpOptions(**flags)
    path = locate(output, "output")
    if options.write:
        from dump_activations.storage.writing.paths import check_output

        inputs = [] if options.indices is None else [locate(flags["indices"], "indices")]
        check_output(path, [STORAGE_DTYPES[options.dtype].name], inputs=inputs)
    local_processes = variable("LOCAL_WORLD_SIZE", 1)
    if nproc_per_node is not None and not dry_run and "RANK" not in os.environ:
        context.exit(launch(context.obj, nproc_per_node))

    keep_freed_memory()
    with shown_progress():
        begin("loading torch")
        with uncollected_imports():
            from dump_activations.api.dump import dump_to_file, preview
            from dump_activations.dataset.dataset import StepsDataset
            from dump_activations.pipeline.device import share_cores
            from dump_activations.storage.writing.shards import Place
        if options.allow_cpu and _is_default(context, "device"):
            options = replace(options, device=_device_there_is(options.device))
        begin("opening the dataset")
        dataset = StepsDataset(dataset_path)
        place = Place(rank, processes)
        share_cores(local_processes)
        if options.device == "cuda" and place.size > 1:
            options = replace(options, device=f"cuda:{variable('LOCAL_RANK', 0)}")
        if dry_run:
            show = partial(print_preview, preview(init, dataset, path, options, place))
        else:
            summary = dump_to_file(
                init, dataset, path, options, place=place, local_processes=local_processes
            )
            show = partial(print_summary, summary)
    if not rank:
        show(as_json=as_json)


def _sources(init: str | None, dataset: str | None, *, use_demo: bool) -> tuple[str, str]:
    """Return the checkpoint and the dataset that were given, or the demo's."""
    for name, value in {"init": init, "dataset": dataset}.items():
        if use_demo and value is not None:
            raise InvalidArgumentError(
                f"{option(name)}: {option('demo')} brings its own; leave out one of them"
            )
        if not use_demo and not value:
            raise InvalidArgumentError(f"{option(name)}: required (or try {option('demo')})")
    return (str(demo.CHECKPOINT), str(demo.DATASET)) if use_demo else (init or "", dataset or "")


def _is_default(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.DEFAULT


def _device_there_is(device: str) -> str:
    from dump_activations.pipeline.device import lack_of_cuda

    if not (reason := lack_of_cuda()):
        return device
    print_note(f"no CUDA device ({reason}): running on the CPU")
    return "cpu"

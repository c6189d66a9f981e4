"""The command `dump-activations`: its flags, turned into one call of `dump`.

`--help` and usage errors import neither torch nor NumPy, which take seconds.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dump_activations import demo, options
from dump_activations.activations import ACTIVATION_KEYS
from dump_activations.command import run_command
from dump_activations.console import print_note, print_summary, progress_bar
from dump_activations.errors import InvalidArgumentError
from dump_activations.process import keep_freed_memory, leave, uncollected_imports

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def run() -> NoReturn:
    """Be the command's process: its arguments, its exit code."""
    leave(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: those after the command's name; None takes the process's own.
    """
    return run_command(dump_activations, arguments)


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option("--init", help="Checkpoint directory, .pt bundle, or hf://org/repo. [required]")
@click.option("--dataset", help="Directory of steps.npy or steps-*.npy. [required]")
@click.option("--indices", help="An .npy file of step indices to use instead of a draw.")
@click.option(
    "--n-samples",
    type=int,
    default=options.DEFAULT_SAMPLES,
    help="Number of samples (ignored if --indices is given).",
)
@click.option(
    "--batch-size", type=int, default=options.DEFAULT_BATCH_SIZE, help="Forward-pass batch size."
)
@click.option("--seed", type=int, default=options.DEFAULT_SEED, help="Seed of the draw.")
@click.option(
    "--outputs",
    default=",".join(options.DEFAULT_OUTPUTS),
    help=f"Comma-separated activation keys: {', '.join(ACTIVATION_KEYS)}.",
)
@click.option(
    "-o",
    "--output",
    default=options.DEFAULT_OUTPUT,
    help="Output file; .safetensors, .pt or .npz selects the format.",
)
@click.option(
    "--dtype",
    default=options.DEFAULT_DTYPE,
    help=f"Storage dtype: {', '.join(options.STORAGE_DTYPES)}.",
)
@click.option("--no-write", is_flag=True, help="Run the model and write nothing.")
@click.option("--device", default=options.DEFAULT_DEVICE, help="Compute device.")
@click.option(
    "--allow-cpu", is_flag=True, help="Accept --device cpu, and take it where there is no GPU."
)
@click.option(
    "--demo",
    "use_demo",
    is_flag=True,
    help="Use the embedded checkpoint and pool; --allow-cpu is implied.",
)
@click.option(
    "--random-init",
    is_flag=True,
    help="Untrained weights in the checkpoint's architecture, as a control.",
)
@click.option(
    "--precision",
    default=options.DEFAULT_PRECISION,
    help=f"Arithmetic of the forward pass: {', '.join(options.PRECISIONS)}.",
)
@click.option("--compile", is_flag=True, help="Run the model through torch.compile.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run left.")
@click.option("--overwrite", is_flag=True, help="Drop what an interrupted run left.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.version_option(package_name="dump-activations")
@click.pass_context
def dump_activations(
    context: click.Context, /, *, use_demo: bool, as_json: bool, no_write: bool, **flags: Any
) -> None:
    """Dump selected transformer activations to one file for offline analysis."""
    _fill_in_demo(flags, use_demo=use_demo)
    run_options = _check(flags, write=not no_write)

    keep_freed_memory()
    with uncollected_imports():
        from dump_activations.dataset import load_indices
        from dump_activations.device import cuda_is_available
        from dump_activations.pipeline import dump

    device_is_given = context.get_parameter_source("device") is not ParameterSource.DEFAULT
    if run_options.allow_cpu and not device_is_given and not cuda_is_available():
        print_note("no CUDA device: running on the CPU")
        flags["device"] = "cpu"
    if flags["indices"] is not None:
        flags["indices"] = load_indices(flags["indices"])
    with progress_bar() as progress:
        summary = dump(
            flags.pop("init"),
            flags.pop("dataset"),
            flags.pop("output"),
            write=not no_write,
            progress=progress,
            **flags,
        )
    print_summary(summary, as_json=as_json)


def _fill_in_demo(flags: dict[str, Any], *, use_demo: bool) -> None:
    for name, value in {"init": demo.CHECKPOINT, "dataset": demo.POOL}.items():
        if use_demo and flags[name] is not None:
            raise InvalidArgumentError(f"--{name}: --demo brings its own; leave out one of them")
        if use_demo:
            flags[name] = str(value)
        if not flags[name]:
            raise InvalidArgumentError(f"--{name}: required (or try --demo)")
    flags["allow_cpu"] |= use_demo


def _check(flags: dict[str, Any], *, write: bool) -> options.Options:
    """Find what is wrong with the call itself before anything slow is imported."""
    if flags["resume"] and flags["overwrite"]:
        raise InvalidArgumentError("--resume: contradicts --overwrite; leave out one of them")
    chosen = {field.name: flags[field.name] for field in fields(options.Options)}
    if flags["indices"] is not None:
        chosen["n_samples"] = None
    run_options = options.Options(**chosen)
    if write:
        from dump_activations.output.formats import format_of

        format_of(Path(flags["output"]), [options.STORAGE_DTYPES[run_options.dtype]])
    return run_options

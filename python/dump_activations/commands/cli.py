"""Parts of a command's call: options that every command has, and help whose options are in groups.

`--help` imports neither torch nor NumPy, which take seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dump_activations.commands.console import quietly

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
}

_OTHERS = "Other options"


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --json, --quiet and --version."""

    def be_quiet(context: click.Context, _option: click.Parameter, value: Any) -> None:
        if value:
            context.with_resource(quietly())

    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
    quiet = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=be_quiet,
        help="Print errors and warnings only, and JSON if asked for.",
    )
    version = click.version_option(None, "-V", "--version", package_name="dump-activations")
    return as_json(quiet(version(command)))


class GroupedOption(click.Option):
    """An option with the title of its group."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class GroupedCommand(click.Command):
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
        self._groups = (*groups, _OTHERS)
        self._examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section per group."""
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in self._groups}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[getattr(parameter, "group", _OTHERS)].append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples. They are for copying, so their lines do not wrap."""
        with formatter.section("Examples"):
            for effect, call in self._examples:
                formatter.write_text(f"{effect}:")
                formatter.write(f"{'':{formatter.current_indent + 2}}{call}\n")

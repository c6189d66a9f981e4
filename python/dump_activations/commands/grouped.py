"""Help whose options come in groups, with examples below them."""

from __future__ import annotations

from typing import Any

import click

# Of options that say of themselves nothing else.
_OTHERS = "Other options"


class GroupedOption(click.Option):
    """An option with the title of the group that it is shown in."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command that shows its options by their groups, and then its examples.

    Args:
        groups: their titles, in the order in which they are shown.
        examples: calls of the command, each with what it does.
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
        """Write the options, a section a group."""
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in self._groups}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[getattr(parameter, "group", _OTHERS)].append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, which are for copying: their lines are not broken."""
        with formatter.section("Examples"):
            for what, call in self._examples:
                formatter.write_text(f"{what}:")
                formatter.write(f"{'':{formatter.current_indent + 2}}{call}\n")

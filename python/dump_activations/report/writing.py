"""Writes the page where nothing else can be lost."""

import os
import secrets
import stat
from contextlib import nullcontext, suppress
from pathlib import Path

from dump_activations.errors import OutputError, option
from dump_activations.progress import Count, Phase, counted, shown_progress
from dump_activations.report.page import DOCTYPE, GENERATOR, render

# The line that names it stands at the start.
_HEAD_NBYTES = 1024


def write_report(
    path: str | os.PathLike[str],
    report: str | os.PathLike[str],
    *,
    progress: Count | bool | None = None,
) -> None:
    """Write a page that shows a dump; one that is there already is replaced.

    Args:
        path: the dump.
        report: the page.
        progress: called with activation keys done and how many there are; True shows it, as
            `dump` does.

    Raises:
        InvalidArgumentError: the suffix of `path` names no format.
        OutputError: the dump cannot be read, or the page not be written: there is something else
            of its name, which is left as it is.
    """
    target = Path(report)
    _check_replaceable(target)
    with shown_progress() if progress is True else nullcontext():
        count = counted(
            Phase("writing the report", "keys"), progress if callable(progress) else None
        )
        page = render(Path(path), progress=count).encode("utf-8", "backslashreplace")
    with OutputError.when(f"cannot write {target}"):
        _replace(target, page)


def _check_replaceable(target: Path) -> None:
    """Raise where there is something at a name that is no page of this package's."""
    with OutputError.when(f"cannot write {target}"):
        try:
            found = target.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISREG(found.st_mode):
            with target.open("rb") as file:
                head = file.read(_HEAD_NBYTES)
            if head.startswith(DOCTYPE.encode()) and f'"{GENERATOR}"'.encode() in head:
                return
    raise OutputError(f"{target} is there and is no report; choose another {option('report')}")


def _replace(target: Path, content: bytes) -> None:
    """Put a file in the place of one that is there, or of none, at once."""
    temporary = target.with_name(f".report-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        _check_replaceable(target)  # There may be something else by now.
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise

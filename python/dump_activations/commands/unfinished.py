"""What `inspect-activations` shows of a file that is not finished."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dump_activations.commands.contents import FileContents
from dump_activations.text import duration_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dump_activations.commands.tables import Table
    from dump_activations.storage.writing.existing import Unfinished

# What else determines a file's bytes; no one can read it, or it is shown as tensors.
_HIDDEN = frozenset({"config", "indices", "tensors", "threads", "format"})


def as_dict(found: Unfinished) -> dict[str, object]:
    """Return all that is known of a file, ready for JSON."""
    return {
        **_contents(found).as_dict(),
        "unfinished": {
            "boards_done": found.rows,
            "batches": found.header.batches,
            "batches_done": len(found.batches),
            "being_written": found.is_being_written,
            "written_at": found.written_at,
        },
    }


def parts(found: Unfinished) -> Iterator[str | Table]:
    """Yield what people are shown of a file: the same, as lines and tables."""
    title, *tables = _contents(found).parts()
    yield title
    yield state(found)
    yield from tables


def state(found: Unfinished) -> str:
    """Say how far a file is."""
    done, of = found.rows, found.header.rows
    idle = duration_text(max(time.time() - found.written_at, 0))
    if found.is_being_written:
        doing = f"a process is writing it, and noted the last batch {idle} ago"
    else:
        doing = f"no process is writing it; the last batch is {idle} old"
    return (
        f"unfinished: {done:,} of {of:,} boards ({done / of:.0%}) are on disk, "
        f"{len(found.batches):,} of {found.header.batches:,} batches; {doing}"
    )


def _contents(found: Unfinished) -> FileContents:
    work = found.header.work
    return FileContents(
        found.path,
        work.get("format", ""),
        found.size,
        found.specs,
        {key: value for key, value in work.items() if key not in _HIDDEN},
        {},
    )

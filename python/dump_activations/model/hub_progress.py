"""Tells how far a download from the hub is, in the place of the bars that its client draws."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tqdm.std import tqdm  # type: ignore[import-untyped] # what the client's own bars are made of

from dump_activations.progress import BYTES, Count, Phase, counted, reporter


@contextmanager
def reported_download(uri: str) -> Iterator[type[Any] | None]:
    """Go on to the phase of a download.

    Yields the class of what the client takes for a bar; None leaves it to draw its own, where
    nobody else is told.
    """
    if reporter() is None:
        yield None
        return
    bar = _bar_telling(counted(Phase(f"downloading {uri}", BYTES)))
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield bar
    finally:
        bar.has_ended = True
        if not were_disabled:
            enable_progress_bars()


def _bar_telling(count: Count) -> type[Any]:
    """Make a class of bars that draw nothing, and tell of the one that counts bytes."""

    class Bar(tqdm):  # type: ignore[misc]
        has_ended = False  # the client leaves some to be closed when they are collected

        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == BYTES
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *_args: object, **_options: object) -> None:
            """Tell instead; several bars may count the same bytes in several ways."""
            if self._counts_bytes and self.n and not Bar.has_ended:
                count(int(self.n), int(self.total or 0))

    return Bar

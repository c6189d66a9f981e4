"""Renders the page from its templates, and writes it where nothing else can be lost."""

import base64
import hashlib
import os
import secrets
import stat
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dump_activations.errors import OutputError, is_url, option, printable, size_text
from dump_activations.progress import Count, Phase, counted, shown_progress
from dump_activations.remote.mirror import url_of
from dump_activations.remote.requests import RemoteNotFoundError
from dump_activations.remote.upload import place_of
from dump_activations.report import charts, data, sections
from dump_activations.storage.reading.activations_file import ActivationsFile

# A page of this package begins with the first and has the second among its first bytes.
_DOCTYPE, _GENERATOR, _HEAD_NBYTES = "<!doctype html>", "dump-activations report", 1024

# Filters of the templates: `bar` is `bar_text` of charts.py.
_TEXTS = ("bar", "number", "percent", "short", "tile")


def write_report(
    path: str | os.PathLike[str],
    report: str | os.PathLike[str],
    *,
    progress: Count | bool | None = None,
) -> None:
    """Write a page that shows a dump. An earlier page is replaced.

    Args:
        path: the dump, or its URL.
        report: the page, or its URL in a bucket or on the hub.
        progress: called with activation keys done and activation keys in all. True shows progress
            as `dump` does.

    Raises:
        InvalidArgumentError: the suffix of `path` names no format.
        OutputError: the dump cannot be read, or the page cannot be written. Files that are not
            pages of this package stay.
        RemoteError: a server refuses or does not answer.
    """
    _check_replaceable(report)
    with shown_progress() if progress is True else nullcontext():
        also = progress if callable(progress) else None
        page = render(path, progress=counted(Phase("writing the report", "keys"), also))
    if is_url(report):
        _check_replaceable(report)
        location, name = place_of(os.fspath(report), "report", make=True)
        location.write(name, page.encode())
    else:
        _write(Path(report), page)


def _write(target: Path, page: str) -> None:
    """Write a page next to its place, then rename it."""
    temporary = target.with_name(f".report-{secrets.token_hex(8)}")
    with OutputError.when(f"cannot write {target}"):
        try:
            with temporary.open("x", encoding="utf-8", newline="") as file:
                file.write(page)
            _check_replaceable(target)  # Another file may have appeared while the page was made.
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def _check_replaceable(report: str | os.PathLike[str]) -> None:
    """Raise where the file to replace is not a page of this package."""
    if is_url(report):
        try:
            location, name = place_of(os.fspath(report), "report", make=False)
        except RemoteNotFoundError:
            return
        shown, head = f"{location.url}/{name}", location.first_bytes(name, _HEAD_NBYTES)
    else:
        shown, head = os.fspath(report), _first_bytes(Path(report))
    is_page = head and head.startswith(_DOCTYPE.encode()) and f'"{_GENERATOR}"'.encode() in head
    if head is not None and not is_page:
        raise OutputError(f"{shown} exists and is not a report; choose another {option('report')}")


def _first_bytes(target: Path) -> bytes | None:
    """Return a file's first bytes: b"" for anything but a regular file, None where nothing is."""
    with OutputError.when(f"cannot write {target}"):
        try:
            found = target.lstat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return b""
        with target.open("rb") as file:
            return file.read(_HEAD_NBYTES)


def render(path: str | os.PathLike[str], *, progress: Count | None = None) -> str:
    """Return the page that shows a dump, as HTML."""
    source = data.Source(ActivationsFile(path))
    checkpoint = source.file.metadata.get("checkpoint", Path(path).name)
    # The last two names of a path, or of an address of the hub.
    name = "/".join(Path(checkpoint).parts[-2:])
    files = source.file.files
    url = url_of(files.files[0].path)
    place = f"{url.rpartition('/')[0]}/{files.path.name}" if url else str(files.path.resolve())
    with np.errstate(all="ignore"):  # The page shows NaN and infinite values as such.
        template = _environment().get_template("page.html.j2")
        return template.render(
            name=name,
            all_boards=len(source.file),
            source=source,
            file=files,
            place=place,
            facts=sections.facts(files),
            boards=sections.boards(source),
            examples=sections.examples(source),
            moves=sections.moves(source),
            attention=sections.attention(source),
            activations=list(sections.activations(source, progress)),
        )


def _environment() -> Environment:
    """Return the templates' environment. It escapes texts, and makes control characters visible."""
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = {name: getattr(charts, f"{name}_text") for name in _TEXTS}
    others = {"size": size_text, "cut": charts.cut, "depths": charts.depths}
    environment.filters.update(texts, level=charts.heat_level, **others)
    environment.globals.update(
        generator=_GENERATOR,
        top_exponent=charts.TOP_EXPONENT,
        Chart=charts.Chart,
        outlier=f"±{data.OUTLIER:.0f}",
        move_names=sections.MOVE_NAMES,
        no_move=data.NO_MOVE,
    )
    for name, asset in (("style", "page.css"), ("script", "page.js")):
        text = Path(__file__).with_name("templates").joinpath(asset).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals.update({name: Markup(text), f"{name}_source": f"'sha256-{digest}'"})
    return environment

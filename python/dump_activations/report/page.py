"""The page as a whole: its head, its sections, and a policy under which it loads nothing."""

import base64
import hashlib
from pathlib import Path

import numpy as np

from dump_activations.progress import Count
from dump_activations.report import (
    activations,
    attention,
    boards,
    charts,
    examples,
    facts,
    heads,
    png,
)
from dump_activations.report.markup import Markup, tag
from dump_activations.report.source import Source
from dump_activations.storage.reading.activations_file import ActivationsFile
from dump_activations.storage.reading.inspection import Inspection
from dump_activations.storage.reading.whole import inspect_dump

DOCTYPE = "<!doctype html>"

GENERATOR = "dump-activations report"
"""By which a page is known as one of these."""


def render(path: Path, *, progress: Count | None = None) -> str:
    """Return the page that shows a dump, as HTML.

    Args:
        path: the dump.
        progress: called with activation keys done and how many there are.

    Raises:
        InvalidArgumentError: the suffix names no format.
        OutputError: the file cannot be read, or is no dump.
    """
    inspection = inspect_dump(path)
    source = Source(ActivationsFile(path))
    with np.errstate(all="ignore"):  # A dump may hold NaN and infinite values; the page shows so.
        return _render(inspection, source, progress)


def _render(inspection: Inspection, source: Source, progress: Count | None) -> str:
    chosen = examples.choose_examples(source)
    sections = {
        "What was run": facts.draw(inspection),
        "Boards": boards.draw(source),
        "Some boards": examples.draw(source, chosen),
        "Moves": heads.draw(source),
        "Attention": attention.draw(source, chosen),
        "Activations": activations.draw(source, progress),
    }
    return _document(inspection, len(source.file), sections)


def _document(inspection: Inspection, count: int, sections: dict[str, Markup]) -> str:
    checkpoint = inspection.contents.metadata.get("checkpoint", inspection.path.name)
    # The last two parts of a path, or of an address of the hub.
    title = f"{'/'.join(Path(checkpoint).parts[-2:])} on {count:,} boards"
    style, script = (Markup(_asset(name)) for name in ("page.css", "page.js"))
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src {_source(style)}; script-src {_source(script)}"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    )
    names = {name: name.lower().replace(" ", "-") for name in sections}
    links = tag("nav", *(tag("a", name, href=f"#{at}") for name, at in names.items()))
    toggle = tag("button", "Light or dark", id="theme", class_="script", type="button")
    body = tag(
        "body",
        tag(
            "svg",
            tag("defs", *charts.markers(), png.heat_filter()),
            class_="shared",
            aria_hidden="true",
        ),
        tag("header", tag("h1", title), links, toggle),
        tag(
            "main",
            *(
                tag("section", tag("h2", name), content, id=names[name])
                for name, content in sections.items()
            ),
        ),
        tag("script", script),
    )
    return f"{DOCTYPE}\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    """Return the source of a policy that allows this content and no other."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"

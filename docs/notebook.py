"""Makes `guide/tour.ipynb`, the first dump and the probes as a notebook, by running it.

    python docs/notebook.py [--check]

With `--check` the notebook is run and nothing is written. It fails if the cells of the stored
notebook differ from the pages.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

_ROOT = Path(__file__).resolve().parents[1]
_GUIDE = _ROOT / "docs" / "guide"
_PAGES = ("first-dump.md", "probes.md")
_NOTEBOOK = _GUIDE / "tour.ipynb"
# A notebook has the output of its cells without the copy in the page.
_SHOWN_OUTPUT = re.compile(r"^```text\n.*?^```\n\n?", re.DOTALL | re.MULTILINE)


def _sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def _run() -> nbformat.NotebookNode:
    pages = "\n\n".join((_GUIDE / page).read_text() for page in _PAGES)
    notebook = jupytext.reads(_SHOWN_OUTPUT.sub("", pages), fmt="md")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # By default, ids are random.
    bin_directory = os.path.dirname(sys.executable)  # noqa: PTH120 -- links stay as they are
    os.environ["PATH"] = f"{bin_directory}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as directory:
        resources = {"metadata": {"path": directory}}
        client = NotebookClient(
            notebook, kernel_name="python3", resources=resources, coalesce_streams=True
        )
        client.execute()
    text = nbformat.writes(notebook)
    for path in (_ROOT, Path(directory)):  # Readers do not have this machine's paths.
        text = text.replace(f"{path}/", "")
    return nbformat.reads(text, as_version=4)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    notebook = _run()
    if not parser.parse_args().check:
        nbformat.write(notebook, _NOTEBOOK)
    elif _sources(nbformat.read(_NOTEBOOK, as_version=4)) != _sources(notebook):
        sys.exit(f"{_NOTEBOOK} differs from the pages; run {sys.argv[0]}")


if __name__ == "__main__":
    _main()

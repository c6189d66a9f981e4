"""Makes the notebook of the first two pages of the guide, `guide/tour.ipynb`, by running it.

    python docs/notebook.py [--check]

With `--check` the notebook is run and nothing is written; it fails where the one that is there has
other cells than the pages.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

_GUIDE = Path(__file__).parent / "guide"
_PAGES = ("first-dump.md", "probes.md")
_NOTEBOOK = _GUIDE / "tour.ipynb"


def _sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def _run() -> nbformat.NotebookNode:
    text = "\n\n".join((_GUIDE / page).read_text() for page in _PAGES)
    notebook = jupytext.reads(text, fmt="md")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # Drawn at random otherwise.
    bin_directory = os.path.dirname(sys.executable)  # noqa: PTH120 -- links stay as they are
    os.environ["PATH"] = f"{bin_directory}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as directory:
        resources = {"metadata": {"path": directory}}
        NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    return notebook


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    notebook = _run()
    if not parser.parse_args().check:
        nbformat.write(notebook, _NOTEBOOK)
    elif _sources(nbformat.read(_NOTEBOOK, as_version=4)) != _sources(notebook):
        sys.exit(f"{_NOTEBOOK} has other cells than the pages; make it anew: {sys.argv[0]}")


if __name__ == "__main__":
    _main()

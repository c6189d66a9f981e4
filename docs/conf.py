"""Configuration of Sphinx. `uv run --group docs sphinx-build -W docs site` builds the pages."""

import re
from typing import Any

from numpy.typing import ArrayLike
from sphinx.util.typing import stringify_annotation

from dump_activations.model.activations import Layers
from dump_activations.storage.reading.array import Rows

project = "dump-activations"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = "dump-activations"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
myst_heading_anchors = 3
smartquotes_action = "De"  # dashes and ellipses, no quotes
default_role = "code"  # Docstrings mark code as Markdown does.
exclude_patterns = ["run_page.py"]
add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"  # not on output


# Aliases that signatures show by name. They are described at the end of the API page.
_ALIASES = {"Rows": Rows, "Layers": Layers, "ArrayLike": ArrayLike}


def setup(app: Any) -> None:
    """Let autodoc show types by their names, and docstrings as they are meant."""
    app.connect("autodoc-process-docstring", _mark_examples, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _move_types, priority=600)  # after it
    app.connect("object-description-transform", _name_aliases, priority=400)  # before autodoc


def _name_aliases(app: Any, *_: Any) -> None:
    """Put an alias in the place of the types that it stands for."""
    for types in app.env.current_document.autodoc_annotations.values():
        for argument, text in types.items():
            for name, alias in _ALIASES.items():
                text = text.replace(stringify_annotation(alias, "smart"), name)  # noqa: PLW2901
            types[argument] = text


def _mark_examples(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Mark indented blocks behind a blank line as code."""
    for i in range(len(lines) - 1, 0, -1):
        begins = lines[i].startswith("    ") and not lines[i - 1]
        before = next((line for line in reversed(lines[:i]) if line), "")
        if begins and not before.startswith(" "):
            lines[i:i] = [".. code-block:: python", ""]


def _move_types(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Show an attribute's type next to its name."""
    text = "\n".join(lines)
    pattern = r"(^\.\. attribute:: .*\n)((?:\n|   .*\n)*?)   :type: (.*)$"
    lines[:] = re.sub(pattern, r"\1   :type: \3\n\2", text, flags=re.MULTILINE).split("\n")

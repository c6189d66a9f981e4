"""Configuration of Sphinx. `uv run --group docs sphinx-build -W docs site` builds the pages."""

project = "dump-activations"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "dump-activations"
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"  # Docstrings mark code as Markdown does.
exclude_patterns = ["run_page.py"]

"""Sphinx configuration; build the site with `make docs`."""

project = "minibert"
author = "the minibert authors"
html_title = "minibert"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# MyST generates heading anchors like a code-hosting site and checks every link.
myst_heading_anchors = 3
# The API page: Google-style docstrings, types from the signatures.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
highlight_language = "text"  # for fences without a language: formulas, diagrams, shell commands

html_theme = "furo"  # bundles its styles and scripts, so the site works offline
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

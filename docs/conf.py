"""How Sphinx builds these pages: `make docs`."""

project = "minibert"
author = "the minibert authors"
html_title = "minibert"
extensions = ["myst_parser"]

# MyST reads the pages as they are on a code-hosting site, and checks their links and anchors.
myst_heading_anchors = 3
highlight_language = "text"  # of fences without a language: formulas, diagrams, shell commands

html_theme = "furo"  # brings its styles and scripts along; the site reads without a network
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

"""Sphinx's settings for the pages; `make docs` builds them into build/docs."""

from importlib.metadata import version as installed

project = "planes"
author = "the authors of planes"
version = release = installed("planes")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "index"
html_theme = "furo"
html_title = f"planes {release}"
# GitHub's anchors, down to the fourth level, so that links work on both.
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# References in docstrings to names of other libraries lead nowhere; drawings in Mermaid stay text, as showing them would
# need the network.
suppress_warnings = ["ref.python", "misc.highlighting_failure"]

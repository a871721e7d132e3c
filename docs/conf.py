"""Sphinx's settings for the pages; `make docs` builds them into build/docs."""

from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

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

# What the theme leaves out for those who use a keyboard or a screen reader: levels of the captions that it calls
# headings, and a way to scroll code and tables that are wider than the page.
MENDED = {
    'class="caption" role="heading">': 'class="caption" role="heading" aria-level="2">',
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper colwidths-auto docutils container">': (
        '<div class="table-wrapper colwidths-auto docutils container" tabindex="0">'
    ),
}


def mend(app: Any, exception: Exception | None) -> None:
    """Write what is mended into the pages that were built."""
    for page in Path(app.outdir).glob("*.html") if exception is None else ():
        text = mended = page.read_text()
        for found, instead in MENDED.items():
            mended = mended.replace(found, instead)
        if mended != text:
            page.write_text(mended)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", mend)

"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def text_table(rows: Sequence[Any], headers: Sequence[str] | str = (), widths: Sequence[int | None] | None = None) -> str:
    """Rows as a table in which texts stay as they are: a digest ``12345e12`` is no number, 0.650 not 0.65.

    Args:
        rows: lists of cells, or mappings where ``headers`` is ``keys``.
        headers: of the columns; without them the table has no lines.
        widths: the most characters of each column, None for any number; longer texts are broken.

    >>> print(text_table([["a", "1e5"], ["b", "0.650"]], ["name", "value"]))
    name    value
    ------  -------
    a       1e5
    b       0.650
    """
    look = "simple" if headers else "plain"
    return tabulate(rows, headers=headers, tablefmt=look, disable_numparse=True, maxcolwidths=widths)

"""Reading pickled tables of arrays, such as Detectron2's .pkl weights, without running what they contain."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import ModelError, one_line

# All that a pickled dict of numpy arrays needs; numpy's module was renamed in 2.0.
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is not part of a table of arrays")
        return super().find_class(module, name)


def read_pickled_arrays(path: str | Path) -> dict[str, Any]:
    """The dict in a pickle file that holds nothing but arrays, numbers, texts, lists and dicts.

    Raises:
        ModelError: not readable, not a dict, or a pickle that calls anything else.
    """
    try:
        with open(path, "rb") as handle:
            # Detectron's older files were written by Python 2.
            content = _ArraysOnly(handle, encoding="latin1").load()
    except Exception as error:
        raise ModelError(f"weights {path}: cannot be read safely ({one_line(error)[:200]})") from None
    if not isinstance(content, (dict, OrderedDict)):
        raise ModelError(f"weights {path}: holds a {type(content).__name__}, not a table of arrays")
    return dict(content)


def only_arrays(content: dict[str, Any]) -> dict[str, np.ndarray]:
    """The entries that are arrays of numbers."""
    return {k: v for k, v in content.items() if isinstance(v, np.ndarray) and v.dtype.kind in "fiub"}

"""Reading pickled tables of arrays, such as Detectron2's .pkl weights, without running code in them."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import ModelError, one_line


class _Call:
    """A function that a pickle may call; one made for each file, so that nothing it sets outlives it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Dtype:
    """A dtype as a pickle describes it; ``known`` is None unless it is one of numbers."""

    __slots__ = ("known",)

    def __init__(self, text: object, *flags: object) -> None:
        known = np.dtype(text) if isinstance(text, str) and len(text) <= 8 else None
        self.known = known if known is not None and known.kind in "fiub" else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # Of a dtype's state numbers have their byte order alone. The rest, sizes and fields, is what
        # lets numpy take plain bytes for pointers.
        order = state[1]
        if self.known is not None and order in ("<", ">"):
            self.known = self.known.newbyteorder(order)


class _Array:
    """An array as a pickle describes it; ``array`` is None unless it holds numbers."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran, raw = state[-4:]
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a dtype")
        if dtype.known is not None:
            self.array = _numbers(raw, dtype.known, shape, "F" if fortran else "C")


def _numbers(raw: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    # Python 2 wrote bytes as a text.
    content = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(content, (bytes, bytearray)) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array that is not made of bytes")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"an array of shape {shape} in {len(content)} bytes")
    return np.ndarray(shape, dtype, bytearray(content), order=order).astype(dtype.newbyteorder("="))


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or dtype.known is None:
        return None
    return _numbers(raw, dtype.known, (), "C")[()]


def _encode(text: Any, encoding: Any = "") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it wants to encode in {str(encoding)[:40]!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    # The older protocols write those of an empty array as this call.
    return b""


def _never(*arguments: Any) -> None:
    raise pickle.UnpicklingError("it wants to make an array by itself")


# All that a pickled dict of numpy arrays needs, and what is called instead: numpy's own functions
# can be made to take bytes for pointers. numpy's module was renamed in 2.0.
ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _never,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")
        for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is not part of a table of arrays")
        return _Call(ALLOWED[module, name])


def read_pickled_arrays(path: str | Path) -> dict[str, Any]:
    """The dict in a pickle file that holds nothing but arrays, numbers, texts, lists and dicts.

    Arrays of anything but numbers come as None.

    Raises:
        ModelError: not readable, not a dict, or a pickle that calls anything else.
    """
    try:
        with open(path, "rb") as handle:
            # Detectron's older files were written by Python 2.
            content = _plain(_ArraysOnly(handle, encoding="latin1").load())
    except Exception as error:
        raise ModelError(f"weights {path}: cannot be read safely ({one_line(error, 200)})") from error
    if not isinstance(content, dict):
        raise ModelError(f"weights {path}: holds a {type(content).__name__}, not a table of arrays")
    return content


def _plain(content: Any) -> Any:
    """The content with arrays in place of the stand-ins that the reader used."""
    if isinstance(content, _Array):
        return content.array
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if content is None or isinstance(content, (str, bytes, bool, int, float, complex, np.generic)):
        return content
    if isinstance(content, (set, frozenset, bytearray)):
        return content
    raise pickle.UnpicklingError(f"it holds a {type(content).__name__}")


def only_arrays(content: dict[str, Any]) -> dict[str, np.ndarray]:
    """The entries that are arrays of numbers."""
    return {k: v for k, v in content.items() if isinstance(v, np.ndarray) and v.dtype.kind in "fiub"}

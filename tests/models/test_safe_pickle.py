"""Pickled weights: tables of arrays are read as they were; whatever else a pickle wants to do does not happen."""

from __future__ import annotations

import builtins
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest

from models.errors import ModelError
from models.saved.checkpoints import read_checkpoint
from models.saved.safe_pickle import ALLOWED, read_pickled_arrays

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "turned": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.array([1.5, -2], np.float16),
    "big": np.array([1, 2, 3], ">i4"),
    "flags": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
    "single": np.array(7, np.int64),
    "bytes": np.arange(256, dtype=np.uint8),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_tables_of_arrays_are_read_as_they_were(protocol, tmp_path):
    path = tmp_path / "w.pkl"
    content = {"model": OrderedDict(ARRAYS), "__author__": "me", "more": [1, 2.5, None, (True,), np.float32(3)]}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickled_arrays(path)
    assert read["__author__"] == "me"
    assert read["more"] == [1, 2.5, None, [True], 3.0]
    for name, array in ARRAYS.items():
        assert np.array_equal(read["model"][name], array), name
        assert read["model"][name].dtype == array.dtype.newbyteorder("=")
        assert read["model"][name].flags.writeable
    assert {k: v.tolist() for k, v in read_checkpoint(path).items()} == {k: v.tolist() for k, v in ARRAYS.items()}


def test_what_python_2_wrote_is_read(tmp_path):
    """Protocol 0 with the bytes of an array as a text, as in Detectron's files; the old name of numpy's module."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\n"
        b"tR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00\\xc0'\ntb"
    )
    (tmp_path / "w.pkl").write_bytes(b"(dS'blobs'\n(dS'w'\n" + array + b"ss.")
    assert read_pickled_arrays(tmp_path / "w.pkl")["blobs"]["w"].tolist() == [1.0, -2.0]


class _Calling:
    """An object that is made again by a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _shell(marker):
    return _Calling(os.system, f"touch {marker}")


def _evil(marker):
    """Pickles that would leave a marker file if they were let."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "a command": {"w": _shell(marker)},
        "beside an array": {"w": np.zeros(3), "x": {"y": [_shell(marker)]}},
        "as a key": {_Calling(os.system, f"touch {marker}"): 1},
        "python code": {"w": _Calling(builtins.exec, code)},
        "a function of a builtin": {"w": _Calling(getattr, _Calling(__import__, "os"), "system")},
        "a subprocess": {"w": _Calling(subprocess.Popen, ["touch", str(marker)])},
        "in the state of an array": {"w": _Calling(np.ndarray, (1,), _shell(marker))},
    }


@pytest.mark.parametrize("kind", list(_evil("x")))
def test_nothing_that_a_pickle_wants_to_call_is_called(kind, tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(_evil(marker)[kind]))
    for read in (read_pickled_arrays, read_checkpoint):
        with pytest.raises(ModelError, match=r"w\.pkl: cannot be read safely \(it wants to call .*not part of a table"):
            read(path)
    assert not marker.exists()
    # The marker is left where nobody guards: the test above can fail.
    if kind == "a command":
        subprocess.run([sys.executable, "-c", f"import pickle; pickle.load(open({str(path)!r}, 'rb'))"], check=True)
        assert marker.exists()


def _name(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def _value(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def _stacked(module, name):
    """The same name the newer way, which follows dots."""
    return b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"


def _array(dtype, raw, shape=(8,)):
    made = _name("numpy.core.multiarray", "_reconstruct") + b"(" + _name("numpy", "ndarray") + _value((0,)) + _value("b")
    state = b"(" + _value(1) + _value(shape) + dtype + _value(False) + _value(raw) + b"t"
    return made + b"tR" + state + b"b"


def _dtype(text, state=None):
    made = _name("numpy", "dtype") + _value((text, False, True)) + b"R"
    return made if state is None else made + _value(state) + b"b"


NUMBERS = _dtype("f4")
REFUSED = {
    "an attribute of what is allowed": _stacked("numpy", "ndarray.__class__") + _value(("x",)) + b"R",
    "a method of what is allowed": _stacked("numpy", "ndarray.tofile") + _value(("x",)) + b"R",
    "another name of numpy": _name("numpy", "load") + _value(("x",)) + b"R",
    "numpy's way to more": _name("numpy.core.multiarray", "fromfile") + _value(("x",)) + b"R",
    "an array made by itself": _name("numpy", "ndarray") + _value(((3,),)) + b"R",
    "too few bytes": _array(NUMBERS, b"abcd"),
    "too many bytes": _array(NUMBERS, b"a" * 64),
    "a negative shape": _array(NUMBERS, b"a" * 32, (-8,)),
    "a shape of no numbers": _array(NUMBERS, b"a" * 32, ("8",)),
    "an immense shape": _array(NUMBERS, b"a" * 32, (2**62, 4)),
    "a size that lies": _array(_dtype("f4", (3, "<", None, None, None, 10**6, 1, 0)), b"a" * 64),
    "another codec": _name("_codecs", "encode") + _value(("x", "zlib")) + b"R",
    "bytes of its own": _name("builtins", "bytes") + _value((2**40,)) + b"R",
    "no codec": _name("_codecs", "encode") + _value(("x",)) + b"R",
    "a state for a function": _name("_codecs", "encode") + b"(" + b"N" + _value({"function": 1}) + b"tb",
    "no dict": None,
    "a class alone": _name("collections", "OrderedDict"),
    "a dtype alone": _dtype("f4"),
    "cut short": _array(NUMBERS, b"a" * 32)[:-20],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tricks_with_what_is_allowed_are_refused_in_one_line(kind, tmp_path):
    path, body = tmp_path / "w.pkl", REFUSED[kind]
    path.write_bytes(b"\x80\x04" + (b"]." if body is None else b"}" + _value("w") + body + b"s."))
    with pytest.raises(ModelError, match=r"w\.pkl: (cannot be read safely|holds a list)") as refused:
        read_pickled_arrays(path)
    assert "\n" not in str(refused.value)


POINTERS = {
    "objects of plain bytes": _array(_dtype("O8", (3, "|", None, None, None, 8, 8, 0)), b"A" * 64),
    "fields beyond the end": _array(
        _dtype("V8")
        + b"("
        + _value(3)
        + _value("|")
        + b"N"
        + _value(("f",))
        + b"}"
        + _value("f")
        + b"("
        + _dtype("O8")
        + _value(4096)
        + b"ts"
        + _value(8)
        + _value(1)
        + _value(27)
        + b"tb",
        b"A" * 64,
    ),
    "an object by itself": _name("numpy.core.multiarray", "scalar") + b"(" + _dtype("O8") + _value(b"A" * 8) + b"tR",
}


@pytest.mark.parametrize("kind", POINTERS)
def test_no_bytes_are_taken_for_pointers(kind, tmp_path, root):
    """numpy's own way to make such an array ended the process (a segmentation fault) when it was looked at."""
    path = tmp_path / "w.pkl"
    path.write_bytes(b"\x80\x02}" + _value("w") + POINTERS[kind] + b"s.")
    code = f"from models.saved.safe_pickle import read_pickled_arrays as r; x = r({str(path)!r})['w']; print(repr(x))"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr


@pytest.mark.parametrize("name", list(ALLOWED), ids=".".join)
def test_nothing_a_file_sets_outlives_it(name, tmp_path):
    """A pickle may set attributes of what it is given; the next file must not see them."""
    state = b"(" + b"N" + _value({"__marker__": 1}) + b"tb"
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}" + _value("w") + _name(*name) + state + b"s.")
    with pytest.raises(ModelError):
        read_pickled_arrays(tmp_path / "w.pkl")
    assert not hasattr(ALLOWED[name], "__marker__")


def test_a_table_that_holds_itself_is_refused(tmp_path):
    content = {}
    content["again"] = content
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match="cannot be read safely"):
        read_pickled_arrays(tmp_path / "w.pkl")

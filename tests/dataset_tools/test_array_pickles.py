"""Nothing pickled is read but strings, numbers and arrays of numbers: no code, no pointers, little memory."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.array_pickles import load_array_pickle

ARRAYS = {
    "bytes": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "big-endian": np.arange(6, dtype=">i4"),
    "Fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "half": np.linspace(0, 1, 5, dtype=np.float16),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 7), dtype=np.float64),
    "scalar": np.array(3.5),
}


def loaded(path: Path, data: bytes) -> dict[Any, Any]:
    path.write_bytes(data)
    return load_array_pickle(path)


@pytest.mark.parametrize("protocol", range(5))
def test_what_numpy_pickles(tmp_path: Path, protocol: int) -> None:
    document = {"arrays": dict(ARRAYS), "list": [1, -2.5, "ä", b"\xff", None, True, 10**30], "nested": [{"a": [{}]}]}
    read = loaded(tmp_path / "p", pickle.dumps(document, protocol=protocol))
    assert read["list"] == document["list"]
    assert read["nested"] == document["nested"]
    for name, array in ARRAYS.items():
        found = read["arrays"][name]
        assert type(found) is np.ndarray
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def body(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def array(dtype_code: str, flags: int, content: bytes) -> bytes:
    """An array as a pickle spells it, with the flags of its dtype chosen by the file."""
    dtype = name("numpy", "dtype") + body((dtype_code, False, True)) + b"R"
    dtype += body((3, "|", None, None, None, -1, -1, flags)) + b"b"
    head = name("numpy", "ndarray") + body(((0,), "u1")) + b"R" + b"(" + body(1) + body((1,)) + dtype + body(False)
    return head + b"C" + bytes([len(content)]) + content + b"tb"


POINTER = struct.pack("<Q", 0x4141414141414141)
HOSTILE = {
    "code": (b"cos\nsystem\n(S'true'\ntR.", "it asks for os.system, which no array needs; nothing was run"),
    "numpy's code": (b"cnumpy\nload\n.", "it asks for numpy.load"),
    "another codec": (name("_codecs", "decode") + b".", "it asks for _codecs.decode"),
    "pointers": (b"\x80\x03}" + body("a") + array("O", 0, POINTER) + b"s.", "which are no numbers"),
    "structures": (b"\x80\x03}" + body("a") + array("V8", 0, POINTER) + b"s.", "which are no numbers"),
    "a reserved terabyte": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "is no pickle of arrays"),
    "a shape without bytes": (b"\x80\x03}" + body("a") + array("f4", 0, POINTER)[:-2] + b"tb" + b"s.", "is no pickle"),
    "a class made over": (name("numpy", "ndarray") + body({"x": 1}) + b"b.", "is no pickle of arrays"),
    "a list": (pickle.dumps([1]), "it holds a list, not a dictionary"),
    "nothing": (b"", "is no pickle of arrays"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_anything_else_is_refused(tmp_path: Path, kind: str) -> None:
    data, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "p", data)


def test_the_flags_of_a_dtype_are_not_believed(tmp_path: Path) -> None:
    """63: "holds pointers", for numpy's own `__setstate__`."""
    read = loaded(tmp_path / "p", b"\x80\x03}" + body("a") + array("u8", 63, POINTER) + b"s.")
    assert read["a"].tolist() == [0x4141414141414141]
    assert read["a"].dtype == np.uint64


@pytest.mark.parametrize(
    "data",
    [
        # One text, encoded 10,000 times; a memo with a place for number 2**31 - 1; 10,000 arrays over the same bytes.
        b"\x80\x02" + b"X" + struct.pack("<I", 10**5) + b"x" * 10**5 + b"q\x00]"
        + (name("_codecs", "encode") + b"h\x00" + body("latin1")[:-2] + b"\x86Ra") * 10**4 + b".",
        b"\x80\x02}r\xff\xff\xff\x7f.",
        pickle.dumps({"a": [ARRAYS["bytes"]] * 10**4}, 2),
    ],
    ids=["text", "memo", "arrays"],
)  # fmt: skip
def test_memory_is_of_the_size_of_the_file(tmp_path: Path, data: bytes) -> None:
    tracemalloc.start()
    try:
        loaded(tmp_path / "p", data)
    except ValueError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5 * len(data) + 5_000_000


GOOD = pickle.dumps({"a": ARRAYS["bytes"], "labels": [1, 2], "names": ["x"]}, 2)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_changed_pickle_is_plain_values_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    path = tmp_path_factory.getbasetemp() / "changed.pickle"
    try:
        document = loaded(path, bytes(data))
    except ValueError as error:
        document = {"refused": str(error).startswith(f"{path} is no pickle of arrays: ")}
    assert all(value.dtype.kind in "biuf" for value in document.values() if isinstance(value, np.ndarray))
    assert document.get("refused", True)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    with pytest.raises(OSError, match="p is a named pipe, and not a file"):
        load_array_pickle(tmp_path / "p")

"""Pickles of which nothing is believed: strings, numbers, arrays of numbers, and dictionaries and lists of these.

`pickle.Unpickler` with a list of allowed names is not enough: what these do with their arguments is the file's to say
(`numpy.dtype.__setstate__` takes flags that make an array of bytes an array of pointers). So nothing of numpy is
called; stand-ins note what a file says, and arrays are made of it afterwards.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import read_file

_REFUSED = (
    "BYTEARRAY8",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
    "PERSID",
    "BINPERSID",
    "EXT1",
    "EXT2",
    "EXT4",
    "INST",
    "OBJ",
)
"""Opcodes that no such pickle needs; the first one reserves as much memory as it names."""


def load_array_pickle(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The dictionary in a pickle. Arrays (of booleans, integers or floating point) are read-only.

    Protocols 0 to 4; text of Python 2 is read as Latin-1. Raises ValueError if the file is damaged, holds or asks for
    anything else; nothing is run, and memory stays within a few times the size of the file. Raises OSError if it cannot
    be read.
    """
    data = read_file(path)
    try:
        content = _Unpickler(data).load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
        _place_arrays(content)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged pickle raises is not documented
        raise ValueError(f"{path} is no pickle of arrays: {str(error) or type(error).__name__}") from error
    return content


class _Dtype:
    """What a pickle says of a `numpy.dtype`."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any) -> None:
        text = str(code.dtype.str if isinstance(code, _Dtype) else code)[:8]
        self.dtype: np.dtype[Any] = np.dtype(text)
        if self.dtype.kind not in "biuf":
            raise ValueError(f"it holds an array of {text!r}, which are no numbers")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """What a pickle says of a `numpy.ndarray`: a view of the bytes in it."""

    __slots__ = ("_latin1", "array")

    def __init__(self, latin1: Callable[..., bytes]) -> None:
        self._latin1 = latin1
        self.array: NDArray[Any] = np.zeros(0, dtype=np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        content = self._latin1(content) if isinstance(content, str) else content
        if not isinstance(content, bytes) or not isinstance(kind, _Dtype):
            raise ValueError("it holds an array that is not numbers in bytes")
        flat = np.frombuffer(content, dtype=kind.dtype) if content else np.zeros(0, dtype=kind.dtype)
        self.array = flat.reshape(shape, order="F" if is_fortran is True else "C")


class _Unpickler(pickle._Unpickler):
    """In Python, whose memo holds what was put there, and not as many places as the largest number in the file."""

    dispatch = {  # noqa: RUF012 (Python's own)
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in {getattr(pickle, name)[0] for name in _REFUSED}
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        left = len(data)

        def latin1(text: str = "", _encoding: Any = None) -> bytes:
            nonlocal left
            left -= len(text)  # each text of a file is encoded once: no file makes more bytes than it has
            if left < 0:
                raise ValueError("it holds more bytes than it has")
            return text.encode("latin1")

        self._known: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(latin1),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(latin1),
            ("numpy", "ndarray"): lambda *_: _Array(latin1),
            ("numpy", "dtype"): lambda code, *_: _Dtype(code),
            ("_codecs", "encode"): latin1,
            ("__builtin__", "bytes"): latin1,  # of nothing, in old protocols
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise ValueError(f"it asks for {module}.{name}, which no array needs; nothing was run")
        return self._known[module, name]


def _place_arrays(root: dict[Any, Any]) -> None:
    """Puts arrays in the places of their stand-ins, in dictionaries and lists at any depth."""
    todo: list[Any] = [root]
    seen: set[int] = set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        for key, value in list(each.items() if isinstance(each, dict) else enumerate(each)):
            if isinstance(value, _Array):
                each[key] = value.array
            elif isinstance(value, dict | list):
                todo.append(value)

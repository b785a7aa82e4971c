"""Files that we wrote and read back: decoded by their types (msgspec), or one error that says where they are wrong."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from dataset_tools.files import open_regular

T = TypeVar("T")

MAX_BYTES = 1 << 26
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")


class FileContentError(ValueError):
    """A file that is not what its type says; the message names the file, the field, what stands there, what may."""


def read_json(path: Path, kind: type[T], *, max_bytes: int = MAX_BYTES) -> T:
    """The JSON file `path` as a `kind`: a dataclass, or any other type that msgspec knows.

    Raises FileNotFoundError, OSError where it cannot be read or is no regular file, FileContentError for its content.
    """
    return decode_json(read_bounded(path, max_bytes), kind, str(path))


def read_bounded(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """A whole file. Raises OSError as `read_json` does, FileContentError if it has more bytes than it may."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise FileContentError(f"{path} is too large: at most {max_bytes:,} bytes are read")
    return content


def decode_json(content: bytes | str, kind: type[T], where: str) -> T:
    """JSON as a `kind`. `where`: what errors call it. Raises FileContentError.

    Python's own decoder reads it, since msgspec's refuses names that are not valid UTF-8 (surrogateescape).
    """
    try:
        value = json.loads(content, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise FileContentError(f"{where} is no UTF-8: {error.reason} at byte {error.start:,}") from error
    except json.JSONDecodeError as error:
        raise FileContentError(f"{where} is no JSON: {error}") from error
    except RecursionError as error:
        raise FileContentError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise FileContentError(f"{where} is no JSON: {str(error).partition(':')[0]}") from error
    return convert(value, kind, where)


def convert(value: Any, kind: type[T], where: str) -> T:
    """A decoded value (of JSON or YAML) as a `kind`. `where`: what errors call it. Raises FileContentError."""
    try:
        return msgspec.convert(value, kind)
    except RecursionError as error:
        raise FileContentError(f"{where} is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise FileContentError(f"{where} holds a text that is not valid UTF-8 where none may be") from error
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        steps = [name or index for name, index in _STEP.findall(path.removesuffix("`"))]
        field, standing = _find(value, steps)
        shown = "" if problem.startswith("Object missing") else f" is {_SHORT.repr(standing)}"
        raise FileContentError(f"{where}: {field or 'all of it'}{shown}: {problem[:200]}") from error


class _Short(reprlib.Repr):
    """Names what is long or nested by a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 2, 80
        self.maxdict = self.maxlist = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length():,} bits"


_SHORT = _Short()


def _find(value: Any, steps: list[str]) -> tuple[str, Any]:
    """The name of the field that `steps` lead to, and what stands there; at `...`, any key of a mapping, it ends."""
    names: list[str] = []
    for step in steps:
        if step == "...":
            return ".".join([*names, "…"]), value
        names.append(step)
        value = value[int(step) if isinstance(value, list | tuple) else step]
    return ".".join(names), value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")

"""What we read back is what its type says, or one error names the file, the field, what stands there and what may."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.schema import FileContentError, convert, decode_json, read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    name: str
    bytes: Annotated[int, msgspec.Meta(ge=0)]

    def __post_init__(self) -> None:
        if "/" in self.name:
            raise ValueError("no slash is allowed")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Set:
    splits: dict[str, _File]
    part: tuple[int, int] | None = None
    file: _File | None = None


_GOOD: dict[str, Any] = {"splits": {name: {"name": name, "bytes": 5} for name in ("train", "val", "caf\udce9")}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"splits": {"val": {"name": "../x", "bytes": 1}}}, r"splits\.… is \{.*\}: no slash is allowed"),
        ({"splits": {"val": {"name": "x"}}}, r"splits\.…: Object missing required field `bytes`"),
        ({"file": {"name": "x", "bytes": -1}}, r"file\.bytes is -1: Expected `int` >= 0"),
        ({"file": {"name": 5, "bytes": 1}}, r"file\.name is 5: Expected `str`, got `int`"),
        ({"file": {"name": "x", "bytes": -(10**400)}}, r"file\.bytes is a number of 1,329 bits: Expected `int`"),
        ({"file": "x" * 10**6}, r"file is 'x{30,40}\.\.\.x{30,40}': Expected `object \| null`, got `str`"),
        ({"part": [1, 2, 3]}, r"part is \[1, 2, 3\]: Expected `array` of length 2, got 3"),
    ],
)
def test_the_error_names_the_field_what_stands_there_and_what_may(change: dict[str, Any], expected: str) -> None:
    content = _GOOD | change | {"splits": _GOOD["splits"] | change.get("splits", {})}
    with pytest.raises(FileContentError, match=f"^manifest: {expected}") as caught:
        convert(content, _Set, "manifest")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no JSON: Expecting value"),
        (b"\xff{}", "no UTF-8: invalid start byte at byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"splits": ' + b"9" * 10_000 + b"}", "no JSON: Exceeds the limit"),
        (b'{"splits": NaN}', "no JSON: NaN is no number of JSON"),
        (b" " * 2000, "too large: at most 1,000 bytes are read"),
    ],
)
def test_what_is_no_json_of_ours(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileContentError, match=f"a.json is {expected}"):
        read_json(tmp_path / "a.json", _Set, max_bytes=1000 if expected.startswith("too") else 1 << 20)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(OSError, match=r"a\.json is a named pipe, and not a file"):
        read_json(tmp_path / "a.json", _Set)


def test_what_was_written_is_read_even_if_a_name_is_no_utf8() -> None:
    decoded = decode_json(json.dumps(_GOOD), _Set, "a.json")
    assert asdict(decoded) == _GOOD | {"part": None, "file": None}


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("ab/é")
    | st.sampled_from(["splits", "part", "name"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["splits", "part", "name", "bytes"]), inner),
)


@given(st.binary() | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_content_is_decoded_or_refused(content: bytes) -> None:
    try:
        decoded = decode_json(content, _Set, "a.json")
    except FileContentError as error:
        assert str(error).startswith("a.json")  # noqa: PT017 - both ends are right
    else:
        assert isinstance(decoded, _Set)

"""Files of PyTorch from anybody: nothing runs, and the memory is that of the file."""

from __future__ import annotations

import errno
import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leoclr_fast.run import checkpoint
from leoclr_fast.run.checkpoint import DamagedCheckpointError, newest_checkpoint, save_checkpoint
from leoclr_fast.run.tensors import UnreadableTensorsError, load_tensors


def saved(document: Any, *, as_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


def compressed(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


STATE = {"weights": torch.arange(6.0).reshape(2, 3), "tied": [torch.ones(3)] * 2, "epoch": 3, "name": "a"}


@pytest.mark.parametrize("as_zip", [True, False])
def test_plain_files_are_read(as_zip: bool) -> None:
    weights = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    loaded = load_tensors(saved(STATE | {"weights": weights}, as_zip=as_zip), "it")
    assert (loaded["epoch"], loaded["name"], len(loaded["tied"])) == (3, "a", 2)
    assert torch.equal(loaded["weights"], weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved({"a": torch.ones(1).expand(1 << 32)}), "its tensors would take 17,179,869,184 bytes, and it has"),
        (saved({"a": torch.ones(1).expand(1 << 32)}, as_zip=False), "tensors would take 17,179,869,184"),
        (saved({str(n): torch.arange(9.0)[n % 5 :] for n in range(2)}), ""),
        (compressed(saved({"a": torch.zeros(1 << 20)})), "file of PyTorch: it is compressed, or"),
        (saved({"a": torch.ones(2, 2).to_sparse()}), "it has a tensor of the layout"),
        (saved({"a": Hostile()}), "it is refused: it is damaged, or holds more than tensors and plain values"),
        (b"", "it cannot be read as a file of PyTorch"),
        (b"PK\x03\x04", "it"),
    ],
)  # fmt: skip
def test_others_are_refused_in_our_own_words(content: bytes, message: str) -> None:
    if not message:
        load_tensors(content, "it")
        return
    with pytest.raises(UnreadableTensorsError, match=re.escape(message)) as caught:
        load_tensors(content, "it")
    assert "weights_only" not in str(caught.value)


@given(st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(saved(STATE, as_zip=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_tensors(bytes(content[: data.draw(st.integers(0, len(content)))]), "it")
    except UnreadableTensorsError as error:
        assert "weights_only" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("damage", ["no UTF-8", "a pipe", "hostile", "a list", "cut"])
def test_the_checkpoint_before_a_damaged_one_is_taken(
    damage: str, tmp_path: Path, package_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside a backup copy, whose name says no step."""
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=9)
    states: dict[str, Any] = {"hostile": {"a": Hostile()}, "a list": []}
    newest = save_checkpoint(tmp_path, 5, states.get(damage, {}), keep=9)
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "step-00000009 copy").mkdir()
    if damage == "no UTF-8":
        (newest / "SHA256SUMS").write_bytes(b"\xff" + (newest / "SHA256SUMS").read_bytes())
    elif damage == "a pipe":
        (newest / "state.pt").unlink()
        os.mkfifo(newest / "state.pt")
    elif damage == "cut":
        (newest / "state.pt").write_bytes(b"")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0].name, found[2]) == ("step-00000003", {"step": 3})
    assert f"{newest}" in package_log.text
    assert "Trying the one before" in package_log.text
    with monkeypatch.context() as patched:
        full = OSError(errno.EMFILE, "Too many open files")
        patched.setattr(checkpoint, "read_file", Mock(side_effect=full))
        with pytest.raises(OSError, match="Too many open files"):  # the machine's fault is not the checkpoint's
            newest_checkpoint(tmp_path)
    (tmp_path / "step-00000003" / "state.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"is damaged \(step-00000005, step-00000003\)"):
        newest_checkpoint(tmp_path)

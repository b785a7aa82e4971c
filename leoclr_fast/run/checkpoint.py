"""Checkpoints: written whole or not at all, with a checksum, and loaded without running anything they hold.

`checkpoints/step-00000123/` holds `state.pt` and `SHA256SUMS` (as of sha256sum). The folder appears under its name by
one rename, after both files are on the disk, so a name without a dot is a whole checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from dataset_tools.files import raise_if_of_machine, read_file, sync_folder, write_file
from dataset_tools.schema import read_bounded
from leoclr_fast.run.tensors import UnreadableTensorsError, load_tensors

log = logging.getLogger(__name__)

_ASIDE = ".before.tmp"
_STATE, _SUMS = "state.pt", "SHA256SUMS"
_NAME = re.compile(r"step-\d{8,15}", re.ASCII)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint whose files are missing, cut short or changed."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step` in `folder` and delete all but the `keep` newest.

    Raises OSError if it cannot be written (a full disk, say); what was there before is then untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    try:
        _remove(temporary)
        if shutil.disk_usage(folder).free < len(content):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {len(content) / 1e6:,.0f} MB are needed")
        temporary.mkdir()
        write_file(temporary / _STATE, content)
        write_file(temporary / _SUMS, f"{hashlib.sha256(content).hexdigest()}  {_STATE}\n".encode())
        aside = folder / f".{final.name}{_ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():  # a damaged one, or one that a resumed run has reached again
            os.rename(final, aside)
        os.rename(temporary, final)
        sync_folder(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        drop_unfinished_checkpoints(folder)
        newest = list_checkpoints(folder)[-1:]
        kept = f"the last good checkpoint is {newest[0]}" if newest else "there is no earlier checkpoint"
        raise OSError(error.errno, f"cannot write checkpoint {final}: {error.strerror}; {kept}") from error
    _drop_old_checkpoints(folder, keep)
    return final


def _drop_old_checkpoints(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # the new one is safe
            log.warning("cannot delete the old checkpoint %s: %s", old, error.strerror)


def drop_unfinished_checkpoints(folder: Path) -> None:
    """Delete what a killed process has left half written; what it had put aside for that comes back."""
    for aside in folder.glob(f".step-*{_ASIDE}"):
        final = folder / aside.name.removeprefix(".").removesuffix(_ASIDE)
        if not final.exists():
            os.rename(aside, final)
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside_later_checkpoints(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which the run passed over because they are damaged, to `damaged-step-…`: as
    the newest ones they would be kept, and the good ones that the run is about to write would not."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            log.warning("the damaged checkpoint %s is now %s; nothing reads it any more", path.name, aside)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; other folders, such as a backup copy `step-00000123 old`, are none."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint, its checksum verified, with `weights_only=True`.

    Raises FileNotFoundError if there is none, DamagedCheckpointError if it is not whole.
    """
    return state_of(read_checkpoint(path), path, device)


def read_checkpoint(path: Path) -> bytes:
    """The content of a checkpoint, its checksum verified; `state_of` makes the state out of it. Raises as
    `load_checkpoint`."""
    if not (path / _STATE).exists() and not (path / _SUMS).exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; give a folder such as RUN/checkpoints/step-00000123")
    try:
        content = read_file(path / _STATE)
        sums = read_bounded(path / _SUMS, 4096)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:  # a bad sector is this file's
            raise_if_of_machine(error)
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {error}") from error
    if sums.split()[:1] != [hashlib.sha256(content).hexdigest().encode()]:
        raise DamagedCheckpointError(
            f"checkpoint {path} is damaged: {_STATE} ({len(content)} bytes) does not have the checksum in {_SUMS}; "
            "it was cut short or changed. Delete that folder to resume from the one before."
        )
    return content


def state_of(content: bytes, origin: object, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in the content of a checkpoint. Raises DamagedCheckpointError, which names `origin`."""
    advice = "Delete that folder to resume from the one before."
    try:
        state = load_tensors(content, f"checkpoint {origin}", device)
    except UnreadableTensorsError as error:
        raise DamagedCheckpointError(f"{error}. {advice}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"checkpoint {origin} holds a {type(state).__name__}, and no state. {advice}")
    return state


def newest_checkpoint(folder: Path) -> tuple[Path, bytes, dict[str, Any]] | None:
    """The newest whole checkpoint in `folder`, its content and its state, or None if there never was one; damaged ones
    are passed over, loudly.

    Raises DamagedCheckpointError if there are checkpoints but none is whole.
    """
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        try:
            content = read_checkpoint(path)
            return path, content, state_of(content, path)
        except (DamagedCheckpointError, FileNotFoundError) as error:
            log.warning("%s Trying the one before.", error)
            damaged.append(path.name)
    if damaged:
        raise DamagedCheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}); delete this folder, and no other, to "
            "start its training again"
        )
    return None


def _remove(path: Path) -> None:
    """Delete what a killed process has left, or a link that somebody else has put there."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)

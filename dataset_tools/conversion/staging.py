"""Where a conversion lives until it is whole: DEST.partial, with a lock and a journal; then it becomes DEST at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msgspec import Struct

from dataset_tools.files import open_own, sync_folder, take_lock, write_file
from dataset_tools.formats.manifest import Manifest
from dataset_tools.formats.split_manifest import Count
from dataset_tools.schema import decode_json, read_bounded

JOURNAL_NAME = "journal.json"
_BEFORE_JOURNAL = r"lock|\.journal\.json\.[0-9a-f]+\.tmp"
"""What a process leaves that dies before it has a journal."""


@dataclass(slots=True)
class SplitState:
    """How far a split is."""

    done: Count
    """Positions of the order before this one are done."""
    rows: Count
    rows_sha256: str
    """As `RowFile.sha256` says it."""
    reasons: dict[str, Count]
    """Why images were re-encoded → how many."""


@dataclass(slots=True)
class State:
    """How far a conversion is."""

    splits: dict[str, SplitState] = field(default_factory=dict)
    quarantine_bytes: Count = 0


class _Journal(Struct):
    plan: dict[str, Any]
    state: State


class Staging:
    """The folder DEST.partial, held by this process.

    `state` is what the journal holds of the last `save`: all that is needed to go on after any kind of death.
    """

    def __init__(self, destination: Path, folder: Path, plan: dict[str, Any], lock: int) -> None:
        self.destination, self.folder, self.plan, self.lock = destination, folder, plan, lock
        found = self._read()
        self._take_back()
        self.state = found or State()
        self.continued = found is not None
        """Whether there is something that an earlier process did."""
        if not self.continued:
            try:
                self.save()  # what is being made, before the first file of it
            except OSError as error:
                raise OSError(error.errno, f"cannot write to {folder}: {error.strerror}") from error
        self.has_progress = self.continued
        """Whether there is something that a later process can continue."""

    def save(self) -> None:
        """Make `state` what a later process continues from; the files it speaks of must be synced before."""
        body = json.dumps({"plan": self.plan, "state": asdict(self.state)})
        checksum = hashlib.sha256(body.encode()).hexdigest()
        write_file(self.folder / JOURNAL_NAME, f"{checksum}\n{body}\n")
        self.has_progress = True

    def check_room(self, needed_bytes: int, what: str) -> None:
        """Raises OSError, which begins with `what`, if the disk has no room for so many bytes."""
        free = shutil.disk_usage(self.folder).free
        if needed_bytes > free:
            raise OSError(
                f"{what} {_in_words(needed_bytes)}, but {self.folder.parent} has {_in_words(free)} free. Free some, or "
                "choose another destination"
            )

    def publish(self, manifest: Manifest) -> None:
        """Make the files of the manifest, it too, and nothing else, the folder DEST, in one step."""
        self._whole.mkdir()
        for file in manifest.all_files:
            os.replace(self.folder / file.name, self._whole / file.name)
        manifest.save(self._whole)
        os.rename(self._whole, self.destination)
        sync_folder(self.destination.parent)
        _remove(self.folder)

    @property
    def _whole(self) -> Path:
        return self.folder / "whole"

    def _take_back(self) -> None:
        """What a process moved that died while it published."""
        if self._whole.is_symlink():
            raise FileExistsError(f"{self._whole} is a symbolic link, which no conversion made. Delete it")
        if self._whole.is_dir():
            for path in list(self._whole.iterdir()):
                os.replace(path, self.folder / path.name)
            self._whole.rmdir()

    def _read(self) -> State | None:
        path = self.folder / JOURNAL_NAME
        if not os.path.lexists(path):
            return None
        remedy = f"Delete {self.folder} to start anew."
        try:
            checksum, body = [*read_bounded(path).split(b"\n"), b""][:2]
            if hashlib.sha256(body).hexdigest().encode() != checksum:
                raise ValueError("its checksum is wrong")
            journal = decode_json(body, _Journal, "it")
        except (ValueError, OSError) as error:
            raise ValueError(f"the journal {path} is damaged ({error}). {remedy}") from error
        if journal.plan != json.loads(json.dumps(self.plan)):
            raise ValueError(
                f"{self.folder} holds an unfinished conversion of another kind: "
                f"{_difference(journal.plan, self.plan)}. Give the same source and options to continue it. {remedy}"
            )
        return journal.state


@contextmanager
def staged(destination: Path, plan: dict[str, Any]) -> Iterator[Staging]:
    """Hold DEST.partial, made if it is not there. `plan` (JSON): what is being made; it must be that of an earlier try.

    What fails before anything can be continued leaves nothing behind. Raises FileExistsError if there is something at
    `destination`, or something that is not ours at DEST.partial, RuntimeError if another process holds it, ValueError
    for a damaged journal or another plan, OSError if the folder cannot be written.
    """
    folder = staging_folder(destination)
    _refuse_foreign(folder)
    with _alone(folder) as lock:
        if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
            raise FileExistsError(f"{destination} is there already. Give another destination.")
        staging = Staging(destination, folder, plan, lock)
        try:
            yield staging
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"the disk of {folder} is full ({error.strerror}). Free some space, and give the same command again",
            ) from error
        finally:
            if not staging.has_progress:
                _remove(folder)


def settled_destination(destination: str | os.PathLike[str]) -> Path:
    """The absolute path of a destination, links followed. Raises ValueError if no folder can be renamed to it."""
    target = Path(os.path.realpath(Path(destination).expanduser()))
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is a mount point, and a data set appears there by renaming a folder, which is impossible. Give "
            f"a folder inside it, such as {target / 'converted'}"
        )
    return target


def remove_leftover(destination: Path, plan: dict[str, Any]) -> None:
    """Remove DEST.partial if it is what a process of this plan left that died after DEST had appeared."""
    folder = staging_folder(destination)
    if not folder.is_dir():
        return
    with suppress(OSError, RuntimeError, ValueError):
        _refuse_foreign(folder)
        with _alone(folder) as lock:
            Staging(destination, folder, plan, lock)  # raises if it is another's
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a staging folder, its journal last: what a death in the midst leaves is still known as ours."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name not in ("lock", JOURNAL_NAME):
                os.unlink(entry.path)
        for name in (JOURNAL_NAME, "lock"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _refuse_foreign(folder: Path) -> None:
    """Raises FileExistsError if there is a DEST.partial that no conversion made: it is deleted at the end."""
    if not folder.is_symlink() and (not folder.exists() or (folder / JOURNAL_NAME).exists()):
        return
    if (
        folder.is_symlink()
        or not folder.is_dir()
        or not all(re.fullmatch(_BEFORE_JOURNAL, entry.name) for entry in os.scandir(folder))
    ):
        raise FileExistsError(
            f"{folder} is needed for the work, but there is something that no conversion made. Give another "
            "destination, or move it away."
        )


def staging_folder(destination: Path) -> Path:
    return destination.with_name(destination.name + ".partial")


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Holds the lock of a staging folder, and removes the folder at the end if it is empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_own(folder / "lock", "a+b")
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {folder.parent}: {error.strerror or error}") from error
    with file:
        lock = file.fileno()
        try:
            take_lock(lock)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is converting into {folder}; wait for it, or stop it") from error
        try:
            if os.stat(folder / "lock").st_ino != os.fstat(lock).st_ino:
                raise FileNotFoundError
        except FileNotFoundError as error:
            raise RuntimeError(f"another process has just finished with {folder}; try again") from error
        try:
            yield lock
        finally:  # while it is ours: another process may have come by, and must not lose its folder
            with suppress(OSError):
                if not any(entry.name != "lock" for entry in os.scandir(folder)):
                    (folder / "lock").unlink()
                    folder.rmdir()


def _difference(theirs: Any, ours: Any, name: str = "") -> str:
    """Says what differs between two plans."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = [
            _difference(theirs.get(key), ours.get(key), str(key))
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        return "; ".join(found)
    return f"{name} is {theirs!r} there and {ours!r} here"

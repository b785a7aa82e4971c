"""Folders: room, speed, and what kind of file system they are on."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from leoclr_fast.doctor.result import Result, failed, not_applicable

_GIB, _MIB = 2**30, 2**20
_LITTLE_ROOM_GIB, _TOO_LITTLE_ROOM_GIB = 10.0, 1.0
_FEW_INODES = 10_000
_BLOCK_BYTES = 4 * _MIB
_MAX_BYTES, _MAX_SECONDS = 64 * _MIB, 3.0
_SLOW_MIB_PER_S = 30.0
_NETWORK = re.compile(r"nfs4?|lustre|gpfs|beegfs\w*|cifs|smb3?|ceph|glusterfs|9p|afs|orangefs|pvfs2|wekafs|fuse\.\w.*")
_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class Mount:
    """What a path lies on."""

    point: str
    kind: str
    """nfs4, ext4, …"""
    options: tuple[str, ...]

    @property
    def is_network(self) -> bool:
        return _NETWORK.fullmatch(self.kind) is not None

    def __str__(self) -> str:
        where = "network" if self.is_network else "memory" if self.kind in _MEMORY else "local"
        return f"{self.kind} ({where})"


def mount_of(path: Path, table: str | None = None) -> Mount:
    """The mount that a path lies on. table: as /proc/self/mountinfo, another one in tests."""
    text = Path("/proc/self/mountinfo").read_text() if table is None else table
    real = os.path.realpath(path)
    best = Mount("", "unknown", ())
    for line in text.splitlines():
        fields, _, kind = line.partition(" - ")
        words = fields.split()
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        inside = point == "/" or real == point or real.startswith(point + "/")
        if inside and len(point) >= len(best.point):  # the later of two at one place hides the earlier
            best = Mount(point, kind.split()[0], tuple(words[5].split(",")))
    return best


def out_folder(path: str) -> Result:
    """Whether runs can be written there, and how much room there is."""
    folder = _existing(Path(path or ".").expanduser())
    mount = mount_of(folder)
    if not folder.is_dir():
        return failed(f"{folder} is a file", "Give another `--out`.")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"leoclr-fast")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "Give another `--out`, or ask for the right to write there (`ls -ld`, `df -h`, `quota`)."
        return failed(f"{folder}, {mount}: cannot be written ({error.strerror})", remedy)
    return _room(folder, mount)


def out_speed(path: str) -> Result:
    """Writes a temporary file of at most 64 MiB, for at most about 3 s."""
    folder = _existing(Path(path or ".").expanduser())
    try:
        if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < 2 * _MAX_BYTES:
            return not_applicable("too little room to try")
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:  # without a name: nothing stays if we are killed
            written, seconds = _write(file.fileno())
    except OSError as error:
        return failed(f"{folder}: {error.strerror}", "Give another `--out`.")
    speed = written / _MIB / max(seconds, 1e-9)
    in_memory = mount_of(folder).kind in _MEMORY
    how = " into memory: it is lost when the machine stops" if in_memory else " with fsync"
    result = Result(f"writes {speed:,.0f} MiB/s{how} ({written / _MIB:.0f} MiB in {folder})")
    if speed < _SLOW_MIB_PER_S:
        what = f"a checkpoint of 0.5 GiB would take {512 / speed:.0f} s"
        result.warn(what, "Give an `--out` on a local disk: see `df -hT`.")
    return result


def temporary_folder() -> Result:
    """Kernels are compiled there, so that programs must be loadable from it."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError:
        return failed("no temporary folder can be written", "Name one: `export TMPDIR=/path`.")
    mount = mount_of(folder)
    result = _room(folder, mount, little_gib=1.0, too_little_gib=0.1)
    if "noexec" in mount.options:
        result.warn("programs cannot be loaded from it (noexec)", "Compile elsewhere: `export TMPDIR=/path`.")
    return result


def data_folder(path: str) -> Result:
    """Whether the data can be read, and whether it is many small files on a network."""
    if not path:
        return not_applicable("give --data PATH to have it looked at")
    data = Path(path).expanduser()
    if not data.exists():
        return failed(f"there is nothing at {data}", "Give the right `--data`, or mount the disk.")
    mount = mount_of(data)
    if not data.is_file() and not data.is_dir():
        return failed(f"{data} is neither a file nor a folder", "Give the right `--data`.")
    try:
        kind, readable = ("a file", _first_byte(data)) if data.is_file() else ("a folder", _first_file(data))
    except OSError as error:
        place = error.filename or data
        return failed(f"{place} cannot be read ({error.strerror})", f"Ask for the right to read it: `ls -ld {place}`.")
    result = Result(f"{data}: {kind} on {mount}, {readable}")
    if mount.is_network and data.is_dir() and _is_tree(data):
        command = f"leoclr-fast convert {shlex.quote(str(data))} DEST --format webdataset"
        remedy = f"Convert them once, to a local disk: `{command}`."
        result.warn("many small files over a network are slow to open", remedy)
    return result


def data_set(path: str) -> Result:
    """What training would see there."""
    if not path:
        return not_applicable("give --data PATH to have it looked at")
    from dataset_tools.sources import open_source

    try:
        began = time.monotonic()
        source = open_source(path, quietly=True)
    except (ValueError, RuntimeError, OSError) as error:
        return failed(" ".join(str(error).split()), "Give a `--data` that can be read as images.")
    splits = ", ".join(f"{name} {len(split):,} images" for name, split in source.splits.items())
    classes = f"{len(source.classes):,} classes" if source.classes else "no labels"
    result = Result(f"{source.kind}: {splits}; {classes}; listed in {time.monotonic() - began:.1f} s")
    for note in source.account.notes:
        result.warn(note, "Look whether that is meant.")
    return result


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def _room(
    folder: Path, mount: Mount, *, little_gib: float = _LITTLE_ROOM_GIB, too_little_gib: float = _TOO_LITTLE_ROOM_GIB
) -> Result:
    """Free bytes and inodes, for this user."""
    room = os.statvfs(folder)
    free_gib, size_gib = room.f_bavail * room.f_frsize / _GIB, room.f_blocks * room.f_frsize / _GIB
    inodes = f", {room.f_favail:,} inodes left" if room.f_files else ""  # btrfs and some networks count none
    result = Result(f"{folder}, {mount}: {free_gib:,.1f} of {size_gib:,.1f} GiB free{inodes}")
    if free_gib < little_gib:
        remedy = f"Make room (`du -xh --max-depth 1 {folder} | sort -h`), or choose another place."
        (result.fail if free_gib < too_little_gib else result.warn)(f"{free_gib:.2f} GiB are little", remedy)
    if room.f_files and room.f_favail < _FEW_INODES:
        remedy = f"Delete small files: `df -i {folder}`."
        (result.fail if room.f_favail < 100 else result.warn)("few files can be made", remedy)
    return result


def _write(descriptor: int) -> tuple[int, float]:
    """Bytes and seconds; each block is on the disk before the next."""
    block, written, began = os.urandom(_BLOCK_BYTES), 0, time.monotonic()
    while written < _MAX_BYTES and time.monotonic() - began < _MAX_SECONDS:
        written += os.write(descriptor, block)
        os.fdatasync(descriptor)
    os.fsync(descriptor)
    return written, time.monotonic() - began


def _first_byte(file: Path) -> str:
    with open(file, "rb") as opened:
        opened.read(1)
    return f"{file.stat().st_size / _MIB:,.1f} MiB, readable"


def _first_file(folder: Path) -> str:
    """Opens the first file that is met."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        if files:
            first = Path(place) / min(files)
            _first_byte(first)
            return f"{first.relative_to(folder)} is readable"
    return "without a file in it"


def _raise(error: OSError) -> None:
    raise error


def _is_tree(folder: Path) -> bool:
    """Folders in it, as an image folder has, and not the few files of a converted data set."""
    with os.scandir(folder) as entries:
        return not (folder / "manifest.json").exists() and any(entry.is_dir() for entry in entries)

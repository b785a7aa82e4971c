"""Folders and data: room, rights, and what kind of file system they are on."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from leoclr_fast.doctor.result import Result, failed, not_applicable

_FEW_INODES = 10_000
_NETWORK = re.compile("nfsd?|lustre|gpfs|fhgfs|cifs|smb2?|ceph|v9fs|k-afs|afs|panfs|snfs|fuseblk")
"""As coreutils calls them; what is mounted by FUSE is mostly far away."""


def file_system(path: Path) -> str:
    """What a path lies on: ext2/ext3, xfs, nfs, tmpfs, …"""
    command = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def out_folder(path: str) -> Result:
    """Whether runs can be written there, and how much room there is."""
    wanted = Path(path or ".").expanduser().absolute()
    folder = next(place for place in (wanted, *wanted.parents) if place.exists())
    if not folder.is_dir():
        return failed(f"{folder} is a file", "Give another `--out`.")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"leoclr-fast")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "Give another `--out`, or ask for the right to write there (`ls -ld`, `df -h`, `quota`)."
        return failed(f"{folder} cannot be written ({error.strerror})", remedy)
    return _room(folder, little_gib=10.0, too_little_gib=1.0)


def temporary_folder() -> Result:
    """Kernels are compiled there, so that programs must be loadable from it."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError:
        return failed("no temporary folder can be written", "Name one: `export TMPDIR=/path`.")
    result = _room(folder, little_gib=1.0, too_little_gib=0.1)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        result.warn("programs cannot be loaded from it (noexec)", "Compile elsewhere: `export TMPDIR=/path`.")
    return result


def data(path: str) -> Result:
    """What training would see there, whether it can be read, and whether it is many small files on a network."""
    if not path:
        return not_applicable("give --data PATH to have it looked at")
    from dataset_tools.sources import open_source

    began = time.monotonic()
    try:
        source = open_source(path, quietly=True)
        next(iter(source.splits.values())).read(0)
    except (ValueError, RuntimeError, OSError) as error:
        return failed(" ".join(str(error).split()), "Give a `--data` that can be read as images.")
    splits = ", ".join(f"{name} {len(split):,} images" for name, split in source.splits.items())
    classes = f"{len(source.classes):,} classes" if source.classes else "no labels"
    kind = file_system(Path(path).expanduser())
    result = Result(f"{source.kind} on {kind}: {splits}; {classes}; listed in {time.monotonic() - began:.1f} s")
    for note in source.account.notes:
        result.warn(note, "Look whether that is meant.")
    if _NETWORK.fullmatch(kind) and source.kind == "image folder":
        command = f"leoclr-fast convert {shlex.quote(path)} DEST --format webdataset"
        remedy = f"Convert them once, to a local disk: `{command}`."
        result.warn("many small files over a network are slow to open", remedy)
    return result


def _room(folder: Path, *, little_gib: float, too_little_gib: float) -> Result:
    """Free bytes and inodes, for this user."""
    room = os.statvfs(folder)
    free_gib, size_gib = (blocks * room.f_frsize / 2**30 for blocks in (room.f_bavail, room.f_blocks))
    inodes = f", {room.f_favail:,} inodes left" if room.f_files else ""  # btrfs and some networks count none
    result = Result(f"{folder}, {file_system(folder)}: {free_gib:,.1f} of {size_gib:,.1f} GiB free{inodes}")
    if free_gib < little_gib:
        remedy = f"Make room (`du -xh --max-depth 1 {folder} | sort -h`), or choose another place."
        (result.fail if free_gib < too_little_gib else result.warn)(f"{free_gib:.2f} GiB are little", remedy)
    if room.f_files and room.f_favail < _FEW_INODES:
        remedy = f"Delete small files: `df -i {folder}`."
        (result.fail if room.f_favail < 100 else result.warn)("few files can be made", remedy)
    return result

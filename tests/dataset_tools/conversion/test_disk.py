"""Disks that are full, read-only or taken: nothing hangs, the message helps, and the same command continues."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.merge import merge
from dataset_tools.conversion.staging import staged
from tests.dataset_tools.conversion.trouble import (
    FORMATS,
    contents,
    images_done,
    journal_often,
    jpeg,
    mixed_files,
    options,
)
from tests.dataset_tools.made_up import write_tar

KIB = 1024


class Disk:
    """A small disk of its own, in memory."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
        if done.returncode:
            path.rmdir()
            pytest.skip(f"a disk cannot be mounted here: {done.stderr.decode(errors='replace').strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def close(self) -> None:
        for flags in ([], ["-l"]):
            if subprocess.run(["umount", *flags, self.path], capture_output=True).returncode == 0:
                break
        self.path.rmdir()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Mounts small disks (bytes → Disk)."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root and `mount`")
    mounted: list[Disk] = []

    def mount(size: int) -> Disk:
        mounted.append(Disk(tmp_path / f"disk {len(mounted)}", size))
        return mounted[-1]

    yield mount
    for disk in mounted:
        disk.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny images first, then large ones: what some of them say of the size of all is wrong."""
    files = mixed_files(200, 40)
    for number in range(400):
        data = jpeg(400, 400, number % 5, quality=100)
        files[f"train/large/{number:05}.jpg"] = data[:2] + b"\xff\xfe\x00\x0a%08d" % number + data[2:]
    return write_tar(tmp_path_factory.mktemp("source") / "images.tar", files)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for format in FORMATS:
        found[format] = tmp_path_factory.mktemp("whole") / format
        convert(source, found[format], in_order(format), workers=1)
    return found


in_order = partial(options, order="source")


def arguments(source: Path, destination: Path, format: str) -> list[Any]:
    flags = ["--format", format, "--shard-size", "128KiB", "--order", "source", "--workers", 2]
    return ["convert", source, destination, *flags]


def size_of(folder: Path) -> int:
    """What it takes on the disk."""
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def fooled() -> None:
    """For `Command`: the disk seems to have room for everything."""
    journal_often(0)()  # however slow or fast this machine is
    shutil.disk_usage = lambda _: SimpleNamespace(free=1 << 60)  # type: ignore


def test_without_room_nothing_is_written(
    disks: Any, commands: Any, source: Path, expected: dict[str, Path], format: str
) -> None:
    size = size_of(expected[format])
    disk = disks(size // 2)
    command = commands(*arguments(source, disk.path / "made", format), prepare=journal_often(0))
    assert command.wait(30) == 1
    message = re.fullmatch(
        rf"error: what is left to write takes about ([\d.]+) MiB, but {disk.path} has ([\d.]+) MiB free. Free some, or "
        "choose another destination",
        command.output.splitlines()[-1],
    )
    assert message is not None, command.output
    assert float(message[1]) * 2**20 == pytest.approx(size, rel=0.5)
    assert float(message[2]) * 2**20 == pytest.approx(size / 2, rel=0.1)
    written = list((disk.path / "made.partial").rglob("*"))
    assert sum(path.stat().st_size for path in written) == 0, written
    disk.remount(f"size={4 * size}")
    assert commands(*arguments(source, disk.path / "made", format)).wait() == 0
    assert contents(disk.path / "made") == contents(expected[format])


@pytest.mark.parametrize(
    ("format", "step"),
    [("ffcv", 112 * KIB), *(pytest.param(format, 28 * KIB, marks=pytest.mark.long) for format in FORMATS)],
)
@pytest.mark.parametrize("what", ["convert", "merge"])
def test_a_disk_that_fills_up(
    disks: Any,
    commands: Any,
    source: Path,
    expected: dict[str, Path],
    tmp_path: Path,
    what: str,
    format: str,
    step: int,
) -> None:
    """In images, rows, tables, journal, records, indices, manifest: wherever it happens to be."""
    disk = disks(1 << 20)
    whole, given = expected[format], arguments(source, disk.path / "made", format)
    if what == "merge":
        parts = [tmp_path / "first", tmp_path / "second"]
        for number, part in enumerate(parts, 1):
            convert(source, part, in_order(format, part=f"{number}/2"), workers=2)
        merge(parts, tmp_path / "whole")
        whole, given = tmp_path / "whole", ["merge", *parts, disk.path / "made"]
    size = size_of(whole)
    failed = 0
    rooms = [size // 3, *range(size - 96 * KIB, size + 288 * KIB, step)]
    for room in [*rooms, *([4096, 12288, 32 * KIB] if what == "merge" else [])]:
        disk.remount(f"size={room // 4096 * 4096}")
        for _ in range(2):  # the second time nothing was freed
            command = commands(*given, prepare=fooled)
            if command.wait(30) == 0:
                break
            assert command.code == 1, command.output  # and not killed by SIGBUS at a page that has no room
            message = f"error: the disk of {disk.path / 'made.partial'} is full (No space left on device). Free some"
            last_line = command.output.splitlines()[-1]
            allowed = f"{message} space, and give the same command again", f"error: cannot write to {disk.path}: No"
            assert last_line.startswith(allowed)
        else:
            if what == "convert":
                assert images_done(disk.path / "made") > 100
            disk.remount(f"size={4 * size}")
            last = commands(*given)
            assert last.wait() == 0, last.output
            failed += 1
        assert contents(disk.path / "made") == contents(whole), room
        assert os.listdir(disk.path) == ["made"]
        shutil.rmtree(disk.path / "made")
    assert 2 <= failed < len(rooms) + 3
    disk.remount(f"size={size // 2}")
    command = commands(*given)
    assert command.wait(30) == 1
    assert "Free some, or choose another destination" in command.output.splitlines()[-1]


@pytest.mark.parametrize("what", ["convert", "merge"])
def test_a_read_only_destination(disks: Any, source: Path, expected: dict[str, Path], what: str) -> None:
    disk = disks(1 << 20)
    disk.remount("ro")
    with pytest.raises(OSError, match=r"cannot write to .*disk 0: Read-only file system") as caught:
        run(what, source, expected["ffcv"], disk.path / "made")
    assert caught.value.errno == errno.EROFS


def run(what: str, source: Path, converted: Path, destination: Path) -> Any:
    if what == "convert":
        return convert(source, destination, in_order("ffcv"), workers=1)
    return merge([converted], destination)


@pytest.mark.parametrize("what", ["convert", "merge"])
def test_what_is_at_the_destination(source: Path, expected: dict[str, Path], tmp_path: Path, what: str) -> None:
    file, full, empty, deep = (tmp_path / name for name in ("file", "full", "empty", "not/there/yet/made"))
    file.write_text("mine")
    full.mkdir()
    (full / "mine").write_text("mine")
    empty.mkdir()
    for taken in (file, full):
        with pytest.raises(FileExistsError, match=f"{taken} is there already. Give another destination"):
            run(what, source, expected["ffcv"], taken)
        assert not taken.with_name(taken.name + ".partial").exists()
    assert file.read_text() == (full / "mine").read_text() == "mine"
    with pytest.raises(OSError, match=r"cannot write to .*file"):
        run(what, source, expected["ffcv"], file / "below")
    for allowed in (empty, deep):
        run(what, source, expected["ffcv"], allowed)
        images = {name: sha for name, sha in contents(allowed).items() if name.endswith(".beton")}
        assert images.items() <= contents(expected["ffcv"]).items()
        assert len(images) == 2


def test_a_lock_on_a_folder_that_was_removed_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "made.partial"
    with staged(tmp_path / "made", {}) as staging:
        assert folder.is_dir()
        with pytest.raises(RuntimeError, match="another process is converting"), staged(tmp_path / "made", {}):
            pass
        assert (folder / "lock").exists()
        staging.save()
    assert (folder / "journal.json").exists()
    lock = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free again
    os.close(lock)
    shutil.rmtree(folder)
    with staged(tmp_path / "made", {}):
        pass
    assert not folder.exists()

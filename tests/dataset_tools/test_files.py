"""Files are written whole and nowhere else, and nothing but files is read."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from dataset_tools.files import NoRegularFileError, open_own, open_regular, read_file, write_file, written


def test_a_file_is_replaced_at_once_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120)
    write_file(path, "first")
    with pytest.raises(TypeError), written(path) as file:
        file.write("second")  # type: ignore[arg-type]
    assert path.read_text() == "first"
    write_file(path, b"third")
    assert path.read_text() == "third"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with written(path) as slow:
        slow.write(b"slow")
        threads = [threading.Thread(target=write_file, args=(path, "quick" * 10_000)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert path.read_text() == "quick" * 10_000
    assert path.read_text() == "slow"


@pytest.mark.parametrize("mode", ["wb", "r+b", "a+b"])
def test_nothing_is_written_through_a_link(tmp_path: Path, mode: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("precious")
    path.symlink_to(victim)
    if mode == "wb":
        with open_own(path, mode) as file:
            file.write(b"ours")
        assert path.read_bytes() == b"ours"
        path.unlink()
        path.symlink_to(victim)
    else:
        with pytest.raises(OSError, match=r"lock is a symbolic link, and files of this name are not written through"):
            open_own(path, mode)
    write_file(path, "ours")
    assert path.read_text() == "ours"
    assert not path.is_symlink()
    assert victim.read_text() == "precious"


def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, target in (("dangling", "nowhere"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(NoRegularFileError, match="a link that leads nowhere"):
            read_file(tmp_path / name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for name, kind in (("fifo", "a named pipe"), ("socket", "a socket"), ("/dev/null", "a device")):
        with pytest.raises(NoRegularFileError, match=f"{name} is {kind}, and not a file"):
            open_regular(tmp_path / name)
        with pytest.raises(OSError, match=f"{name} is {kind}, which no file can replace"):
            write_file(tmp_path / name, "")
    with pytest.raises(FileNotFoundError, match=r"directory: '[^']*/nowhere/x'$"):
        write_file(tmp_path / "nowhere" / "x", "")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path / "folder")
    with pytest.raises(OSError, match="folder is a folder, which no file can replace"):
        write_file(tmp_path / "folder", "")
    listening.close()

"""What the tests of dataset_tools share: made-up files in folders and tars, and what is read of them."""

from __future__ import annotations

import io
import multiprocessing
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset_tools.packed_names import PackedNames
from dataset_tools.sources import ImageSource, Split


def write_files(root: Path, files: Mapping[str, bytes] | str) -> Path:
    """Path → bytes; a path that ends in "/" is an empty folder. In a text: paths, each the content of its file."""
    if isinstance(files, str):
        files = {name: name.encode() for name in files.split()}
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def write_tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options: Any) -> Path:
    """As `tar_bytes`. Returns `path`."""
    path.write_bytes(tar_bytes(files, **options))
    return path


def tar_bytes(
    files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: str = "w", format: int = tarfile.PAX_FORMAT
) -> bytes:
    """Path → bytes, in the order given. `mode` and `format` are tarfile's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for name, data in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class NamedSplit(Split):
    """Names and labels; each image is its name."""

    def __init__(
        self, names: Sequence[str], labels: Sequence[int], classes: tuple[str, ...] = (), name: str = "train"
    ) -> None:
        self.name, self.names, self.classes = name, PackedNames(names), classes
        self.labels = np.array(labels, dtype=np.int64)

    def read(self, index: int) -> bytes:
        return self.names[index].encode()


def read_all(split: Split) -> list[bytes]:
    return [split.read(index) for index in range(len(split))]


def everything(source: ImageSource) -> dict[str, list[tuple[str, int, bytes]]]:
    """Split → (name, label, bytes) of each sample."""
    return {
        name: list(zip(split.names, split.labels.tolist(), read_all(split), strict=True))
        for name, split in source.splits.items()
    }


def decode_png(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image)


def assert_reads_in_processes(split: Split, method: str) -> None:
    """By fork or spawn; a subset of it, too."""
    expected = read_all(split)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [split, split.subset([3, 1])]) == [expected, [expected[3], expected[1]]]


def assert_unpacked_once(source: Path, cache: Path, num_images: int) -> None:
    """By several processes that start at once."""
    code = (
        "import sys, logging; logging.basicConfig(level=20, stream=sys.stdout)\n"
        "from dataset_tools.sources import open_source\n"
        "split = open_source(sys.argv[1]).splits['train']; print(len(split), split.read(len(split) - 1)[:2])"
    )
    command = [sys.executable, "-c", code, str(source)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [run.communicate()[0] for run in runs]
    assert {output.splitlines()[-1] for output in outputs} == {rf"{num_images} b'\xff\xd8'"}
    assert sum("unpacking" in output for output in outputs) == 1
    assert len([path for path in cache.iterdir() if path.suffix in (".tar", ".images")]) == 1

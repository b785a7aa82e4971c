"""Memory at 10⁵ and 10⁶ samples, measured in processes of their own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.formats.tar_shards import member_header

MAX_BYTES_PER_IMAGE = 200
MEASURED = """
import json, resource, sys
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
summary = convert(sys.argv[1], sys.argv[2], ConvertOptions(format=sys.argv[3], **json.loads(sys.argv[4])), workers=2)
peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([summary["samples"], *peaks]))
"""


def write_small_images(path: Path, count: int) -> None:
    """A tar of `count` 1 x 1 JPEGs in 1,000 classes, with names as long as ImageNet's."""
    images = []
    for gray in range(256):
        encoded = io.BytesIO()
        Image.new("L", (1, 1), gray).save(encoded, "JPEG", optimize=True)
        images.append(encoded.getvalue())
    with open(path, "wb") as file:
        for index in range(count):
            data = images[index % 256]
            name = f"train/n{index % 1000:08}/n{index % 1000:08}_{index:08}.JPEG"
            file.write(member_header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def peak_bytes(tar: Path, out: Path, count: int, format: str, options: dict[str, str]) -> np.ndarray:
    """Of the converting process and of its largest worker."""
    arguments = [sys.executable, "-c", MEASURED, str(tar), str(out), format, json.dumps(options)]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=1800, check=True)
    samples, *peaks = json.loads(finished.stdout.splitlines()[-1])
    assert samples == count
    return np.array(peaks)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("format", "options"), [("ffcv", {}), ("ffcv", {"order": "shuffled"}), ("webdataset", {"shard_size": "64MiB"})]
)
def test_memory_grows_by_at_most_200_bytes_an_image(tmp_path: Path, format: str, options: dict[str, str]) -> None:
    counts = (100_000, 1_000_000)
    peaks = []
    for count in counts:
        tar = tmp_path / f"{count}.tar"
        write_small_images(tar, count)
        peaks.append(peak_bytes(tar, tmp_path / f"out-{count}", count, format, options))
        tar.unlink()
    growth = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    print(f"{format} {options}: {growth[0]:.0f} bytes an image in the converting process, {growth[1]:.0f} in a worker")
    assert (growth <= MAX_BYTES_PER_IMAGE).all(), growth

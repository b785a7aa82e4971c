"""The embedded default data: an ImageFolder of labelled JPEGs, drawn on the spot.

Ten classes, each one outline with one surface: a striped disc, a checkered square … Everything else is
random: colours, place, size, rotation, how many there are, background and clutter. So an untrained network
says little about the class, and a crop may cut the object off.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from dataset_tools.demo_image import CLASS_NAMES, draw_jpeg
from dataset_tools.sources.split import SPLIT_ORDER

RECORD = "demo.json"
VERSION = 4
"""The version of the drawings goes up when the pictures change."""


def write_demo_data(
    folder: str | os.PathLike[str], *, num_train: int = 3000, num_val: int = 600, seed: int = 0
) -> Path:
    """Writes `train/CLASS/NNNN.jpg` and `val/CLASS/NNNN.jpg`; returns the folder. Takes about 10 s.

    Each image depends on (seed, split, index) alone, whatever the numbers. The folder appears whole or not at
    all; one that holds the same data already is left as it is. Raises FileExistsError if it holds anything
    else, ValueError for a negative seed, no train image or a negative number.
    """
    if num_train < 1 or num_val < 0 or seed < 0:
        raise ValueError(
            f"the demo data needs num_train >= 1, num_val >= 0 and seed >= 0, not {num_train}, {num_val} and {seed}"
        )
    target = Path(folder)
    record = {"version": VERSION, "num_train": num_train, "num_val": num_val, "seed": seed}
    if _holds(target, record):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        partial.chmod(0o755)
        counts = {"train": num_train, "val": num_val} if num_val else {"train": num_train}
        for split, name in product(counts, CLASS_NAMES):
            (partial / split / name).mkdir(parents=True)
        jobs = [(split, index) for split, count in counts.items() for index in range(count)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda job: _write_image(partial, seed, *job), jobs):
                pass  # raises what a thread raised
        (partial / RECORD).write_text(json.dumps(record) + "\n")
        try:
            partial.rename(target)  # also replaces an empty folder
        except OSError:
            if not _holds(target, record):  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_image(root: Path, seed: int, split: str, index: int) -> None:
    label, number = index % len(CLASS_NAMES), index // len(CLASS_NAMES)
    path = root / split / CLASS_NAMES[label] / f"{number:04}.jpg"
    path.write_bytes(draw_jpeg(label, key=(seed, SPLIT_ORDER.index(split), index)))


def _holds(folder: Path, record: dict[str, int]) -> bool:
    """Whether `folder` is there and complete. Raises FileExistsError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        if json.loads((folder / RECORD).read_text()) == record:
            return True
    except (OSError, ValueError):
        pass
    raise FileExistsError(
        f"{folder} is there already and does not hold this demo data ({json.dumps(record)}); "
        "give another folder, or delete it."
    )

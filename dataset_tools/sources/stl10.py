"""STL-10 (Coates, Ng and Lee, 2011): binary files of 96 × 96 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset_tools.sources.raw_pixels import RecordSplit, read_lines, read_records, remap, require_files
from dataset_tools.sources.split import UNLABELED, ImageSource, Split

SIDE = 96
PIXEL_BYTES = 3 * SIDE * SIDE


def open_stl10(folder: Path) -> ImageSource | None:
    """STL-10's splits train, test and, if its file is there, unlabeled, in the stored order.

    None if `folder` holds no train_X.bin. Raises FileNotFoundError if files are missing, ValueError if one is
    damaged.
    """
    if not (folder / "train_X.bin").is_file():
        return None
    require_files(folder, ["train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt"], "STL-10")
    stored_classes = read_lines(folder / "class_names.txt")
    classes = tuple(sorted(stored_classes))
    splits: dict[str, Split] = {}
    for split in ("train", "test", "unlabeled"):
        images = folder / f"{split}_X.bin"
        if split == "unlabeled" and not images.is_file():
            continue
        count = len(read_records(images, PIXEL_BYTES))
        if split == "unlabeled":
            labels = np.full(count, UNLABELED, dtype=np.int64)
        else:
            stored = np.fromfile(folder / f"{split}_y.bin", dtype=np.uint8).astype(np.int64) - 1
            if len(stored) != count:
                raise ValueError(f"{folder} is damaged: {count} {split} images but {len(stored)} labels")
            labels, _ = remap(stored, stored_classes, folder)
        splits[split] = RecordSplit(split, labels, classes, files=[images], header=0, side=SIDE, column_major=True)
    return ImageSource(path=folder, kind="STL-10", splits=splits, classes=classes)

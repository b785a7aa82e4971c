from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools import demo_data
from dataset_tools.demo_data import write_demo_data
from dataset_tools.demo_image import CLASS_NAMES, draw_jpeg
from dataset_tools.demo_shapes import CLASSES
from dataset_tools.sources import open_source


def test_is_an_image_folder_of_ten_balanced_classes(tmp_path: Path) -> None:
    folder = write_demo_data(tmp_path / "new" / "demo", num_train=45, num_val=20)
    assert folder == tmp_path / "new" / "demo"
    source = open_source(folder)
    assert source.classes == CLASS_NAMES == tuple(sorted(CLASSES))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 45, "val": 20}
    assert np.bincount(source.splits["train"].labels).tolist() == [5] * 5 + [4] * 5
    assert source.splits["val"].names[1] == "val/bricked_heart/0001.jpg"
    sizes = set()
    for split in source.splits.values():
        for index in range(len(split)):
            image = Image.open(io.BytesIO(split.read(index)))
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert min(image.size) >= 64
            assert max(image.size) <= 128
            assert max(image.size) / min(image.size) <= 1.35
            sizes.add(image.size)
    assert len(sizes) > 40
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    assert list((tmp_path / "new").iterdir()) == [folder]


def test_an_image_depends_on_seed_split_and_index_only(tmp_path: Path) -> None:
    small = open_source(write_demo_data(tmp_path / "small", num_train=12, num_val=10, seed=3)).splits
    large = open_source(write_demo_data(tmp_path / "large", num_train=31, num_val=11, seed=3)).splits
    for name in ("train", "val"):
        images = {path: large[name].read(index) for index, path in enumerate(large[name].names)}
        for index, path in enumerate(small[name].names):
            assert images[path] == small[name].read(index)
    other = open_source(write_demo_data(tmp_path / "other", num_train=12, num_val=10, seed=4)).splits
    everything = [split.read(index) for splits in (small, other) for split in splits.values() for index in range(10)]
    assert len(set(everything)) == 40
    assert small["train"].read(0) == draw_jpeg(0, key=(3, 0, 0))


def test_the_same_data_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_demo_data(tmp_path / "demo", num_train=10, num_val=0)
    assert list(open_source(folder).splits) == ["train"]
    monkeypatch.setattr(demo_data, "draw_jpeg", lambda *_, **__: pytest.fail("drawn again"))
    assert write_demo_data(str(folder), num_train=10, num_val=0) == folder
    with pytest.raises(FileExistsError, match=r"does not hold this demo data \(.*\"num_train\": 11"):
        write_demo_data(folder, num_train=11, num_val=0)
    record = folder / "demo.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"version": 0}))
    with pytest.raises(FileExistsError, match="give another folder, or delete it"):
        write_demo_data(folder, num_train=10, num_val=0)


def test_other_folders_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="mine is there already"):
        write_demo_data(tmp_path / "mine", num_train=10, num_val=0)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="file is there already"):
        write_demo_data(tmp_path / "file", num_train=10, num_val=0)
    (tmp_path / "empty").mkdir()
    assert write_demo_data(tmp_path / "empty", num_train=10, num_val=0) == tmp_path / "empty"
    assert len(open_source(tmp_path / "empty").splits["train"]) == 10


def test_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def fail_at_last(label: int, key: tuple[int, ...]) -> bytes:
        drawn.append(key)
        if key[-1] == 9:
            raise OSError("disk full")
        return b""

    monkeypatch.setattr(demo_data, "draw_jpeg", fail_at_last)
    with pytest.raises(OSError, match="disk full"):
        write_demo_data(tmp_path / "demo", num_train=10, num_val=0)
    assert len(drawn) > 1
    assert list(tmp_path.iterdir()) == []


def test_classes_are_not_told_by_their_mean_color() -> None:
    """A nearest-mean classifier on the average colour stays near chance."""
    images = [(index % 10, draw_jpeg(index % 10, key=(0, 0, index))) for index in range(400)]
    colors = np.array([np.asarray(Image.open(io.BytesIO(data))).mean(axis=(0, 1)) for _, data in images])
    labels = np.array([label for label, _ in images])
    means = np.array([colors[:200][labels[:200] == label].mean(axis=0) for label in range(10)])
    guesses = np.linalg.norm(colors[200:, None] - means, axis=2).argmin(axis=1)
    assert (guesses == labels[200:]).mean() < 0.22

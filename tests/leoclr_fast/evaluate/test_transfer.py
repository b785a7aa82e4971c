"""Transfer: the data as torchvision lays it out, with torchvision as the oracle; the grid, the metric, the schedule."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import OxfordIIITPet, StanfordCars

from leoclr_fast.evaluate.transfer import open_transfer_data
from tests.leoclr_fast.evaluate.conftest import Commands
from tests.leoclr_fast.evaluated import kept_results

SMALL = ["--steps=4", "--batch-size=8", "--loader=resident", "--image-size=8"]


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:9, :11]
    pixels = np.stack([(x * number) % 256, (y * number) % 256, (x + y + number) % 256], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 breeds, three images of each in trainval, one in test."""
    root = tmp_path_factory.mktemp("pets") / "data"
    folder = root / "oxford-iiit-pet"
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for breed in range(37):
        name = f"breed_{(breed * 5) % 37:02}"
        for number, split in enumerate(("trainval", "trainval", "trainval", "test")):
            write_image(folder / "images" / f"{name}_{number}.jpg", breed * 7 + number)
            lines[split].append(f"{name}_{number} {breed + 1} {breed % 2 + 1} 1\n")
    for split, listed in lines.items():
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.txt").write_text("".join(listed))
    return root


def write_cars(root: Path) -> Path:
    """196 classes, two train images and a test image of each."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    for split, per_class, table_file in (
        ("train", 2, folder / "devkit" / "cars_train_annos.mat"),
        ("test", 1, folder / "cars_test_annos_withlabels.mat"),
    ):
        rows = [(f"{number:05}.jpg", number % 196 + 1) for number in range(196 * per_class)]
        for name, number in rows:
            write_image(folder / f"cars_{split}" / name, number)
        table = np.zeros(len(rows), dtype=[("class", "O"), ("fname", "O")])
        for place, (name, number) in enumerate(rows):
            table[place] = (number, name)
        savemat(table_file, {"annotations": table})
    names = np.array([f"Car {number}" for number in range(196)], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    return root


def write_birdsnap(folder: Path) -> Path:
    """500 species with two images in train and one in test; ten of train and two of test are gone."""
    lines = ["url\tmd5\tpath\tspecies_id\tbb_x1"]
    test = ["path"]
    species = ["id\tcommon\tscientific\tdir"]
    for number in range(500):
        species.append(f"{number + 1}\tBird {number}\tAvis\tBird_{499 - number:03}")
        for image in range(3):
            name = f"Bird_{499 - number:03}/{image}.jpg"
            lines.append(f"http://nowhere/{name}\t0\t{name}\t{number + 1}\t3")
            test += [name] * (image == 2)
            if number >= {0: 10, 1: 0, 2: 2}[image]:
                path = folder / "download" / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"an image")
    for name, content in (("images.txt", lines), ("test_images.txt", test), ("species.txt", species)):
        (folder / name).write_text("\n".join(content) + "\n")
    return folder


def test_pets_are_what_torchvision_reads(pets: Path) -> None:
    data = open_transfer_data("pets", pets)
    for split, published in ((data.train, "trainval"), (data.val, "test")):
        oracle = OxfordIIITPet(str(pets), split=published)
        assert split.labels.tolist() == [oracle[index][1] for index in range(len(oracle))]
        assert list(split.classes) == oracle.classes
        pixels = np.asarray(Image.open(pets / "oxford-iiit-pet" / split.names[5]).convert("RGB"))
        assert np.array_equal(np.asarray(oracle[5][0]), pixels)
        assert split.read(5) == (pets / "oxford-iiit-pet" / split.names[5]).read_bytes()
    assert open_transfer_data("pets", pets / "oxford-iiit-pet").fingerprint == data.fingerprint
    assert data.note == "train has 111 images, and 3,680 as published. test has 37 images, and 3,669 as published."


def test_both_cifars_may_lie_in_one_folder(tmp_path: Path) -> None:
    """As in torchvision's root."""
    rng = np.random.default_rng(0)
    for folder, classes, key, names in (
        ("cifar-10-batches-py", 10, "labels", [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]),
        ("cifar-100-python", 100, "fine_labels", ["train", "test"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            batch = {"data": rng.integers(0, 256, (classes, 3072), dtype=np.uint8), key: list(range(classes))[::-1]}
            (tmp_path / folder / name).write_bytes(pickle.dumps(batch))
        meta = {"label_names" if classes == 10 else "fine_label_names": [f"c{n:02}" for n in range(classes)]}
        (tmp_path / folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps(meta))
    ten, hundred = (open_transfer_data(name, tmp_path) for name in ("cifar10", "cifar100"))
    assert (len(ten.train), len(ten.val), len(hundred.train), len(hundred.val)) == (50, 10, 100, 100)
    assert hundred.val.labels.tolist() == list(range(100))[::-1]
    assert "train has 50 images, and 50,000 as published." in ten.note


def test_cars_are_what_torchvision_reads(tmp_path: Path) -> None:
    root = write_cars(tmp_path)
    data = open_transfer_data("cars", root)
    for split, published in ((data.train, "train"), (data.val, "test")):
        oracle = StanfordCars(str(root), split=published)
        assert split.labels.tolist() == [oracle[index][1] for index in range(len(oracle))]
        assert list(split.classes) == oracle.classes
        assert split.names[7] == f"cars_{published}/00007.jpg"
    assert len(data.train) == 392
    listed = root / "stanford_cars" / "cars_test_annos_withlabels.mat"
    savemat(listed, {"annotations": np.zeros(1 << 24)}, do_compression=True)
    with pytest.raises(ValueError, match=r"is not whole \(cars_test_annos_withlabels.mat is damaged: more than 64 MiB"):
        open_transfer_data("cars", root)
    listed.unlink()
    with pytest.raises(ValueError, match=r"is not whole .* expected is stanford_cars/ with devkit/"):
        open_transfer_data("cars", root)
    os.mkfifo(listed)
    with pytest.raises(ValueError, match=r"is not whole .*withlabels.mat is a named pipe, and not a file"):
        open_transfer_data("cars", root)
    listed.unlink()
    (root / "stanford_cars" / "cars_train" / "00003.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 392 train images of Stanford Cars are not in .*cars_train/00003"):
        open_transfer_data("cars", root)


def test_birdsnap_goes_without_what_is_gone(tmp_path: Path) -> None:
    data = open_transfer_data("birdsnap", write_birdsnap(tmp_path / "birds"))
    assert (len(data.train), len(data.val)) == (990, 498)
    assert "12 images of its lists are not there: train Bird_490/0.jpg, " in data.note
    assert not set(data.train.names) & set(data.val.names)
    names = {data.train.classes[label] for label in data.train.labels}
    assert len(names) == 500
    assert all(
        data.train.classes[label] in name for name, label in zip(data.train.names, data.train.labels, strict=True)
    )
    assert data.note.endswith("test has no image of 2 of the 500 classes.")
    (tmp_path / "birds" / "species.txt").write_text("id\tcommon\n1\tBird\n")
    with pytest.raises(ValueError, match=r"species.txt is damaged: its first line has no column 'dir'"):
        open_transfer_data("birdsnap", tmp_path / "birds")
    (tmp_path / "birds" / "species.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"it lacks species.txt"):
        open_transfer_data("birdsnap", tmp_path / "birds")


def test_transfer(evaluate: Commands, run: Path, pets: Path) -> None:
    """The grid is chosen by the mean per class of a tenth of train; weight decay is divided by the learning rate."""
    line = ["transfer", run, "pets", "--data", pets, *SMALL, "--lr-grid", 0.01, 0.5, "--weight-decay-grid", 0, 0.001]
    paused = evaluate(*line, "--max-steps=6")
    assert (paused["complete"], paused["step"], paused["training"]) == (False, 6, "trial-002")
    assert kept_results(run) == []
    found = evaluate(*line)
    assert [(entry["lr"], entry["weight_decay"]) for entry in found["grid"]] == [
        (0.01, 0),
        (0.01, pytest.approx(0.1)),
        (0.5, 0),
        (0.5, pytest.approx(0.002)),
    ]
    scores = [entry["holdout_mean_per_class"] for entry in found["grid"]]
    best = found["grid"][scores.index(max(scores))]
    assert (found["lr"], found["weight_decay"]) == (best["lr"], best["weight_decay"])
    assert (found["metric"], found["dataset"], found["steps"]) == ("mean_per_class", "pets", 4)
    assert (found["train_images"], found["holdout_images"], found["val_images"]) == (111, 11, 37)
    assert found["mean_per_class"] == pytest.approx(found["top1"])  # one test image of each class
    (kept,) = kept_results(run)
    assert {key: kept[key] for key in found} == found
    (folder,) = (run / "evaluations").iterdir()
    trials = [json.loads((folder / f"trial-{number:03}.json").read_text()) for number in (1, 2, 3, 4)]
    assert trials == found["grid"]


def test_other_data_is_refused(evaluate: Commands, tiny_run: Path, tiny_data: Path, pets: Path, tmp_path: Path) -> None:
    def message(dataset: str, data: Path, *flags: object) -> str:
        return evaluate.refused("transfer", tiny_run, dataset, "--data", data, *SMALL, *flags)

    assert "there is no transfer data set 'pet'. Did you mean pets? Allowed: cifar10," in message("pet", pets)
    assert "there is nothing at" in message("cars", tmp_path / "nowhere")
    assert "has 3 classes, but CIFAR-10 has 10" in message("cifar10", tiny_data)
    (tmp_path / "birds" / "images").mkdir(parents=True)
    (tmp_path / "birds" / "images.txt").write_text("url\tmd5\tpath\tspecies_id\n")
    assert "it lacks species.txt, test_images.txt" in message("birdsnap", tmp_path / "birds")
    assert "steps 0 is not allowed" in message("pets", pets, "--steps", 0)

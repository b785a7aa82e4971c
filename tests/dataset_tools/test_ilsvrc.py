from __future__ import annotations

import gzip
import io
import os
import pickle
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.sources import ImageSource, open_source
from tests.dataset_tools.made_up import tar_bytes, write_files

WNIDS = ("n01440764", "n02012849", "n03126707", "n07749582")
IDS = {"n03126707": 1, "n01440764": 2, "n07749582": 3, "n02012849": 4}
"""ILSVRC ids, in another order than the WNIDs."""
TRUTH = ("n07749582", "n01440764", "n07749582", "n03126707", "n02012849")
"""The WNIDs of the validation images 1 … 5."""
LABELS = [3, 0, 3, 2, 1]
TRAIN = {wnid: [f"{wnid}_{number}.JPEG" for number in (9, 10, 100)] for wnid in WNIDS}
DEVKIT = "ILSVRC2012_devkit_t12"


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def inner_tar(wnid: str) -> bytes:
    return tar_bytes((name, name.encode() * 50) for name in reversed(TRAIN[wnid]))


def write_train(folder: Path, wnids: Iterable[str] = ("n03126707", "n01440764", "n07749582", "n02012849")) -> Path:
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_bytes((f"{wnid}.tar", inner_tar(wnid)) for wnid in wnids))
    return path


def write_val(folder: Path, numbers: Iterable[int] = (2, 1, 3, 5, 4), prefix: str = "") -> Path:
    path = folder / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar_bytes((prefix + val_name(n), f"val {n}".encode()) for n in numbers))
    return path


def write_test(folder: Path, prefix: str, name: str = "ILSVRC2012_img_test_v10102019.tar") -> Path:
    path = folder / name
    names = [f"{prefix}ILSVRC2012_test_{number:08}.JPEG" for number in (2, 1)]
    path.write_bytes(tar_bytes((image, image[-13:].encode()) for image in names))
    return path


def devkit_files(truth: Iterable[object] | None = None) -> dict[str, bytes]:
    """A devkit's files as published: synsets in the order of their ids, an inner one with children at the end."""
    savemat = pytest.importorskip("scipy.io").savemat
    rows = [(id_, wnid, f"words of {wnid}", "gloss", 0, 0, 0, 1300) for wnid, id_ in IDS.items()]
    rows.append((5, "n00001740", "entity", "gloss", 2, [1, 2], 3, 0))
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "height", "num_train_images"]
    synsets = np.array([*sorted(rows)], dtype=[(field, object) for field in fields]).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    ids = [IDS[wnid] for wnid in TRUTH] if truth is None else truth
    lines = "".join(f"{id_}\n" for id_ in ids)
    return {
        f"{DEVKIT}/readme.txt": b"read me",
        f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
        f"{DEVKIT}/data/meta.mat": meta.getvalue(),
    }


def write_devkit(folder: Path, files: Mapping[str, bytes] | None = None) -> Path:
    path = folder / f"{DEVKIT}.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes((files or devkit_files()).items())))
    return path


def write_solution(folder: Path, truth: Mapping[int, str] | None = None, mapping: Iterable[str] | None = WNIDS) -> None:
    truth = dict(enumerate(TRUTH, start=1)) if truth is None else truth
    rows = [f"{val_name(number)[:-5]},{wnid} 85 1 499 272 \n" for number, wnid in sorted(truth.items(), reverse=True)]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
    if mapping is not None:
        lines = [f"{wnid} words, more words\n" for wnid in mapping]
        (folder / "LOC_synset_mapping.txt").write_text("".join(lines))


def write_kaggle(top: Path, splits: str = "train val test") -> Path:
    tree = top / "ILSVRC" / "Data" / "CLS-LOC"
    files = {f"train/{wnid}/{name}": name.encode() for wnid, names in TRAIN.items() for name in names}
    files |= {f"val/{val_name(number)}": f"val {number}".encode() for number in range(1, 6)}
    files |= {f"test/ILSVRC2012_test_{number:08}.JPEG": b"?" for number in (1, 2)}
    write_files(tree, {name: data for name, data in files.items() if name.split("/")[0] in splits.split()})
    write_files(top / "ILSVRC", {"Annotations/CLS-LOC/val/x.xml": b"", "ImageSets/CLS-LOC/val.txt": b""})
    return tree


def check_val(source: ImageSource, classes: tuple[str, ...] = WNIDS) -> None:
    val = source.splits["val"]
    assert val.classes == source.classes == classes
    assert list(val.names) == [f"val/{val_name(number)}" for number in range(1, 6)]
    assert val.labels.tolist() == [classes.index(wnid) for wnid in TRUTH]
    assert [val.read(index) for index in range(5)] == [f"val {number}".encode() for number in range(1, 6)]


def test_train_tar_equals_the_unpacked_tree_in_torchvision(tmp_path: Path) -> None:
    image_folder = pytest.importorskip("torchvision.datasets").ImageFolder
    path = write_train(tmp_path)
    tree = tmp_path / "tree" / "train"
    with tarfile.open(path) as outer:
        for member in outer:
            inner = outer.extractfile(member)
            assert inner is not None
            (tree / member.name[:-4]).mkdir(parents=True)
            with tarfile.open(fileobj=inner) as archive:
                archive.extractall(tree / member.name[:-4], filter="data")

    source, oracle = open_source(path), image_folder(tree)
    train = source.splits["train"]
    assert (source.kind, list(source.splits), source.path) == ("tar of tars", ["train"], path)
    assert {wnid: label for label, wnid in enumerate(source.classes)} == oracle.class_to_idx
    assert [(str(tree.parent / name), label) for name, label in zip(train.names, train.labels, strict=True)] == (
        oracle.samples
    )
    assert train.names[4] == "train/n02012849/n02012849_100.JPEG"
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert train.labels.dtype == np.int64
    for index, (file, _) in enumerate(oracle.samples):
        assert train.read(index) == Path(file).read_bytes()


def test_names_with_folders_and_long_names_inside(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    inner = tar_bytes([("./in/" + "y" * 200 + ".jpg", b"long"), ("a.png", b"short"), ("notes.txt", b"")])
    path.write_bytes(tar_bytes([("./top/B.tar", inner), ("top/._B.tar", b"hidden"), ("A.tar", inner)]))
    train = open_source(path).splits["train"]
    assert list(train.names) == [f"train/{c}/{name}" for c in "AB" for name in ("a.png", f"in/{'y' * 200}.jpg")]
    assert [train.read(index) for index in range(4)] == [b"short", b"long"] * 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("n1.tar", b"abc" * 700)],
            r"in its member 'n1.tar': it is damaged or cut short: a damaged header at byte",
        ),
        ([("n1.tar", b"")], r"in its member 'n1.tar': it is damaged or cut short: the end of the file without"),
        ([("n1.tar", tar_bytes([]))], r"its member 'n1.tar' holds no image"),
        ([("n1.tar", inner_tar(WNIDS[0])[:3000])], r"in its member 'n1.tar': it is damaged or cut short"),
        ([("n1.tar", inner_tar(WNIDS[0])[:1536])], r".* the end of the file without the end-of-archive mark at byte"),
        ([("n1.tar", tar_bytes([("/x.jpg", b"")]))], r"in its member 'n1.tar': its member '/x.jpg' has an absolute"),
        (
            [("n1.tar", tar_bytes([("a/../x.jpg", b"")]))],
            r"in its member 'n1.tar': its member 'a/../x.jpg' has an absolute or `..` path",
        ),
        ([("../n1.tar", inner_tar(WNIDS[0]))], r"its member '../n1.tar' has an absolute or `..` path"),
        ([("n1.tar", tar_bytes([("x.jpg", b"1")] * 2))], r"it holds 'train/n1/x.jpg' more than once"),
        ([("n1.tar", inner_tar(WNIDS[0]))] * 2, r"it holds 'n1.tar' more than once"),
        ([("a/n1.tar", inner_tar(WNIDS[0])), ("b/n1.tar", inner_tar(WNIDS[1]))], r"it holds 'n1.tar' more than once"),
    ],
)
def test_unusable_inner_tars(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([("n0.tar", inner_tar(WNIDS[2])), *members, ("n9.tar", inner_tar(WNIDS[3]))]))
    with pytest.raises(ValueError, match=rf"the archive {path} cannot be used: {message}"):
        open_source(path)


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("prefix", ["", "./", "val/"])
def test_val_with_the_labels_of_the_devkit(tmp_path: Path, unpacked: bool, prefix: str) -> None:
    path = write_val(tmp_path, prefix=prefix)
    if unpacked:
        write_files(tmp_path, devkit_files())
    else:
        write_devkit(tmp_path)
    source = open_source(path)
    assert (source.kind, list(source.splits), source.path) == ("ILSVRC2012", ["val"], path)
    check_val(source)
    assert source.splits["val"].labels.tolist() == LABELS
    assert pickle.loads(pickle.dumps(source.splits["val"])).read(4) == b"val 5"


@pytest.mark.parametrize("labels", ["devkit", "solution", "solution without mapping"])
def test_a_folder_of_tars_is_one_source(tmp_path: Path, labels: str) -> None:
    train = open_source(write_train(tmp_path))
    write_val(tmp_path)
    write_test(tmp_path, "test/")
    if labels == "devkit":
        write_devkit(tmp_path)
    else:
        write_solution(tmp_path, mapping=None if "without" in labels else WNIDS)
    source = open_source(tmp_path)
    assert (source.kind, list(source.splits)) == ("ILSVRC2012", ["train", "val", "test"])
    check_val(source)
    assert source.splits["train"].labels.tolist() == train.splits["train"].labels.tolist()
    assert source.splits["train"].names == train.splits["train"].names
    test = source.splits["test"]
    assert list(test.names) == [f"test/ILSVRC2012_test_{number:08}.JPEG" for number in (1, 2)]
    assert (test.labels.tolist(), test.classes, test.read(1)) == ([-1, -1], WNIDS, b"00000002.JPEG")


def test_an_unpacked_tree_beside_the_tars_is_what_is_opened(tmp_path: Path, caplog) -> None:
    write_train(tmp_path)
    (tmp_path / "val").mkdir()
    assert open_source(tmp_path).kind == "ILSVRC2012"
    write_files(tmp_path, {"train/n01440764/1.JPEG": b"1"})
    source = open_source(tmp_path)
    assert (source.kind, len(source.splits["train"])) == ("image folder", 1)
    assert "left out, being beside the unpacked train: ILSVRC2012_img_train.tar" in caplog.text


def test_a_train_tar_must_be_labelled(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes([("1.JPEG", b"1")]))
    with pytest.raises(ValueError, match=r"img_train.tar must hold one tar for each class"):
        open_source(tmp_path)


def test_val_must_know_the_classes_of_train(tmp_path: Path) -> None:
    write_train(tmp_path, wnids=WNIDS[:3])
    write_val(tmp_path)
    write_devkit(tmp_path)
    with pytest.raises(ValueError, match=r"val has 1 class\(es\) that train lacks: n07749582"):
        open_source(tmp_path)


def test_no_labels_beside_val(tmp_path: Path) -> None:
    path = write_val(tmp_path)
    message = (
        rf"{path} has validation images, but their labels are missing. Put ILSVRC2012_devkit_t12.tar.gz .*"
        rf"or Kaggle's LOC_val_solution.csv \(with LOC_synset_mapping.txt\) into {tmp_path}"
    )
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=message):
            open_source(place)


@pytest.mark.parametrize("labels", ["devkit", "solution"])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, 2, 4, 5), r"holds 4 validation images, but .* has 5 labels: images that are missing: .*_00000003\."),
        ((1, 2, 3, 4, 5, 7), r"holds 6 validation images, .* 5 labels: images without a label: .*_00000007\."),
        ((2, 3, 4, 5, 6), r"missing: ILSVRC2012_val_00000001; images without a label: ILSVRC2012_val_00000006\."),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, labels: str, numbers: tuple[int, ...], message: str) -> None:
    path = write_val(tmp_path, numbers)
    if labels == "devkit":
        write_devkit(tmp_path)
    else:
        write_solution(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source(path)


def test_strange_images_in_val(tmp_path: Path) -> None:
    path = tmp_path / "v.tar"
    write_devkit(tmp_path)
    path.write_bytes(tar_bytes([(val_name(1), b""), ("cat.jpg", b"")]))
    with pytest.raises(ValueError, match=r"must hold images ILSVRC2012_val_\*.JPEG only, not cat.jpg"):
        open_source(path)
    path.write_bytes(tar_bytes([(f"{folder}/{val_name(1)}", b"") for folder in "ab"]))
    with pytest.raises(ValueError, match=r"images held twice: 1"):
        open_source(path)


def test_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_val(tmp_path)
    write_devkit(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setattr("dataset_tools.sources.ilsvrc_labels.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"needs scipy: pip install scipy. Without it, put Kaggle's LOC_val_sol"):
        open_source(path)
    write_solution(tmp_path)
    check_val(open_source(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ILSVRC2012_validation_ground_truth.txt": b"1\n2\nx\n"}, r"ground_truth.txt must hold one number a line"),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1\n2\n5\n77\n"}, r"no leaf synset of data/meta.mat: 5, 77"),
        ({"meta.mat": b"MATLAB 5.0 MAT-file" * 20}, r"is damaged: data/meta.mat cannot be read"),
        ({"meta.mat": b""}, r"is damaged: data/meta.mat cannot be read"),
        ({"meta.mat": None}, r"lacks data/meta.mat; download it again"),
        (
            {"meta.mat": None, "ILSVRC2012_validation_ground_truth.txt": None},
            r"lacks data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt",
        ),
    ],
)
@pytest.mark.parametrize("unpacked", [False, True])
def test_damaged_devkits(tmp_path: Path, change: dict[str, bytes | None], message: str, unpacked: bool) -> None:
    files: dict[str, bytes] = {}
    for name, data in devkit_files().items():
        changed = change.get(name.rsplit("/", 1)[-1], data)
        if changed is not None:
            files[name] = changed
    if unpacked:
        write_files(tmp_path, files)
    else:
        write_devkit(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        open_source(write_val(tmp_path))


def test_a_devkit_cut_short(tmp_path: Path) -> None:
    devkit = write_devkit(tmp_path)
    os.truncate(devkit, devkit.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{devkit} is damaged or cut short"):
        open_source(write_val(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"its first line has no column 'ImageId'"),
        ("image,label\na,b\n", r"its first line has no column 'ImageId', but image, label"),
        ("ImageId,PredictionString\na,\n", r"line 2 has no label for 'a'"),
        ("ImageId,PredictionString\na,n1 1 2\na,n2\n", r"line 3 has a second label for 'a'"),
        ("ImageId,PredictionString\na,n1 1 2\n", r"csv has 1 class\(es\) that .*mapping.txt lacks: n1"),
    ],
)
def test_damaged_solutions(tmp_path: Path, text: str, message: str) -> None:
    write_solution(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(write_val(tmp_path))


@pytest.mark.parametrize("inside", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_the_tree_of_kaggle(tmp_path: Path, inside: str) -> None:
    image_folder = pytest.importorskip("torchvision.datasets").ImageFolder
    tree = write_kaggle(tmp_path)
    write_solution(tmp_path)
    source = open_source(tmp_path / inside)
    assert (source.kind, source.path) == ("ILSVRC2012", tmp_path / inside)
    assert list(source.splits) == ["train", "val", "test"]
    check_val(source)
    train, oracle = source.splits["train"], image_folder(tree / "train")
    assert [(str(tree / name), label) for name, label in zip(train.names, train.labels, strict=True)] == oracle.samples
    assert train.read(0) == b"n01440764_10.JPEG"
    assert source.splits["test"].labels.tolist() == [-1, -1]
    assert all(split.classes == WNIDS for split in source.splits.values())


@pytest.mark.parametrize("inside", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggle_without_labels(tmp_path: Path, inside: str) -> None:
    write_kaggle(tmp_path)
    with pytest.raises(ValueError, match=rf"LOC_val_solution.csv, .* is missing. .* beside ILSVRC/, into {tmp_path}\."):
        open_source(tmp_path / inside)


def test_kaggle_with_an_image_missing(tmp_path: Path) -> None:
    tree = write_kaggle(tmp_path)
    write_solution(tmp_path)
    (tree / "val" / val_name(3)).unlink()
    with pytest.raises(ValueError, match=rf"{tree}/val holds 4 .* missing: ILSVRC2012_val_00000003"):
        open_source(tmp_path)
    write_files(tree, {f"val/n01440764/{val_name(3)}": b""})
    with pytest.raises(ValueError, match=r"val holds images right inside, such as .*, and class folders"):
        open_source(tmp_path)


def test_flat_validation_images_in_another_tree(tmp_path: Path, caplog) -> None:
    """Kaggle's images in a folder of the user's own: labelled if the labels are there, else as ever."""
    write_kaggle(tmp_path).rename(tmp_path / "mine")
    source = open_source(tmp_path / "mine")
    assert (source.kind, source.splits["val"].labels.tolist()) == ("image folder", [-1] * 5)
    assert "mine/val is unlabelled: to have its labels, put into" in caplog.text
    write_solution(tmp_path / "mine")
    check_val(open_source(tmp_path / "mine"))


def test_ordinary_folders_are_left_alone(tmp_path: Path) -> None:
    write_files(tmp_path, {"Data/CLS-LOC/1.jpg": b"", "ILSVRC/2.jpg": b"", "val/ILSVRC2012_val_1.JPEG": b""})
    source = open_source(tmp_path)
    assert (source.kind, source.classes) == ("image folder", ("Data", "ILSVRC", "val"))

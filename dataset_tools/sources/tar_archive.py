"""A tar of images, plain or compressed: [top/][split/]CLASS/**/name.ext, webdataset's KEY.jpg and KEY.cls, or a tar of
one tar for each class; and folders of several tars.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.account import Account
from dataset_tools.files import ByteFile, open_regular
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.layout import first_few, label_by_name, lay_out, refuse_strangers, split_of, split_word
from dataset_tools.sources.split import SPLIT_ORDER, UNLABELED, ExtentSplit, ImageSource, Split
from dataset_tools.sources.spool import compression, plain_tar
from dataset_tools.sources.tar_index import END_OF_ARCHIVE, DamagedArchiveError, TarIndex, is_tar_of_tars

TAR_NAME = re.compile(r".+\.(tar(\.(gz|bz2|xz))?|tgz)", re.IGNORECASE)
_OTHERS = {
    r".+\.(beton|ffcv)": "a .beton of FFCV itself, which is not read: give what it was made of to convert",
    r"(shard\.\d+|.+)\.mds(\..+)?": "MosaicML's shards (MDS)",
    r"chunk-\d+-\d+\.bin": "litdata's chunks",
    r"data\.mdb": "an LMDB",
    r".+\.tfrecords?(-\d+-of-\d+)?": "TFRecords",
    r".+\.(zip|rar|7z|zst)": "an archive that is not read: unpack it into a folder, and give that",
    r".+\.(h5|hdf5|npz|npy|mat)": "arrays, which are not read: write their images into a folder",
}
"""What people have, and is no source: file name → what it looks like."""


def looks_like(names: Sequence[str]) -> str:
    """A sentence about the first file that is known to be of another program; "" if there is none."""
    for name in names:
        for pattern, what in _OTHERS.items():
            if re.fullmatch(pattern, os.path.basename(name), re.IGNORECASE):
                return f" {os.path.basename(name)} looks like {what}."
    return ""


def open_tar(archive: Path, read: tuple[Path, TarIndex] | None = None) -> ImageSource:
    """All images of a tar (plain, gz, bz2 or xz), in the order that the same files in a folder would have.

    One top-level folder around everything is looked through. Links are followed; files that are no image are left out,
    but for webdataset's labels (KEY.cls). A tar of plain tars (ILSVRC2012_img_train.tar) is read where it is, as if it
    were train/ with a folder for each inner tar. Raises ValueError if the file is no such tar, is damaged, holds a name
    twice or an absolute or `..` path, or for its layout (`layout.lay_out`). `read`: what `read_index` gives, if known.
    """
    tar, index = read or read_index(archive)
    account = Account()
    account.add(index.account, archive)
    if len(index.label_keys) and len(index.names):
        splits, classes = _joined({_split_named(archive) or "train": [(archive, tar, index)]}, str(archive))
        return ImageSource(path=archive, kind="webdataset tar", splits=splits, classes=classes, account=account)
    counts = {folder: stop - start for folder, (start, stop) in index.folders.items()}
    layout = lay_out(counts, f"{archive}", account)
    found: dict[str, tuple[PackedNames, NDArray[np.int64]]] = {}
    extents: dict[str, NDArray[np.int64]] = {}
    for split, folders in layout.splits.items():
        ranges = [index.folders[f"{layout.top}{folder}".rstrip("/")] for folder, _ in folders]
        positions = np.concatenate([np.arange(*bounds) for bounds in ranges])
        labels = np.repeat([label for _, label in folders], [stop - start for start, stop in ranges])
        names = index.names.select(positions)
        if layout.top:
            names = PackedNames(name[len(layout.top) :] for name in names)
        found[split], extents[split] = (names, labels.astype(np.int64)), index.extents[positions]
    labels_of, classes = label_by_name(found, layout.classes)
    file = (ByteFile(tar),)
    opened: dict[str, Split] = {
        split: ExtentSplit(split, file, names, extents[split], labels_of[split], classes)
        for split, (names, _) in found.items()
    }
    kind = "tar of tars" if is_tar_of_tars(tar) else "tar"
    return ImageSource(path=archive, kind=kind, splits=opened, classes=classes, account=account)


def open_tar_folder(folder: Path, tars: Sequence[str], account: Account) -> ImageSource:
    """Several tars (paths in `folder`) as one data set: webdataset's shards, or one tar for each class.

    The split of a tar is that of its folder, or a word of its name (train-000000.tar), else train. In a tar without
    labels, WNIDs in the names of images are their classes, else their folders, else the tar's own name. Raises
    ValueError as `open_tar` does, or if a tar holds splits itself.
    """
    parts: dict[str, list[tuple[Path, Path, TarIndex]]] = {}
    for name in sorted(tars):
        split = _split_named(Path(name)) or split_of(folder.name) or "train"
        parts.setdefault(split, []).append((folder / name, *read_index(folder / name)))
    splits, classes = _joined(parts, str(folder))
    for archive, _, index in (part for of_split in parts.values() for part in of_split):
        account.add(index.account, archive)
    if not splits:
        raise ValueError(f"the tars of {folder} hold no image: {first_few(sorted(tars))}. {account}")
    return ImageSource(path=folder, kind="folder of tars", splits=splits, classes=classes, account=account)


def _split_named(archive: Path) -> str | None:
    """The split that a word of a tar's name, or of its folders' names, means."""
    return split_of(split_word(archive.name) or archive.parent.name)


def _joined(
    parts: dict[str, list[tuple[Path, Path, TarIndex]]], where: str
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The splits of some tars (as given, plain, and their index), and the classes."""
    class_names: dict[str, list[str | None]] = {}
    for split, tars in parts.items():
        several = sum(map(len, parts.values())) > 1
        class_names[split] = [
            name for archive, _, index in tars for name in _classes_in(archive, index, several=several)
        ]
    known = {split: {name for name in names if name is not None} for split, names in class_names.items()}
    classes = sorted(known.get("train") or set().union(*known.values()))
    if all(map(str.isdecimal, classes)):
        classes.sort(key=int)  # so that, as nearly always, the number is the label
    refuse_strangers(known, classes, where)
    rank: dict[str | None, int] = {name: label for label, name in enumerate(classes)} | {None: UNLABELED}
    splits: dict[str, Split] = {}
    for split in (name for name in SPLIT_ORDER if class_names.get(name)):
        tars = parts[split]
        single = len(tars) == 1
        names = PackedNames(
            f"{split}/{name}" if single else f"{split}/{archive.name.split('.')[0]}/{name}"
            for archive, _, index in tars
            for name in index.names
        )
        counts = [len(index.names) for _, _, index in tars]
        splits[split] = ExtentSplit(
            split,
            tuple(ByteFile(plain) for _, plain, _ in tars),
            names,
            np.concatenate([index.extents for _, _, index in tars]),
            np.array([rank[name] for name in class_names[split]], dtype=np.int64),
            tuple(classes),
            np.repeat(np.arange(len(tars), dtype=np.int32), counts),
        )
    return splits, tuple(classes)


def _classes_in(archive: Path, index: TarIndex, *, several: bool) -> list[str | None]:
    """The class of each image of a tar, None where nothing says it."""
    if len(index.label_keys):
        return index.labels()
    unlabelled = np.full(len(index.names), UNLABELED, dtype=np.int64)
    labels, classes = label_by_name({"train": (index.names, unlabelled)}, ())
    if classes:
        return [classes[label] for label in labels["train"]]
    tops = {folder.split("/")[0] for folder, (start, stop) in index.folders.items() if stop > start}
    if splits := sorted(filter(split_of, tops)):
        raise ValueError(
            f"{archive} is a data set of its own, with {first_few(splits)}, beside other tars: give one of the tars."
        )
    if tops != {""}:
        return [name.split("/")[0] if "/" in name else None for name in index.names]
    return [archive.name.split(".")[0] if several else None] * len(index.names)


def read_index(archive: Path) -> tuple[Path, TarIndex]:
    """The plain tar (a copy in the cache folder where `archive` is compressed) and where its images are.

    Raises ValueError, naming `archive`, if it is no tar or is damaged.
    """
    _check_kind(archive)
    try:
        return plain_tar(archive)
    except DamagedArchiveError as error:
        raise ValueError(f"the archive {archive} cannot be used: {error}") from error


def _check_kind(archive: Path) -> None:
    with open_regular(archive) as file:
        head = file.read(tarfile.BLOCKSIZE)
    if compression(head) or head[257:262] == b"ustar" or head == END_OF_ARCHIVE:
        return
    try:  # a tar from before 1988 has no mark, but a checksum
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        what = "is empty" if not head else "is no tar"
        raise ValueError(
            f"the file {archive} {what}.{looks_like([archive.name])} A file must be a tar, plain or packed with gzip, "
            "bzip2 or xz, or Parquet; unpack other archives (zip, zstd) into a folder and give that."
        ) from error

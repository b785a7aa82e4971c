"""Parquet files with an image column, as data sets on the Hugging Face hub are stored."""

from __future__ import annotations

import json
import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dataset_tools.account import Account
from dataset_tools.files import ByteFile, save_arrays
from dataset_tools.packed_names import PackedNames
from dataset_tools.schema import convert
from dataset_tools.sources.layout import first_few, is_image, refuse_strangers
from dataset_tools.sources.parquet_files import is_parquet, split_files
from dataset_tools.sources.raw_pixels import remap
from dataset_tools.sources.split import UNLABELED, ExtentSplit, ImageSource, Split
from dataset_tools.sources.spool import alone, cache_entry, check_room, is_intact, keep_checksum, write_chunks
from dataset_tools.sources.tar_index import DamagedArchiveError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "targets", "cls", "class", "class_label", "category")
"""In any case."""
BATCH_BYTES = 8 << 20
"""At most about so many bytes of images are in memory at a time."""
FORMAT = "parquet 2"
"""The format of what is kept in the cache folder; part of its name."""

MAGICS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"P5": ".pgm",
    b"P6": ".ppm",
}
"""First bytes of an image → extension for its name."""


@dataclass(frozen=True)
class Columns:
    """What is where in one Parquet file."""

    image: str
    """As pyarrow selects it: "image.bytes", or "image" for a column of bytes."""
    path: str | None
    """The same for the file name of an image."""
    label: str | None
    is_text: bool
    """Labels are names, not numbers."""
    class_names: tuple[str, ...] | None
    """The names of the numbers, where the file gives them."""
    note: str = ""
    """What to do where there is no label column."""


def open_parquet(place: Path) -> ImageSource | None:
    """A Parquet file, or a folder of them, in the stored order; None if `place` is neither.

    The image column is a struct of bytes and path, or bytes: the one called as in IMAGE_COLUMNS, or the only
    one. The label column is called as in LABEL_COLUMNS, and holds numbers, which the file may name (-1: no
    label), or names; labels become ranks of the sorted names. The images are copied into the cache folder
    once, so that any order is read fast. Samples are named by the stored paths, where all are there and
    distinct, else by number: "train/000000123.jpg".

    Raises ValueError for a damaged file, columns that are missing or ambiguous, images that are not stored in
    the file, or classes that train lacks; RuntimeError if pyarrow is missing; OSError if there is no room.
    """
    if place.is_file() and not is_parquet(place):
        return None
    account = Account()
    files = split_files(place, account)
    if not files:
        return None
    entry = cache_entry([path for paths in files.values() for path in paths], ".images", version=FORMAT)
    with alone(entry):
        if (splits := _load(entry, account)) is None:
            _unpack(place, files, entry)
            splits = _load(entry, account)
            assert splits is not None, f"{entry} cannot be read right after it was written"
    if not splits:
        raise ValueError(f"{place} holds Parquet files without rows, so no image.")
    classes = next(iter(splits.values())).classes
    return ImageSource(path=place, kind="Parquet", splits=splits, classes=classes, account=account)


def _load(entry: Path, account: Account) -> dict[str, Split] | None:
    """The splits, and the notes, that `_unpack` has kept; None if they are not there, or damaged."""
    try:
        with np.load(_index_of(entry), allow_pickle=False) as saved:
            classes = tuple(PackedNames.from_arrays(saved, "classes"))
            splits, file = dict[str, Split](), (ByteFile(entry),)
            for split in map(str, saved["splits"]):
                names, extents = PackedNames.from_arrays(saved, f"{split}_names"), saved[f"{split}_extents"]
                splits[split] = ExtentSplit(split, file, names, extents, saved[f"{split}_labels"], classes)
            if int(saved["bytes"]) != entry.stat().st_size:
                logger.warning("%s has not its size, and is made again", entry)
            elif is_intact(entry):
                account.notes += map(str, saved["notes"])
                return splits
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        logger.warning("the index of %s cannot be read (%s), and both are made again", entry, error)
    return None


def _index_of(entry: Path) -> Path:
    return entry.with_name(entry.name + ".npz")


def _unpack(place: Path, files: dict[str, list[Path]], entry: Path) -> None:
    """Copies all images into the file `entry`, one after the other, and keeps names, labels and extents beside."""
    columns = {path: find_columns(path) for paths in files.values() for path in paths}
    labels, classes = _labels(place, files, columns)
    purpose = f"unpack {place}"
    check_room(entry.parent, sum(_image_bytes(path, found.image) for path, found in columns.items()), purpose)
    logger.info("unpacking %s once, into %s", place, entry.parent)

    sizes, kinds = array("q"), array("b")
    partial = entry.with_name(entry.name + ".partial")
    try:
        chunks = (chunk for path, found in columns.items() for chunk in _chunks(path, found, sizes, kinds))
        packed_bytes = sum(path.stat().st_size for path in columns)
        keep_checksum(entry, write_chunks(chunks, partial, purpose, packed_bytes))
        os.replace(partial, entry)
    except DamagedArchiveError as error:
        raise ValueError(f"{place} cannot be used: {error}") from error
    finally:
        partial.unlink(missing_ok=True)

    num_bytes = np.array(sizes, dtype=np.int64)
    extents = np.stack([np.cumsum(num_bytes) - num_bytes, num_bytes], axis=1)
    splits = [split for split in files if len(labels[split])]
    saved: dict[str, NDArray[Any]] = {"splits": np.array(splits, dtype=np.str_), "bytes": num_bytes.sum()}
    saved |= PackedNames(classes).as_arrays("classes")
    notes = [f"{place}: {found.note}" for found in columns.values() if not found.label][:1]
    saved["notes"] = np.array(notes, dtype=np.str_)
    start = 0
    for split in splits:
        stop = start + len(labels[split])
        names = _names(split, files[split], columns, kinds[start:stop])
        saved |= names.as_arrays(f"{split}_names")
        saved |= {f"{split}_extents": extents[start:stop], f"{split}_labels": labels[split]}
        start = stop
    assert start == len(sizes), f"{place}: {start} labels for {len(sizes)} images"
    save_arrays(_index_of(entry), saved)


def find_columns(path: Path) -> Columns:
    """Raises ValueError if `path` is damaged, if there is no image column, or if there are several candidates."""
    with _open(path) as file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
    if num_rows > path.stat().st_size:
        raise ValueError(f"{path} is damaged: it says that it has {num_rows:,} images, which is more than its bytes")
    from pyarrow import types  # _open has told what to do if it is missing

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind)

    images: dict[str, tuple[str, str | None]] = {}
    for field in schema:
        if is_binary(field.type):
            images[field.name] = field.name, None
        elif types.is_struct(field.type):
            inside = {child.name: child.type for child in field.type}
            if "bytes" in inside and is_binary(inside["bytes"]):
                has_path = "path" in inside and is_text(inside["path"])
                images[field.name] = f"{field.name}.bytes", f"{field.name}.path" if has_path else None
    chosen = [name for name in images if name in IMAGE_COLUMNS] or list(images)
    if len(chosen) != 1:
        what = f"several image columns, {first_few(chosen)}" if chosen else "no image column"
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"{path} has {what}; expected one of bytes, or a struct of bytes and path, called {IMAGE_COLUMNS[0]!r}. "
            f"Rename or drop columns. Its columns: {listed}."
        )
    image, image_path = images[chosen[0]]

    label_names = [field.name for field in schema if field.name.lower() in LABEL_COLUMNS and field.name != chosen[0]]
    if len(label_names) > 1:
        raise ValueError(f"{path} has several label columns, {first_few(label_names)}; rename or drop all but one.")
    if not label_names:
        note = (
            f"no column is called {LABEL_COLUMNS[0]!r} (or {first_few(LABEL_COLUMNS[1:])}), so that images have no "
            f"labels; its columns are {first_few(schema.names)}. If one of these holds the labels, rename it"
        )
        return Columns(image, image_path, None, False, None, note)
    field = schema.field(label_names[0])
    kinds = types.is_integer, types.is_floating, types.is_boolean, is_text
    if not any(is_kind(field.type) for is_kind in kinds):
        raise ValueError(
            f"{path}: its column {field.name!r} holds {field.type}; expected a whole number, or a text, for each image."
        )
    return Columns(image, image_path, field.name, is_text(field.type), _class_names(path, schema, field.name))


def _class_names(path: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    """What the Hugging Face metadata of a file call the numbers in column `label`."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = stored.get("info", {}).get("features", {}).get(label, {}).get("names") or []
        names = convert(names, list[str], "its list of names")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its Hugging Face metadata cannot be read: {error}") from error
    twice = {name for name, count in Counter(names).items() if count > 1}  # as ImageNet's crane, a bird and a machine
    return tuple(f"{name} ({index})" if name in twice else name for index, name in enumerate(names)) or None


def _labels(
    place: Path, files: dict[str, list[Path]], columns: dict[Path, Columns]
) -> tuple[dict[str, NDArray[np.int64]], tuple[str, ...]]:
    """Labels of each split, int64 [N], ranks in the sorted classes or -1, and these classes."""
    described = {(found.is_text, found.class_names) for found in columns.values() if found.label}
    if len(described) > 1:
        raise ValueError(f"the Parquet files of {place} differ in their class names, or in the type of their labels.")
    is_text, declared = described.pop() if described else (False, None)
    stored = {
        split: [label for path in paths for label in _column(path, columns[path].label)]
        for split, paths in files.items()
    }
    present = {label for labels in stored.values() for label in labels} - {None, UNLABELED}
    if not is_text and min(present, default=0) < UNLABELED:
        raise ValueError(f"{place} is damaged: its least label is {min(present)}; -1 is for images without one.")
    known_labels = declared if declared and is_text else present
    names = dict(enumerate(declared)) if declared and not is_text else {label: str(label) for label in known_labels}
    if unknown := present - names.keys():
        raise ValueError(
            f"{place} is damaged: it has the label {min(unknown)!r}, and gives names to {len(names)} others."
        )
    number_of = {label: number for number, label in enumerate(names)}
    labels: dict[str, NDArray[np.int64]] = {}
    classes: tuple[str, ...] = tuple(sorted(names.values()))
    for split, given in stored.items():
        numbers = [UNLABELED if label in (None, UNLABELED) else number_of[label] for label in given]
        labels[split] = np.array(numbers, dtype=np.int64)
        if (known := labels[split] != UNLABELED).any():
            labels[split][known], classes = remap(labels[split][known], list(names.values()), place)
    present_in = {split: {classes[label] for label in np.unique(given[given >= 0])} for split, given in labels.items()}
    if present_in.get("train") and not declared:
        refuse_strangers(present_in, present_in["train"], str(place))
    return labels, classes


def _column(path: Path, name: str | None) -> list[Any]:
    """All values of a column, None where there is none."""
    with _open(path) as file:
        if name is None:
            return [None] * file.metadata.num_rows
        values = list(_leaf(file.read(columns=[name]).column(0)).to_pylist())
    for row, value in enumerate(values):
        if isinstance(value, bool | float):
            if not math.isfinite(value) or value != int(value):
                raise ValueError(f"{path}: row {row} has the label {value}, which is no whole number")
            values[row] = int(value)
    return values


def _chunks(path: Path, columns: Columns, sizes: array[int], kinds: array[int]) -> Iterator[bytes]:
    """The images of a file, several at a time. Adds the size of each to `sizes`, and to `kinds` the position
    in MAGICS, or -1.
    """
    with _open(path) as file:
        rows = max(1, file.metadata.num_rows)
        batch_size = max(1, min(64, BATCH_BYTES * rows // max(1, _image_bytes(path, columns.image))))
        row = 0
        for batch in file.iter_batches(batch_size=batch_size, columns=[columns.image]):
            images = _leaf(batch.column(0)).to_pylist()
            if None in images:
                raise ValueError(
                    f"{path}: row {row + images.index(None)} has no image bytes. Store the images in the file "
                    "(datasets: embed_external_files, or push_to_hub), not their paths."
                )
            for image in images:
                sizes.append(len(image))
                kinds.append(next((kind for kind, magic in enumerate(MAGICS) if image.startswith(magic)), -1))
            row += len(images)
            yield b"".join(images)


def _names(split: str, files: list[Path], columns: dict[Path, Columns], kinds: array[int]) -> PackedNames:
    """The stored paths below "SPLIT/" if all can be names and are distinct, else numbers."""
    stored = [name for path in files for name in _column(path, columns[path].path)]
    if len(set(stored)) == len(stored) and all(map(_is_name, stored)):
        return PackedNames(f"{split}/{name}" for name in stored)
    extensions = [*MAGICS.values(), ".bin"]  # the last one for -1
    return PackedNames(f"{split}/{index:09}{extensions[kind]}" for index, kind in enumerate(kinds))


def _is_name(stored: str | None) -> bool:
    """Whether it is a safe relative path of an image."""
    return stored is not None and is_image(stored) and not {"", ".", ".."} & set(stored.split("/"))


def _leaf(column: Any) -> Any:
    """The one column that was selected, be it inside a struct or not."""
    return column.flatten()[0] if str(column.type).startswith("struct") else column


def _image_bytes(path: Path, column: str) -> int:
    """How many bytes the image column of a file has, unpacked."""
    with _open(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; what goes wrong with it becomes a ValueError that names the file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RuntimeError(f"reading {path} needs pyarrow: pip install 'leoclr-fast[parquet]'") from error
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again.") from error

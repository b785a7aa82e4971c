"""The labels of ILSVRC2012's validation images, which come apart from the images: the devkit's, or Kaggle's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.account import Account
from dataset_tools.files import read_file
from dataset_tools.sources.layout import first_few, refuse_strangers
from dataset_tools.sources.raw_pixels import check_mat, read_lines, read_table
from dataset_tools.sources.spool import DECOMPRESSORS, compression
from dataset_tools.sources.tar_index import members

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
SOLUTION = "LOC_val_solution.csv"
MAPPING = "LOC_synset_mapping.txt"
MAX_BYTES = 1 << 26
"""Of an unpacked devkit, which has 3 MB."""
WHAT_TO_PUT = (
    f"{DEVKIT}.tar.gz (from image-net.org; the unpacked folder {DEVKIT}/ is as good) or Kaggle's {SOLUTION} "
    f"(with {MAPPING})"
)


@dataclass(frozen=True)
class ValidationLabels:
    """Which class (WNID) each validation image is."""

    path: Path
    """The file that says so."""
    wnids: dict[str, str]
    """Name of the image, without extension ("ILSVRC2012_val_00000001") → WNID."""
    classes: tuple[str, ...]
    """All WNIDs, sorted; () where only `wnids` tells them."""

    def ranks(self, images: Sequence[str], classes: tuple[str, ...], where: Path) -> NDArray[np.int64]:
        """The labels of `images` (N names without extension), int64 [N]: ranks in `classes`.

        Raises ValueError, beginning with `where`, unless the images are exactly those that have a label, and
        all their WNIDs are among `classes`.
        """
        present = set(images)
        if len(present) != len(images) or present != self.wnids.keys():
            lacking, nameless = sorted(self.wnids.keys() - present), sorted(present - self.wnids.keys())
            off = [f"images that are missing: {first_few(lacking)}"] if lacking else []
            off += [f"images without a label: {first_few(nameless)}"] if nameless else []
            off += [f"images held twice: {len(images) - len(present)}"] if len(present) != len(images) else []
            raise ValueError(
                f"{where} holds {len(images):,} validation images, but {self.path} has {len(self.wnids):,} labels: "
                f"{'; '.join(off)}."
            )
        refuse_strangers({"val": set(self.wnids.values())}, classes, f"{where}, by {self.path}")
        rank = {wnid: label for label, wnid in enumerate(classes)}
        return np.array([rank[self.wnids[image]] for image in images], dtype=np.int64)


def find_validation_labels(folders: Sequence[Path]) -> ValidationLabels | None:
    """What the first of `folders` that has labels says; None if none has.

    A devkit comes before Kaggle's file, unless only scipy is missing. Raises ValueError for damaged files,
    RuntimeError if scipy is missing and nothing else will do.
    """
    for folder in folders:
        solution = folder / SOLUTION
        candidates = [folder / DEVKIT, *(folder / f"{DEVKIT}{suffix}" for suffix in (".tar.gz", ".tgz", ".tar"))]
        devkit = next((each for each in candidates if each.is_dir() or each.is_file()), None)
        if devkit and (find_spec("scipy") or not solution.is_file()):
            return read_devkit(devkit)
        if solution.is_file():
            return read_solution(solution, folder / MAPPING)
    return None


def read_devkit(devkit: Path) -> ValidationLabels:
    """The labels that a devkit (folder or .tar.gz) holds: line i of the ground truth is the id of image i, and
    meta.mat says which leaf of WordNet has that id, as in torchvision.datasets.imagenet.

    The ids are in another order than the WNIDs. Raises ValueError if the devkit is damaged or incomplete,
    RuntimeError if scipy is missing.
    """
    meta, ground_truth = _devkit_files(devkit)
    wnid_of_id = _leaf_synsets(meta, devkit)
    try:
        ids = [int(line) for line in ground_truth.decode("ascii").split()]
    except ValueError as error:
        raise ValueError(f"{devkit} is damaged: {GROUND_TRUTH} must hold one number a line: {error}") from error
    if unknown := sorted(set(ids) - wnid_of_id.keys()):
        raise ValueError(
            f"{devkit} is damaged: {GROUND_TRUTH} has ids that are no leaf synset of {META}: "
            f"{first_few(list(map(str, unknown)))}"
        )
    wnids = {f"ILSVRC2012_val_{number:08}": wnid_of_id[id_] for number, id_ in enumerate(ids, start=1)}
    return ValidationLabels(devkit, wnids, tuple(sorted(wnid_of_id.values())))


def _devkit_files(devkit: Path) -> tuple[bytes, bytes]:
    """The bytes of META and GROUND_TRUTH."""
    wanted = META, GROUND_TRUTH
    if devkit.is_dir():
        found = {name: read_file(devkit / name) for name in wanted if (devkit / name).is_file()}
    else:
        found = {}
        try:
            data = read_file(devkit)
            if magic := compression(data[:16]):
                with DECOMPRESSORS[magic](io.BytesIO(data)) as packed:
                    data = packed.read(MAX_BYTES)
            for path, member in members(io.BytesIO(data), 0, len(data), Account()):
                for name in wanted:
                    if f"/{path}".endswith(f"/{name}") and member.isreg():
                        found[name] = data[member.offset_data : member.offset_data + member.size]
        except Exception as error:  # gzip, zlib and lzma each have their own
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{devkit} is damaged or cut short ({error}); download it again.") from error
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{devkit} lacks {' and '.join(missing)}; download it again.")
    return found[META], found[GROUND_TRUTH]


def _leaf_synsets(meta: bytes, devkit: Path) -> dict[int, str]:
    """ILSVRC id → WNID, for each synset without children."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise RuntimeError(
            f"reading {META} of {devkit} needs scipy: pip install scipy. Without it, put Kaggle's {SOLUTION} (with "
            f"{MAPPING}) into {devkit.parent}."
        ) from error
    try:
        check_mat(meta, META)
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"].astype(np.int64) == 0]
        wnid_of_id = {int(id_): str(wnid) for id_, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    except Exception as error:  # what loadmat raises for a damaged file is not documented
        raise ValueError(f"{devkit} is damaged: {META} cannot be read: {error}") from error
    if not wnid_of_id or len(set(wnid_of_id.values())) != len(leaves):
        raise ValueError(f"{devkit} is damaged: {META} has {len(leaves)} leaf synsets, which must be distinct")
    return wnid_of_id


def read_solution(solution: Path, mapping: Path) -> ValidationLabels:
    """The labels in Kaggle's LOC_val_solution.csv (ImageId, PredictionString: a WNID, then boxes), and the
    classes in LOC_synset_mapping.txt, one "WNID description" a line, if that file is there.

    Raises ValueError if one is damaged, or if the first has WNIDs that the second lacks.
    """
    wnids: dict[str, str] = {}
    for line, row in enumerate(read_table(solution, ("ImageId", "PredictionString"), ","), start=2):
        image, prediction = row["ImageId"], row["PredictionString"].split()
        if not image or not prediction or image in wnids:
            what = "a second label" if image in wnids else "no label"
            raise ValueError(f"{solution} is damaged: line {line} has {what} for {image!r}")
        wnids[image] = prediction[0]
    classes: tuple[str, ...] = ()
    if mapping.is_file():
        classes = tuple(sorted({line.split()[0] for line in read_lines(mapping)}))
        if strangers := sorted(set(wnids.values()).difference(classes)):
            raise ValueError(f"{solution} has {len(strangers)} class(es) that {mapping} lacks: {first_few(strangers)}.")
    return ValidationLabels(solution, wnids, classes or tuple(sorted(set(wnids.values()))))

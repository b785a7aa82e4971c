"""What is converted is read by the libraries it is made for, FFCV's stock Loader, webdataset and DALI; and by ours."""

from __future__ import annotations

import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.verify import verify
from dataset_tools.formats.beton import ALLOCATION, FIELD, HEADER, METADATA, METADATA_START
from dataset_tools.formats.manifest import Manifest
from dataset_tools.formats.records import JPG, RAW
from dataset_tools.sources import ImageSource, open_source
from dataset_tools.sources.converted import open_converted
from tests.dataset_tools.conversion.foreign import ffcv_layout, read_with_dali, read_with_ffcv
from tests.dataset_tools.conversion.pictures import PASSED_JPEGS, encoded, flat, noise, truth
from tests.dataset_tools.made_up import write_files
from tests.pipelines.optional_packages import needs_dali, needs_ffcv

NUM_TRAIN, NUM_VAL, NUM_UNLABELED = 90, 20, 11
LARGE = 1800, 1600
"""Raw, that is 8.6 MB: more than the page that a conversion without a limit begins with."""


def color(number: int) -> tuple[int, int, int]:
    """Colours that stay apart by 40 after JPEG."""
    return 40 * (number % 6) + 5, 40 * (number // 6 % 6) + 5, 40 * (number // 36 % 6) + 5


def number_of(pixels: np.ndarray) -> np.ndarray:
    """The inverse of `color`, for images [N, H, W, 3] of one colour: [N]."""
    digits = np.rint((pixels.mean(axis=(1, 2)) - 5) / 40).astype(int)
    return digits @ np.array([1, 6, 36])


def some_images(first: int, count: int, folder: str, num_classes: int) -> dict[str, bytes]:
    """Images of the colours `first` …, every third one a PNG, of many sizes, in `num_classes` folders (0: in one)."""
    files = {}
    for index in range(count):
        image = flat(color(first + index), 16 + 3 * (index % 7), 40 - index % 13)
        name = f"class{index % num_classes}/{index:03}" if num_classes else f"{index:03}"
        if index % 3 == 0:
            files[f"{folder}/{name}.png"] = encoded(image, "PNG")
        else:
            files[f"{folder}/{name}.jpg"] = encoded(image, quality=95, subsampling=0, progressive=index % 2 == 0)
    return files


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, val and unlabeled; JPEG and PNG."""
    files = some_images(0, NUM_TRAIN, "train", 4)
    files |= some_images(NUM_TRAIN, NUM_VAL, "val", 4)
    files |= some_images(NUM_TRAIN + NUM_VAL, NUM_UNLABELED, "unlabeled", 0)
    return write_files(tmp_path_factory.mktemp("mixed"), files)


@pytest.fixture(scope="module")
def mixed_ffcv(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ffcv") / "made"
    convert(mixed, target, ConvertOptions(format="ffcv"), workers=2)
    return target


@pytest.fixture(scope="module")
def mixed_webdataset(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards of 64 KiB."""
    target = tmp_path_factory.mktemp("webdataset") / "made"
    convert(mixed, target, ConvertOptions(format="webdataset", shard_size="64KiB"), workers=2)
    return target


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of more than 8 MiB, one raw and one JPEG, among small ones; without a limit of size."""
    files = some_images(0, 20, "train", 2)
    files["train/class0/large.png"] = encoded(flat(color(20), *LARGE), "PNG", compress_level=1)
    files["train/class1/noise.jpg"] = encoded(noise(1900, 1900), quality=100, subsampling=0)
    files["train/class1/zz.png"] = encoded(flat(color(21)), "PNG")
    root = write_files(tmp_path_factory.mktemp("large"), files)
    convert(root / "train", root / "made", ConvertOptions(format="ffcv", max_side=0), workers=1)
    return root / "made"


def shards(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"{split}-*.tar"))


def assert_same_samples(source: ImageSource, folder: Path) -> None:
    """Names, labels, classes, and either the very bytes or the very pixels."""
    made = open_converted(folder)
    assert made.classes == source.classes
    assert list(made.splits) == list(source.splits)
    for name, split in made.splits.items():
        original = source.splits[name]
        by_name = {each: index for index, each in enumerate(original.names)}
        assert sorted(split.names) == sorted(by_name)
        for index, each in enumerate(split.names):
            origin = by_name[each]
            assert split.labels[index] == original.labels[origin]
            assert split.records["source_index"][index] == origin
            if split.records["handling"][index] == 0:
                assert split.read(index) == original.read(origin)
            else:
                np.testing.assert_array_equal(truth(split.read(index)), truth(original.read(origin)))


@pytest.mark.parametrize("made", ["mixed_ffcv", "mixed_webdataset"])
def test_our_own_reader(made: str, mixed: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(made)
    assert_same_samples(open_source(mixed), folder)
    assert verify(folder, source=mixed, deep=True, workers=1)["problems"] == []
    manifest = Manifest.load(folder)
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": NUM_TRAIN,
        "val": NUM_VAL,
        "unlabeled": NUM_UNLABELED,
    }
    lossless = "raw" if manifest.format == "ffcv" else "png"
    assert manifest.splits["train"].encodings == {"jpg": NUM_TRAIN * 2 // 3, lossless: NUM_TRAIN // 3}
    assert open_converted(folder).splits["unlabeled"].labels.tolist() == [-1] * NUM_UNLABELED


class TestBetonLayout:
    """The file, byte for byte, without FFCV."""

    @pytest.mark.parametrize("made", ["mixed_ffcv", "large"])
    def test_header_pages_and_tables(self, made: str, request: pytest.FixtureRequest) -> None:
        folder = request.getfixturevalue(made)
        for name, entry in Manifest.load(folder).splits.items():
            data = (folder / f"{name}.beton").read_bytes()
            records = open_converted(folder).splits[name].records
            count = entry.samples
            header = np.frombuffer(data, HEADER, 1)[0]
            page = int(header["page_size"])
            table_at = int(header["alloc_table_ptr"])
            assert (header["version"], header["num_fields"], header["num_samples"]) == (2, 2, count)
            assert page == entry.page_bytes
            assert page >= 2 << 20
            assert page & (page - 1) == 0
            assert len(data) == table_at + count * ALLOCATION.itemsize
            assert table_at % page == 0

            fields = np.frombuffer(data, FIELD, 2, HEADER.itemsize)
            assert fields["type_id"].tolist() == [2, 1]
            assert [bytes(field).rstrip(b"\0") for field in fields["name"]] == [b"image", b"label"]
            assert not fields["arguments"].any()

            metadata = np.frombuffer(data, METADATA, count, METADATA_START)
            table = np.frombuffer(data, ALLOCATION, count, table_at)
            begins, sizes = table["ptr"].astype(np.int64), table["size"].astype(np.int64)
            assert table["sample_id"].tolist() == list(range(count))
            np.testing.assert_array_equal(begins, metadata["f0"]["data_ptr"])
            assert (begins[1:] >= begins[:-1] + sizes[:-1]).all()
            assert (begins // page == (begins + sizes - 1) // page).all()
            first_page = -(-(METADATA_START + metadata.nbytes) // page) * page
            assert begins[0] == first_page
            np.testing.assert_array_equal(metadata["f1"], records["label"])
            np.testing.assert_array_equal(metadata["f0"]["width"], records["width"])
            np.testing.assert_array_equal(metadata["f0"]["height"], records["height"])
            assert set(metadata["f0"]["mode"]) <= {JPG, RAW}

            ends = np.concatenate(([METADATA_START + metadata.nbytes], begins + sizes))
            for end, begin in zip(ends, [*begins, table_at], strict=True):
                assert not any(data[end:begin]), "between samples are zeros"

    def test_pages_grow_with_the_samples(self, large: Path, mixed_ffcv: Path) -> None:
        assert Manifest.load(mixed_ffcv).splits["train"].page_bytes == 4 << 20  # 1057 x 1057 raw pixels
        split = Manifest.load(large).splits["train"]
        assert split.max_bytes > 8 << 20
        assert split.page_bytes == 16 << 20
        assert [path.name for path in sorted(large.iterdir())] == [
            "manifest.json",
            "quarantine.jsonl",
            "train.beton",
            "train.records.safetensors",
        ]


@pytest.fixture(scope="module")
def foreign() -> Iterator[Callable[..., Any]]:
    """Calls a function in another process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


@needs_ffcv
class TestFfcv:
    @pytest.mark.parametrize(("order", "os_cache"), [("SEQUENTIAL", True), ("RANDOM", True), ("QUASI_RANDOM", False)])
    def test_each_sample_once_with_its_label_and_pixels(
        self, foreign, mixed_ffcv: Path, os_cache: bool, order: str
    ) -> None:
        """Raw images to the bit, JPEGs of one colour nearly so."""
        decoder = "random" if order == "RANDOM" else "center"
        path = mixed_ffcv / "train.beton"
        images, labels = foreign(read_with_ffcv, path, os_cache=os_cache, order=order, decoder=decoder)
        split = open_converted(mixed_ffcv).splits["train"]
        assert images.shape == (NUM_TRAIN, 16, 16, 3)
        numbers = number_of(images).tolist()
        in_file = [int(name.split("/")[-1][:3]) for name in split.names]
        assert sorted(numbers) == list(range(NUM_TRAIN))
        assert (numbers == in_file) == (order == "SEQUENTIAL")
        tolerance = {RAW: 0, JPG: 2}
        for image, label, number in zip(images, labels, numbers, strict=True):
            index = in_file.index(number)
            assert label == split.labels[index]
            difference = np.abs(image.astype(int) - color(number)).max()
            assert difference <= tolerance[int(split.records["encoding"][index])], number

    @pytest.mark.parametrize("os_cache", [True, False])
    def test_several_pages_and_samples_larger_than_a_page(self, foreign, large: Path, os_cache: bool) -> None:
        path = large / "train.beton"
        images, labels = foreign(read_with_ffcv, path, os_cache=os_cache, order="SEQUENTIAL")
        everything = sorted(map(as_bytes, images, labels))
        for order in ("RANDOM", "QUASI_RANDOM"):
            assert sorted(map(as_bytes, *foreign(read_with_ffcv, path, os_cache=os_cache, order=order))) == everything
        names = list(open_converted(large).splits["train"].names)
        assert labels.tolist() == [0] * 11 + [1] * 12
        assert names[10] == "class0/large.png"
        assert (images[10] == color(20)).all()
        assert names[-2:] == ["class1/noise.jpg", "class1/zz.png"]
        assert (images[-1] == color(21)).all()
        assert 100 < images[-2].mean() < 155

    def test_types_are_those_of_ffcv(self, foreign, mixed_ffcv: Path) -> None:
        found = foreign(ffcv_layout, mixed_ffcv / "train.beton")
        ours = {"header": HEADER, "field": FIELD, "metadata": METADATA, "allocation": ALLOCATION}
        for name, dtype in ours.items():
            assert found.dtypes[name] == dtype
            assert found.dtypes[name].itemsize == dtype.itemsize
            assert dict(found.dtypes[name].fields) == dict(dtype.fields)
        assert found.version == 2
        assert list(found.fields.items()) == [("image", "RGBImageField"), ("label", "IntField")]
        assert (found.num_samples, found.page_size) == (NUM_TRAIN, 4 << 20)
        records = open_converted(mixed_ffcv).splits["train"].records
        np.testing.assert_array_equal(found.metadata["f1"], records["label"])
        np.testing.assert_array_equal(found.allocations["size"], records["num_bytes"])
        np.testing.assert_array_equal(found.allocations["ptr"], records["offset"])


def samples_of_tars(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """By the webdataset library: raw bytes."""
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in shards(folder, split)]
    yield from webdataset.WebDataset(paths, shardshuffle=False)


class TestWebDataset:
    @pytest.mark.parametrize("name", ["train", "val", "unlabeled"])
    def test_each_sample_with_key_bytes_and_label(self, mixed: Path, mixed_webdataset: Path, name: str) -> None:
        original = open_source(mixed).splits[name]
        split = open_converted(mixed_webdataset).splits[name]
        samples = list(samples_of_tars(mixed_webdataset, name))
        assert [sample["__key__"] for sample in samples] == [f"{position:09}" for position in range(len(original))]
        by_name = {each: index for index, each in enumerate(original.names)}
        for sample, in_records in zip(samples, split.names, strict=True):
            origin = by_name[in_records]
            components = {key for key in sample if not key.startswith("__")}
            extension = in_records.rpartition(".")[2]
            assert components == ({extension} if name == "unlabeled" else {extension, "cls"})
            assert sample[extension] == original.read(origin)  # all are passed through
            if name != "unlabeled":
                assert sample["cls"] == str(original.labels[origin]).encode()
        if name == "train":
            assert [by_name[each] for each in split.names] != list(range(len(original))), "shuffled"

    def test_shards(self, mixed_webdataset: Path) -> None:
        paths = shards(mixed_webdataset, "train")
        assert len(paths) > 2
        members: list[str] = []
        for number, path in enumerate(paths):
            assert path.name == f"train-{number:06}.tar"
            assert path.stat().st_size <= 64 << 10
            with tarfile.open(path) as tar:
                for member in tar:
                    members.append(member.name)
                    assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                    assert (member.uname, member.gname, member.isreg()) == ("", "", True)
            assert path.read_bytes()[-1024:] == bytes(1024)
        assert members[::2] == sorted(members[::2])
        assert [name[:9] for name in members[::2]] == [name[:9] for name in members[1::2]]

    def test_index_is_that_of_wds2idx(self, mixed_webdataset: Path, tmp_path: Path) -> None:
        index_creator = pytest.importorskip("wds2idx").IndexCreator
        for split in ("train", "val", "unlabeled"):
            for path in shards(mixed_webdataset, split):
                theirs = tmp_path / "theirs.idx"
                with index_creator(str(path), str(theirs), verbose=False) as creator:
                    creator.create_index()
                assert path.with_suffix(".idx").read_text() == theirs.read_text()


@needs_dali
class TestDali:
    @pytest.mark.parametrize(("name", "extensions"), [("train", ["jpg;png", "cls"]), ("unlabeled", ["jpg;png"])])
    def test_bytes_and_labels(self, foreign, mixed_webdataset: Path, name: str, extensions: list[str]) -> None:
        split = open_converted(mixed_webdataset).splits[name]
        images, *labels = foreign(read_with_dali, shards(mixed_webdataset, name), *extensions)
        assert images == [split.read_stored(index) for index in range(len(split))]
        assert labels == ([[str(label).encode() for label in split.labels]] if name == "train" else [])


class TestEveryKindOfJpegThatIsPassedThrough:
    """The decoders of training see what Pillow sees, EXIF orientation and all."""

    @pytest.fixture
    def kinds(self, tmp_path: Path) -> Path:
        files = {f"a/{number:02}.jpg": data for number, data in enumerate(PASSED_JPEGS.values())}
        root = write_files(tmp_path / "source", files)
        for format in ("ffcv", "webdataset"):
            summary = convert(root, tmp_path / format, ConvertOptions(format=format, order="source"), workers=1)
            assert summary["passed_through"] == len(files)
        return tmp_path

    @needs_ffcv
    def test_ffcv(self, foreign, kinds: Path) -> None:
        cv2 = pytest.importorskip("cv2")
        images, _ = foreign(read_with_ffcv, kinds / "ffcv" / "train.beton", os_cache=True, order="SEQUENTIAL")
        for image, (kind, data) in zip(images, PASSED_JPEGS.items(), strict=True):
            expected = cv2.resize(middle_of(truth(data)), (16, 16), interpolation=cv2.INTER_AREA)
            assert np.abs(image.astype(int) - expected).mean() < 3.0, kind

    @needs_dali
    def test_dali(self, foreign, kinds: Path) -> None:
        (images,) = foreign(read_with_dali, shards(kinds / "webdataset", "train"), "jpg", decode=True)
        for image, (kind, data) in zip(images, PASSED_JPEGS.items(), strict=True):
            expected = truth(data)
            assert image.shape == expected.shape, kind
            assert np.abs(image.astype(int) - expected).mean() < 3.0, kind


def as_bytes(image: np.ndarray, label: np.ndarray) -> bytes:
    return image.tobytes() + bytes(label)


def middle_of(image: np.ndarray) -> np.ndarray:
    """The largest square in the middle."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return np.ascontiguousarray(image[top : top + side, left : left + side])

"""Parts of a conversion, joined, are what the conversion in one go makes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.merge import merge
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.verify import verify
from dataset_tools.formats.manifest import Manifest
from dataset_tools.sources.converted import open_converted
from tests.dataset_tools.conversion.pictures import encoded, flat
from tests.dataset_tools.conversion.trouble import mixed_files
from tests.dataset_tools.made_up import folder_bytes, write_files, write_tar

NUM_PARTS = 3
OPTIONS = {
    "ffcv": ConvertOptions(format="ffcv"),
    "ffcv shuffled": ConvertOptions(format="ffcv", order="shuffled", seed=4),
    "webdataset": ConvertOptions(format="webdataset", shard_size="64KiB"),
    "webdataset in order": ConvertOptions(format="webdataset", shard_size="64KiB", order="source"),
}


@pytest.fixture(scope="module")
def made(mixed_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each of OPTIONS: the whole, and its parts."""
    folder = tmp_path_factory.mktemp("made")
    for name, options in OPTIONS.items():
        convert(mixed_tar, folder / name / "whole", options, workers=1)
        for number in range(1, NUM_PARTS + 1):
            part = replace(options, part=f"{number}/{NUM_PARTS}")
            convert(mixed_tar, folder / name / f"part{number}", part, workers=1)
    return folder


def parts(folder: Path) -> list[Path]:
    return [folder / f"part{number}" for number in range(1, NUM_PARTS + 1)]


class TestJoined:
    @pytest.mark.parametrize("name", OPTIONS)
    def test_every_file_is_that_of_the_whole(self, made: Path, tmp_path: Path, name: str) -> None:
        summary = merge(parts(made / name), tmp_path / "joined", workers=2)
        assert folder_bytes(tmp_path / "joined") == folder_bytes(made / name / "whole")
        whole = Manifest.load(made / name / "whole")
        assert summary["samples"] == sum(split.samples for split in whole.splits.values())
        assert summary["quarantined"] == sum(split.quarantined for split in whole.splits.values()) == 28
        assert not (tmp_path / "joined.partial").exists()

    def test_a_part_with_larger_pages(self, tmp_path: Path) -> None:
        """Only the middle part has the image that makes pages of 16 MiB; then the whole has them, too."""
        files = {f"a/{number:02}.jpg": encoded(flat((number, 0, 0))) for number in range(9)}
        files["a/04.jpg"] = encoded(flat((4, 0, 0), 1800, 1600), "BMP")
        (root := tmp_path / "source").mkdir()
        write_files(root, {name.replace("04.jpg", "04.bmp"): data for name, data in files.items()})
        options = ConvertOptions(format="ffcv", max_side=0)
        convert(root, tmp_path / "whole", options, workers=1)
        for number in (1, 2, 3):
            convert(root, tmp_path / f"part{number}", replace(options, part=f"{number}/3"), workers=1)
        pages = [Manifest.load(part).splits["train"].page_bytes for part in parts(tmp_path)]
        assert pages == [8 << 20, 16 << 20, 8 << 20]
        merge(parts(tmp_path), tmp_path / "joined", workers=1)
        assert folder_bytes(tmp_path / "joined") == folder_bytes(tmp_path / "whole")


class TestSplits:
    @pytest.mark.parametrize("name", OPTIONS)
    def test_train_and_val_made_apart(self, mixed_tar: Path, made: Path, tmp_path: Path, name: str) -> None:
        for split in ("train", "val"):
            convert(mixed_tar, tmp_path / split, replace(OPTIONS[name], split=split), workers=1)
        merge([tmp_path / "val", tmp_path / "train"], tmp_path / "joined", workers=1)
        found, expected = folder_bytes(tmp_path / "joined"), folder_bytes(made / name / "whole")
        joined, whole = Manifest.load(tmp_path / "joined"), Manifest.load(made / name / "whole")
        assert joined.splits == whole.splits
        assert (joined.classes, joined.source, joined.versions) == (whole.classes, whole.source, whole.versions)
        assert {each["split"] for each in joined.options["merged"]} == {"train", "val"}
        del found["manifest.json"], expected["manifest.json"]
        assert found == expected
        assert verify(tmp_path / "joined", source=mixed_tar, deep=True, workers=1)["problems"] == []

    def test_different_sources(self, tmp_path: Path) -> None:
        """train of one folder and val of another, with the same classes."""
        for split in ("train", "val"):
            root = write_files(tmp_path / f"of {split}", {f"{split}/a/1.jpg": encoded(flat((1, 2, 3)))})
            convert(root, tmp_path / split, ConvertOptions(format="ffcv"), workers=1)
        merge([tmp_path / "train", tmp_path / "val"], tmp_path / "joined", workers=1)
        joined = open_converted(tmp_path / "joined")
        assert {name: list(split.names) for name, split in joined.splits.items()} == {
            "train": ["train/a/1.jpg"],
            "val": ["val/a/1.jpg"],
        }
        assert len(Manifest.load(tmp_path / "joined").source["merged"]) == 2


class TestRefused:
    """And no destination is made."""

    @pytest.fixture
    def refused(self, tmp_path: Path) -> Callable[[list[Path], str], None]:
        def merge_and_match(given: list[Path], message: str) -> None:
            with pytest.raises(ValueError, match=message):
                merge(given, tmp_path / "joined", workers=1)
            assert not (tmp_path / "joined").exists()

        return merge_and_match

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("", "there is nothing to merge: give the folders of the parts, then the destination"),
            ("part2 part3", r"of train, which was converted in 3 part\(s\), these are given: 2/3, 3/3; give each part"),
            ("part1 part3", "these are given: 1/3, 3/3; give each part once"),
            ("part1 part2", "these are given: 1/3, 2/3; give each part once"),
            ("part1 part2 part3 part2", "these are given: 1/3, 2/3, 2/3, 3/3; give each part once"),
            ("whole part1", "give each part once"),
            ("whole whole", "these are given: 1/1, 1/1; give each part once"),
            ("part1 part2 ../webdataset/part3", "part1 is ffcv and .*part3 webdataset"),
        ],
    )
    def test_parts_that_make_no_whole(self, made: Path, refused, given: str, message: str) -> None:
        refused([made / "ffcv" / name for name in given.split()], message)

    def test_a_part_of_two_thousand_million(self, made: Path, tmp_path: Path, refused) -> None:
        """Their list would not fit into the memory."""
        shutil.copytree(made / "ffcv" / "part1", tmp_path / "part1")
        replace(Manifest.load(tmp_path / "part1"), part=(1, 1 << 31)).save(tmp_path / "part1")
        refused([tmp_path / "part1"], "which was converted in 2147483648 part.*are given: 1/2147483648; give each")

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"part": "2/2"}, "these are given: 1/3, 2/2, 2/3; give each part once"),
            ({"part": "3/3", "quality": 80}, r"differ in options: \{.*90.*\} and \{.*80.*\}"),
            ({"part": "3/3"}, "differ in source: "),
        ],
    )
    def test_parts_of_different_conversions(
        self, made: Path, tmp_path: Path, refused, changed: dict[str, object], message: str
    ) -> None:
        num_train = 299 if "source" in message else 300
        other = write_tar(tmp_path / "other.tar", mixed_files(num_train, 60))
        convert(other, tmp_path / "other", replace(OPTIONS["ffcv"], **changed), workers=1)
        refused([*parts(made / "ffcv")[:2], tmp_path / "other"], message)

    def test_different_classes(self, made: Path, tmp_path: Path, refused) -> None:
        root = write_files(tmp_path / "source", {"test/other class/1.jpg": encoded(flat((1, 2, 3)))})
        convert(root, tmp_path / "test", ConvertOptions(format="ffcv"), workers=1)
        refused([made / "ffcv" / "whole", tmp_path / "test"], "whole and .*test have different class lists")

    @pytest.mark.parametrize(
        "file",
        [
            *("ffcv/val.beton", "ffcv/train.records.safetensors"),
            *("webdataset/train-000000.tar", "webdataset/train-000000.idx"),
        ],
    )
    def test_a_damaged_part(self, made: Path, tmp_path: Path, refused, file: str) -> None:
        name, file = file.split("/")
        given = parts(made / name)
        given[1] = Path(shutil.copytree(given[1], tmp_path / "damaged"))
        path = given[1] / file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        for damaged in (data, data[:-1]):
            path.write_bytes(damaged)
            refused(given, rf"damaged/{file} is not what its manifest says: it.*\. Convert that part again")
        path.unlink()
        refused(given, rf"damaged/{file} is not what its manifest says: it is missing")

    @pytest.mark.parametrize("name", ["part1", "part1/inside", "", "part1 by a link", "like a part"])
    def test_a_destination_that_would_harm_a_part(self, made: Path, tmp_path: Path, name: str) -> None:
        given = [Path(shutil.copytree(part, tmp_path / part.name)) for part in parts(made / "ffcv")]
        (tmp_path / "part1 by a link").symlink_to(given[0])
        if name == "like a part":
            given[0] = given[0].rename(tmp_path / "like a part.partial")
        before = folder_bytes(given[0])
        with pytest.raises(FileExistsError, match=r"merge would write into .*, and the part .* is there"):
            merge(given, tmp_path / name, workers=1)
        assert folder_bytes(given[0]) == before

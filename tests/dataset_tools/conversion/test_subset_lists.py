"""Lists of images: nested and class-balanced, the same for ever; and the published ones."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import open_source
from dataset_tools.sources.converted import open_converted
from dataset_tools.subset_lists import percent_of, read_subset_list, write_subset_list
from tests.dataset_tools.conversion.pictures import encoded, flat
from tests.dataset_tools.made_up import NamedSplit, write_files

PERCENTS = (1, 2, 5, 10, 20, 50, 100)
TEN_PERCENT_SHA256 = "9152b58c54d68ab678623ac3ae6e116ae54bdd90668a4069a19c8293d3df1ac0"
HARD_NAMES = [
    "a/new\nline.jpg",
    "a/carriage\rreturn.jpg",
    "a/line\u2028separator.jpg",
    "a/ leading and trailing ",
    '"a"/quoted.jpg',
    "a/back\\slash.jpg",
    os.fsdecode(b"a/\xff\xfe.jpg"),
    "a/日本 clässe.jpg",
    "a/tab\there.jpg",
    "a/nul\0l.jpg",
    "#a/comment.jpg",
    "\ufeffa/mark.jpg",
]


def imagenet_like(per_class: int = 130, num_classes: int = 10) -> NamedSplit:
    classes = tuple(f"n{label:08}" for label in range(num_classes))
    names = [f"train/{each}/{each}_{number}.JPEG" for each in classes for number in range(per_class)]
    labels = [label for label in range(num_classes) for _ in range(per_class)]
    return NamedSplit(names, labels, classes)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    return path


class TestPercent:
    @pytest.mark.parametrize("seed", [0, 1, -5])
    def test_nested_balanced_and_sorted(self, seed: int) -> None:
        split = imagenet_like()
        before: set[int] = set()
        for percent in PERCENTS:
            indices = percent_of(split, percent, seed)
            assert indices.dtype == np.int64
            assert len(indices) == round(1300 * percent / 100)
            assert (np.diff(indices) > 0).all()
            per_class = np.bincount(split.labels[indices], minlength=10)
            assert per_class.max() - per_class.min() <= 1
            assert before < set(indices.tolist())
            before = set(indices.tolist())
        assert len(before) == 1300

    def test_uneven_classes(self) -> None:
        split = NamedSplit([str(number) for number in range(111)], [0] * 100 + [1] * 10 + [2], ("a", "b", "c"))
        assert np.bincount(split.labels[percent_of(split, 10, 0)]).tolist() == [5, 5, 1]
        assert np.bincount(split.labels[percent_of(split, 50, 0)]).tolist() == [45, 10, 1]

    def test_seeds_differ_and_one_stays_as_it_is(self) -> None:
        split = imagenet_like()
        first = percent_of(split, 1, 0)
        np.testing.assert_array_equal(first, percent_of(imagenet_like(), 1, 0))
        assert len(np.intersect1d(first, percent_of(split, 1, 1))) < len(first)
        digest = hashlib.sha256(percent_of(split, 10, 0).astype("<i8").tobytes()).hexdigest()
        assert digest == TEN_PERCENT_SHA256, "the choice of a seed must never change: results are published with it"

    def test_names_choose_and_not_their_order(self) -> None:
        """A shuffled data set gives the images that its source gives, also where names begin with the split."""
        split = imagenet_like()
        chosen = {split.names[index] for index in percent_of(split, 10, 0).tolist()}
        order = np.random.default_rng(0).permutation(len(split))
        names = [split.names[index].removeprefix("train/") for index in order.tolist()]
        shuffled = NamedSplit(names, split.labels[order].tolist(), split.classes)
        assert {f"train/{names[index]}" for index in percent_of(shuffled, 10, 0).tolist()} == chosen

    @pytest.mark.parametrize("percent", [0, -1, 100.5, float("nan"), float("inf")])
    def test_what_is_not_allowed(self, percent: float) -> None:
        with pytest.raises(ValueError, match=r"--percent .* is not allowed: give a number above 0 and at most 100"):
            percent_of(imagenet_like(), percent, 0)


class TestWrite:
    def test_file_and_summary(self, tmp_path: Path) -> None:
        split = imagenet_like()
        indices = percent_of(split, 2, 3)
        path = tmp_path / "two percent.txt"
        summary = write_subset_list(path, split, indices)
        assert path.read_text() == "".join(split.names[index] + "\n" for index in indices)
        assert summary == {
            "out": str(path),
            "samples": 26,
            "min_per_class": 2,
            "max_per_class": 3,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        assert [each.name for each in tmp_path.iterdir()] == ["two percent.txt"]
        np.testing.assert_array_equal(read_subset_list(path, split), indices)

    def test_names_that_are_hard_to_write(self, tmp_path: Path) -> None:
        split = NamedSplit(HARD_NAMES, [0] * len(HARD_NAMES), ("a",))
        for chosen in (range(len(HARD_NAMES)), *([index] for index in range(len(HARD_NAMES)))):
            indices = np.array(list(chosen))
            write_subset_list(tmp_path / "list.txt", split, indices)
            assert len((tmp_path / "list.txt").read_text().split("\n")) == len(indices) + 1
            np.testing.assert_array_equal(read_subset_list(tmp_path / "list.txt", split), indices)


class TestRead:
    """Of a split as `imagenet_like` has it, whose classes have 130 images each."""

    @pytest.mark.parametrize(
        ("text", "indices"),
        [
            ("n00000007_3.JPEG\nn00000000_129.JPEG\nn00000000_0.JPEG\n", [0, 129, 913]),  # as papers publish them
            ("n00000001/n00000001_5.JPEG\ntrain/n00000002/n00000002_5.JPEG\nn00000003_5.JPEG\n", [135, 265, 395]),
            ("n00000001_5.JPEG\r\n\r\nn00000002_5.JPEG\r\n", [135, 265]),
            ("\ufeffn00000001_5.JPEG\nn00000002_5.JPEG", [135, 265]),
            ("./n00000001/n00000001_5.JPEG \n\tn00000002_5.JPEG\t\n", [135, 265]),
        ],
        ids=[
            "base names",
            "partial and whole paths",
            "line ends of Windows",
            "byte order mark, no line end at the end",
            "as find writes them, blanks",
        ],
    )
    def test_names(self, tmp_path: Path, text: str, indices: list[int]) -> None:
        for encoding in ("utf-8", "utf-16"):  # Excel and PowerShell write the second
            (tmp_path / "list.txt").write_bytes(text.encode(encoding))
            assert read_subset_list(tmp_path / "list.txt", imagenet_like()).tolist() == indices

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["_5.JPEG"], r"1 of the 1 images of the list .*list.txt are not there: '_5.JPEG'"),
            (
                ["n00000001_5.JPEG", *(f"gone{number}.jpg" for number in range(7))],
                r"7 of the 8 images .*are not there: 'gone0.jpg', .*'gone4.jpg'$",
            ),
            (["n00000001_5.JPEG", "n2.JPEG", "n00000001_5.JPEG"], r"names 'n00000001_5\.JPEG' more than once"),
            ([*map(str, range(200_000)), "199999"], r"names '199999' more than once"),
            (["n00000001_5.JPEG", "n00000001/n00000001_5.JPEG"], "names an image more than once, in different words"),
            (["", "  "], r"the list .*list.txt is empty"),
            (["n\0" * 5], "is no text in UTF-8, or in UTF-16 with its mark"),
            (['"open'], "begins with a quotation mark, but is no JSON string"),
        ],
        ids=[
            "part of a name",
            "missing",
            "twice",
            "the last of many twice",
            "other words",
            "empty",
            "zeros",
            "quotation mark",
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, lines: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_subset_list(write_lines(tmp_path / "list.txt", *lines), imagenet_like())

    def test_no_list(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no list .*list.txt"):
            read_subset_list(tmp_path / "list.txt", imagenet_like())

    def test_an_ambiguous_name(self, tmp_path: Path) -> None:
        split = NamedSplit(["a/1.jpg", "a/2.jpg", "b/1.jpg"], [0, 0, 1], ("a", "b"))
        with pytest.raises(ValueError, match=r"'1.jpg' of the list .* could be 'a/1.jpg' or 'b/1.jpg'"):
            read_subset_list(write_lines(tmp_path / "list.txt", "2.jpg", "1.jpg"), split)
        assert read_subset_list(write_lines(tmp_path / "list.txt", "b/1.jpg"), split).tolist() == [2]

    def test_a_whole_name_is_never_ambiguous(self, tmp_path: Path) -> None:
        """Though it is the end of another one."""
        split = NamedSplit(["1.jpg", "a/1.jpg", "b/a/1.jpg"], [0, 0, 0], ("a",))
        for names in (*([name] for name in split.names), split.names):
            found = read_subset_list(write_lines(tmp_path / "list.txt", *names), split)
            assert [split.names[index] for index in found] == list(names)


def test_a_list_fits_the_source_and_what_was_made_of_it(tmp_path: Path, format: str) -> None:
    names = [f"{label}/{number:02}.jpg" for label in "abc" for number in range(20)]
    root = write_files(tmp_path / "source", {name: encoded(flat((7, 7, 7))) for name in names})
    convert(root, tmp_path / "made", ConvertOptions(format=format), workers=1)
    original, made = open_source(root).splits["train"], open_converted(tmp_path / "made").splits["train"]
    path = tmp_path / "list.txt"
    write_subset_list(path, original, percent_of(original, 10, 0))
    chosen = made.subset(read_subset_list(path, made))
    assert sorted(chosen.names) == path.read_text().splitlines()
    assert np.bincount(chosen.labels).tolist() == [2, 2, 2]
    again = pickle.loads(pickle.dumps(chosen))
    assert [again.read(index) for index in range(6)] == [chosen.read(index) for index in range(6)]

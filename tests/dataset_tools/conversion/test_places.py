"""Where a conversion may go, what it must not touch, and a source that does not stay where it was."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dataset_tools.conversion import convert as convert_module
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.merge import merge
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import ImageSource, open_source
from dataset_tools.sources.image_folder import open_image_folder
from tests.dataset_tools.conversion.pictures import encoded, flat
from tests.dataset_tools.made_up import folder_bytes, write_files

FFCV = ConvertOptions(format="ffcv")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve JPEGs of two classes."""
    images = {f"{'ab'[index % 2]}/{index:02}.jpg": encoded(flat((20 * index, 0, 0))) for index in range(12)}
    return write_files(tmp_path / "source", images)


def test_a_working_folder_that_is_not_ours_is_left_alone(source: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "made.partial"
    foreign.mkdir()
    (foreign / "train.beton").write_text("precious")
    for _ in range(2):
        with pytest.raises(FileExistsError, match=r"made\.partial is needed for the work, but there is"):
            convert(source, tmp_path / "made", FFCV)
        assert folder_bytes(foreign) == {"train.beton": b"precious"}
    shutil.move(foreign, tmp_path / "elsewhere")
    convert(source, tmp_path / "made", FFCV)
    shutil.move(tmp_path / "elsewhere", foreign)
    convert(source, tmp_path / "made", FFCV)  # whole already
    assert folder_bytes(foreign) == {"train.beton": b"precious"}


def test_a_link_to_an_empty_folder_is_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    summary = convert(source, tmp_path / "link", FFCV)
    assert (tmp_path / "disk" / "manifest.json").is_file()
    assert (tmp_path / "link").is_symlink()
    assert summary["samples"] == 12


def test_whole_already_is_looked_at(source: Path, tmp_path: Path) -> None:
    (source / "a" / "bad.jpg").write_bytes(b"")
    convert(source, tmp_path / "made", FFCV)
    before = folder_bytes(tmp_path / "made")
    again = convert(source, tmp_path / "made", FFCV)
    assert (again["samples"], again["quarantined"]) == (12, 1)
    with pytest.raises(FileExistsError, match="of another source or with other options"):
        convert(source, tmp_path / "made", replace(FFCV, quality=80))
    convert(source, tmp_path / "other", replace(FFCV, format="webdataset"))
    with pytest.raises(FileExistsError, match="made is a converted data set already; the last folder of merge is"):
        merge([tmp_path / "other"], tmp_path / "made")
    assert folder_bytes(tmp_path / "made") == before
    with pytest.raises(ValueError, match="1 images are in quarantine, which --strict forbids"):
        convert(source, tmp_path / "made", FFCV, strict=True)
    (tmp_path / "made" / "train.beton").unlink()
    with pytest.raises(FileNotFoundError, match=r"made lacks train\.beton, which its manifest lists; delete it"):
        convert(source, tmp_path / "made", FFCV)


@pytest.mark.parametrize("what", ["one image", "everything"])
def test_a_source_that_goes_away_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """An image that cannot be read is no bad image: the conversion stops, and goes on when the source is back."""
    convert(source, tmp_path / "expected", FFCV)
    gone = source / "b" / "03.jpg" if what == "one image" else source

    def open_and_lose(path: Path) -> ImageSource:
        opened = open_image_folder(Path(path))
        gone.rename(tmp_path / "away")
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "open_source", open_and_lose)
        with pytest.raises(OSError, match="A source must not change while it is converted: nothing was left out"):
            convert(source, tmp_path / "made", FFCV, workers=2)
    (tmp_path / "away").rename(gone)
    convert(source, tmp_path / "made", FFCV, workers=1)
    assert folder_bytes(tmp_path / "made") == folder_bytes(tmp_path / "expected")


def test_a_named_pipe_does_not_hang(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "a" / "pipe.jpg")
    summary = convert(source, tmp_path / "made", FFCV)
    assert (summary["samples"], summary["quarantined"]) == (12, 1)


def test_a_split_without_a_usable_image_is_no_success(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "tree/train").mkdir(parents=True, exist_ok=True)
        (source / name).rename(tmp_path / "tree/train" / name)
    (tmp_path / "tree/val/a").mkdir(parents=True)
    (tmp_path / "tree/val/a/junk.jpg").write_bytes(b"junk")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 1 images of val can be used; .* val/a/junk.jpg: "):
            convert(tmp_path / "tree", tmp_path / "made", FFCV)
    assert not (tmp_path / "made").exists()
    convert(tmp_path / "tree", tmp_path / "train only", replace(FFCV, split="train"))
    assert list(open_source(tmp_path / "train only").splits) == ["train"]

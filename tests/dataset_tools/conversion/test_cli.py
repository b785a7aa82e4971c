"""`python -m dataset_tools`: what it prints, what it returns, and that it needs no torch."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.cli import main
from dataset_tools.command_line import PACKAGES
from dataset_tools.formats.manifest import Manifest
from tests.dataset_tools.conversion.pictures import black_png, encoded, flat
from tests.dataset_tools.made_up import write_files

REPOSITORY = Path(__file__).parents[3]
NUM_TRAIN, NUM_VAL = 24, 6


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A command line gives the packages' loggers handlers of its own."""
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in map(logging.getLogger, PACKAGES)]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of train, of which one is damaged, one CMYK and one a PNG; 6 of val."""
    files = {}
    for number in range(NUM_TRAIN + NUM_VAL):
        split = "train" if number < NUM_TRAIN else "val"
        files[f"{split}/class{number % 3}/{number:02}.jpg"] = encoded(flat((number, 0, 50), 60, 40))
    files["train/class0/00.jpg"] = b"damaged"
    files["train/class1/01.jpg"] = encoded(flat((1, 0, 50), 60, 40).convert("CMYK"))
    del files["train/class2/02.jpg"]
    files["train/class2/02.png"] = encoded(flat((2, 0, 50), 60, 40), "PNG")
    return write_files(tmp_path_factory.mktemp("command"), files)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(exited.value.code, int)
    return exited.value.code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[dict[str, Any], str]:
    """The JSON on the last line, and all of stdout."""
    found, out, err = run(capsys, *arguments, "--json")
    assert (found, err) == (code, ""), out
    return json.loads(out.splitlines()[-1]), out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def made(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> Path:
    assert run(capsys, "convert", source, tmp_path / "made", "--format", "ffcv", "--workers", 1)[0] == 0
    return tmp_path / "made"


class TestConvert:
    def test_summary(self, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, format: str) -> None:
        target = tmp_path / "made"
        summary, out = document(capsys, "convert", source, target, "--format", format, "--workers", 1)
        largest = {"max_width": 60, "max_height": 40, "ffcv_decode_bytes": 5 * 256 * 60 * 40 * 3}
        lossless = format == "ffcv"
        reasons = {"CMYK": 1} | ({"PNG, kept lossless": 1} if lossless else {})
        expected = {
            "destination": str(target),
            "format": format,
            "check": "header",
            "samples": 29,
            "passed_through": 29 - len(reasons),
            "reencoded": len(reasons),
            "reencoded_because": reasons,
            "quarantined": 1,
            "bytes": sum(path.stat().st_size for path in target.iterdir() if path.suffix in (".beton", ".tar", ".idx")),
            "splits": {
                "train": {"samples": 23, "quarantined": 1} | largest,
                "val": {"samples": 6, "quarantined": 0} | largest,
            },
        }
        assert {key: value for key, value in summary.items() if key not in ("images_per_s", "seconds")} == expected
        assert summary["seconds"] > 0
        assert summary["images_per_s"] > 0
        assert "in quarantine 1" in out
        assert "  re-encoded, CMYK: 1\n" in out
        assert ("largest 60 x 40, FFCV decodes in 0.01 GiB (batch 256)" in out) == lossless

    def test_flags_arrive(self, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
        flags = (
            "--format webdataset --split train --mode reencode --check decode --order source --seed 7 --short-side 30"
        )
        flags += " --max-side 44 --quality 77 --shard-size 64KiB --part 1/2 --workers 1"
        summary, _ = document(capsys, "convert", source, tmp_path / "made", *flags.split())
        assert (summary["samples"], summary["reencoded"], list(summary["splits"])) == (11, 11, ["train"])
        assert (summary["splits"]["train"]["max_width"], summary["splits"]["train"]["max_height"]) == (44, 29)
        assert Manifest.load(tmp_path / "made").options == {
            "format": "webdataset",
            "split": "train",
            "mode": "reencode",
            "check": "decode",
            "order": "source",
            "short_side": 30,
            "max_side": 44,
            "quality": 77,
            "shard_size": 64 << 10,
            "part": "1/2",
        }

    def test_memory_of_large_images(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Of the largest width and the largest height, which need not be those of one image."""
        root = write_files(tmp_path / "source", {"a/1.png": black_png(1600, 10), "a/2.png": black_png(10, 1400)})
        flags = ("--format", "ffcv", "--max-side", 0)
        summary, out = document(capsys, "convert", root, tmp_path / "made", *flags)
        assert summary["splits"]["train"]["ffcv_decode_bytes"] == 5 * 256 * 1600 * 1400 * 3
        assert "warning: 8.011 GiB are above 4 GiB; --mode auto with --max-side limits it" in out
        _, out = document(capsys, "convert", root, tmp_path / "limited", "--format", "ffcv")
        assert "warning" not in out
        assert "4.00 GiB" in out

    def test_errors(self, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
        for flags, words in (
            (("--quality", 0), "quality 0 is not allowed: give at least 1 and at most 100"),
            (("--split", "test"), "there is no split 'test' in"),
            (
                ("--strict", "--workers", 1),
                "train/class0/00.jpg cannot be used: it is no image of a format that is read (JPEG, ",
            ),
        ):
            assert words in refused(capsys, "convert", source, tmp_path / "new", "--format", "ffcv", *flags)
        assert not (tmp_path / "new").exists()


def test_damaged(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    (made / "val.beton").unlink()
    result, out = document(capsys, "verify", made, code=1)
    assert result == {"ok": False, "num_problems": 1, "problems": ["val.beton: it is missing"], "samples": 29}
    assert "val.beton: it is missing\n" in out
    assert f"{made}: NOT whole: 1 problem(s); 29 samples\n" in out


def test_from_the_manifest_alone(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    for path in made.iterdir():
        if path.name != "manifest.json":
            path.unlink()
    result, out = document(capsys, "inspect", made)
    manifest = Manifest.load(made)
    assert result["classes"] == ["class0", "class1", "class2"]
    assert result["splits"]["train"]["samples"] == 23
    assert result["splits"]["train"]["ffcv_decode_bytes"] == 5 * 256 * 60 * 40 * 3
    assert result["options"] == manifest.options
    assert f"made of: image folder, fingerprint {manifest.source['fingerprint']}\n" in out
    assert "max_side 1057" in out
    assert "29 samples" in out


class TestSubset:
    def test_percent(self, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
        out = tmp_path / "list.txt"
        result, _ = document(capsys, "subset", source, "--percent", 25, "--seed", 3, "--out", out)
        assert (result["samples"], result["min_per_class"], result["max_per_class"]) == (6, 2, 2)
        assert (result["percent"], result["seed"], result["out"]) == (25.0, 3, str(out))
        sha256sum = subprocess.run(["sha256sum", out], capture_output=True, text=True, check=True).stdout
        assert sha256sum.split()[0] == result["sha256"]

    def test_errors(self, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
        out = ("--out", tmp_path / "list.txt")
        assert "give either --percent P or --list FILE" in refused(capsys, "subset", source, *out)
        both = ("--percent", 1, "--list", "x")
        assert "give either --percent P or --list FILE" in refused(capsys, "subset", source, *both, *out)
        message = refused(capsys, "subset", source, "--percent", 1, "--split", "test", *out)
        assert "there is no split 'test'" in message
        assert "it has train, val" in message
        assert not (tmp_path / "list.txt").exists()


def test_errors(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    for folders in ((), (made,)):
        message = refused(capsys, "merge", *folders)
        assert message == "error: merge needs the folders of the parts, and then the destination"


class TestMisuse:
    @pytest.mark.parametrize(
        "line",
        [
            "convert SOURCE DEST",
            "convert SOURCE DEST --format tfrecord",
            "convert SOURCE DEST --format ffcv --qualty 50",
            "convert SOURCE DEST --format ffcv --quality high",
            "inspect",
        ],
    )
    def test_wrong_flags_exit_with_2(self, capsys: pytest.CaptureFixture[str], line: str) -> None:
        code, _, err = run(capsys, *line.split())
        assert code == 2
        assert "Traceback" not in err
        assert not Path("DEST").exists()

    def test_unknown_commands_name_the_nearest(self, capsys: pytest.CaptureFixture[str]) -> None:
        message = refused(capsys, "verfy")
        assert "there is no command 'verfy'. Did you mean verify" in message
        assert "Allowed: convert, verify, inspect, subset, merge." in message

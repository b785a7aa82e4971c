"""Damaged journals, files, sources and data sets: each is found, and named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from dataset_tools.cli import main
from dataset_tools.conversion import split_conversion, staging
from dataset_tools.conversion.convert import _Conversion, convert
from dataset_tools.conversion.merge import merge
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.staging import staged
from dataset_tools.conversion.verify import verify
from dataset_tools.formats.manifest import Manifest
from dataset_tools.formats.records import SampleRecords
from dataset_tools.sources import ImageSource, open_source
from dataset_tools.sources.converted import open_converted
from dataset_tools.stop_signals import StoppedBySignalError
from tests.dataset_tools.conversion.trouble import contents, jpeg, mixed_files, options, tampered
from tests.dataset_tools.made_up import write_tar


@pytest.fixture
def data(mixed_whole: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(mixed_whole, tmp_path / "data"))


# The unfinished conversion


def journal_state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "journal.json").read_text().split("\n")[1])["state"])


@pytest.fixture
def unfinished(mixed_tar: Path, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DEST.partial of a conversion that stopped in the val split, train being finished."""
    with monkeypatch.context() as patch:
        patch.setattr(split_conversion, "CHUNK_IMAGES", 8)
        add = split_conversion.SplitConversion.add

        def stopping(self: Any, *given: Any) -> None:
            add(self, *given)
            if self.split.name == "val" and self.state.done >= 32:
                raise StoppedBySignalError("for the test")

        patch.setattr(split_conversion.SplitConversion, "add", stopping)
        with pytest.raises(StoppedBySignalError):
            convert(mixed_tar, tmp_path / "made", options(format), workers=1, journal_every_s=0)
    folder = tmp_path / "made.partial"
    state = journal_state(folder)
    assert state["splits"]["train"]["done"] == 300
    assert 0 < state["splits"]["val"]["done"] < 60
    assert state["quarantine_bytes"] > 0
    return folder


def test_an_unfinished_conversion_continues(unfinished: Path, mixed_tar: Path, mixed_whole: Path, format: str) -> None:
    """Also where its files are longer than the journal says: they are cut back."""
    for path in (*unfinished.glob("val*.beton"), *unfinished.glob("val*.tar"), *unfinished.glob("*.rows")):
        if path.name != "train.rows":
            with open(path, "ab") as file:
                file.write(b"what was written after the journal" * 1000)
    with open(unfinished / "quarantine.jsonl", "ab") as file:
        file.write(b'{"half a li')
    (unfinished / ".journal.json.0123456789abcdef.tmp").write_text("half a journal")
    convert(mixed_tar, unfinished.with_name("made"), options(format), workers=2)
    assert contents(unfinished.with_name("made")) == contents(mixed_whole)
    assert not unfinished.exists()


def dying_finish(*_: Any) -> None:
    raise StoppedBySignalError("for the test")


def flip(path: Path, at: int, bits: int = 0x10) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ bits]))


@pytest.mark.parametrize("damage", ["flips", "truncated", "empty", "binary"])
def test_a_damaged_journal(unfinished: Path, mixed_tar: Path, format: str, damage: str) -> None:
    path = unfinished / "journal.json"
    text = path.read_bytes()
    chance = random.Random(7)
    if damage == "flips":
        variants = []
        for _ in range(12):
            at = chance.randrange(len(text) - 1)  # the last byte is the end of the line
            variants.append(text[:at] + bytes([text[at] ^ (1 << chance.randrange(8))]) + text[at + 1 :])
    elif damage == "truncated":
        variants = [text[: chance.randrange(1, len(text) - 1)] for _ in range(8)]
    else:
        variants = [b"" if damage == "empty" else bytes(range(256))]
    before = contents(unfinished)
    for variant in variants:
        path.write_bytes(variant)
        message = f"the journal {path} is damaged .*Delete {unfinished} to start anew"
        with pytest.raises(ValueError, match=message):
            convert(mixed_tar, unfinished.with_name("made"), options(format), workers=1)
    assert contents(unfinished).keys() - {"lock"} == before.keys() - {"lock"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(chance=st.randoms(use_true_random=True))
def test_a_tampered_journal_is_refused(
    unfinished: Path, opened_tar: ImageSource, format: str, chance: random.Random
) -> None:
    """Its checksum is made anew, as whoever tampers with it would; what is accepted would be converted further."""
    path, made = unfinished / "journal.json", unfinished.with_name("made")
    before = path.read_text()
    content = json.loads(before.split("\n")[1])
    values = [-5, -1, 0, 1, 10**9, 2**62, 10**20, 1.5, True, None, "x", "../victim", [], {}, [1], ["../victim"]]
    tampered(content["state"], values, chance)
    body = json.dumps(content)
    path.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")
    try:
        with pytest.raises(ValueError, match="to start anew"):
            continue_until_images_are_left(made, opened_tar, content["plan"], options(format))
    finally:
        path.write_text(before)


def continue_until_images_are_left(
    made: Path, source: ImageSource, plan: dict[str, Any], given: ConvertOptions
) -> None:
    with staged(made, plan) as staging:
        conversion = _Conversion(given, staging, 1, False, Mock(requested=False), 0)
        with patch.multiple(_Conversion, _check_room=Mock(), _transform=_nothing_left, _finish=Mock()):
            conversion.convert_splits(list(source.splits.values()))


def _nothing_left(_: Any, conversion: split_conversion.SplitConversion) -> None:
    assert not conversion.num_left, "the journal was accepted"


@pytest.fixture(scope="module")
def opened_tar(mixed_tar: Path) -> ImageSource:
    return open_source(mixed_tar)


@pytest.mark.parametrize("how", ["missing", "shorter"])
def test_a_file_that_the_journal_knows(
    unfinished: Path, mixed_tar: Path, format: str, how: str, mixed_whole: Path
) -> None:
    """Each of them, of the finished split and of the other: nothing is published without it."""
    images = {"ffcv": ("train.beton", "val.beton"), "webdataset": ("train-000001.tar", "val-000000.tar")}[format]
    copy = Path(shutil.copytree(unfinished, unfinished.with_name("copy")))
    for name in ("quarantine.jsonl", "train.rows", "val.rows", *images):
        path = unfinished / name
        if how == "missing":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if "val" not in name or ".tar" not in name else 512)
        with pytest.raises(ValueError, match=f"(shorter|another size|No such file).*Delete {unfinished}"):
            convert(mixed_tar, unfinished.with_name("made"), options(format), workers=1)
        assert not unfinished.with_name("made").exists()
        shutil.rmtree(unfinished)
        shutil.copytree(copy, unfinished)
    convert(mixed_tar, unfinished.with_name("made"), options(format), workers=1)
    assert contents(unfinished.with_name("made")) == contents(mixed_whole)


def test_an_unfinished_conversion_of_another_kind(
    unfinished: Path, mixed_tar: Path, format: str, mixed_whole: Path
) -> None:
    """The message says which option differs, and both values; nothing is touched."""
    made = unfinished.with_name("made")
    before = contents(unfinished)
    other = {"ffcv": "webdataset", "webdataset": "ffcv"}[format]
    for given, message in (
        (options(format, quality=71), "quality is 90 there and 71 here"),
        (options(format, split="val"), "split is None there and 'val' here"),
        (
            options(format, mode="reencode", max_side=40),
            r"max_side is (1057|None) there and 40 here; mode is 'auto' there",
        ),
        (options(other), f"format is '{format}' there and '{other}' here"),
    ):
        with pytest.raises(
            ValueError, match=f"holds an unfinished conversion of another kind: .*{message}.*to start anew"
        ):
            convert(mixed_tar, made, given)
    another = write_tar(unfinished.with_name("other.tar"), mixed_files(12, 0))
    with pytest.raises(ValueError, match=r"fingerprint is '[0-9a-f]{64}' there and '[0-9a-f]{64}' here"):
        convert(another, made, options(format))
    with pytest.raises(ValueError, match="another kind"):
        merge([mixed_whole], made)
    assert contents(unfinished) == before


def test_what_a_killed_merge_left_meets_no_other_files(
    mixed_whole: Path, format: str, mixed_tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        convert(mixed_tar, tmp_path / split, options(format, split=split), workers=2)
    made = tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying_finish)  # everything is in its last place but the folder itself
        patch.setattr(staging, "_remove", lambda _: None)  # as after SIGKILL
        with pytest.raises(StoppedBySignalError):
            merge([tmp_path / "train", tmp_path / "val"], made)
    for other in (lambda: merge([tmp_path / "val"], made), lambda: convert(mixed_tar, made, options(format))):
        with pytest.raises(ValueError, match=f"another kind: .*Delete {made}.partial to start anew"):
            other()
    merge([tmp_path / "val", tmp_path / "train"], made)
    assert verify(made)["ok"]
    assert set(os.listdir(made)) == set(os.listdir(mixed_whole))


# The converted data set


def problems(folder: Path, **given: Any) -> list[str]:
    result = verify(folder, workers=2, **given)
    assert result["ok"] == (not result["problems"]) == (result["num_problems"] == 0)
    return list(result["problems"])


def exit_code(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def places(folder: Path, name: str, chance: random.Random) -> list[int]:
    """Of every region of a file: its head, its tail, and anywhere in between."""
    size = (folder / name).stat().st_size
    found = [0, size - 1, *(chance.randrange(size) for _ in range(2))]
    if name.endswith(".beton"):
        entry = Manifest.load(folder).splits[name.split(".")[0]]
        rows = SampleRecords.open(folder / entry.records.name).rows()
        count, page = len(rows), entry.page_bytes or 0
        end = int(rows["offset"][-1] + rows["num_bytes"][-1])
        assert end % page
        head, table = 2104, size - 24 * count
        found += [chance.randrange(8), chance.randrange(24, head)]  # header, fields
        found += [head + chance.randrange(24 * count), chance.randrange(head + 24 * count, page)]  # metadata, padding
        found += [chance.randrange(page, end), chance.randrange(end, table)]  # images, padding
        found += [chance.randrange(table, size)]
    if name.endswith(".tar"):
        found += [chance.randrange(512), 512 + chance.randrange(100), size - chance.randrange(1, 1024)]
    return sorted(set(found))


def test_a_flipped_byte_is_found_in_every_file(data: Path, format: str, mixed_tar: Path) -> None:
    chance = random.Random(f"flips {format}")
    assert problems(data, source=mixed_tar, deep=True) == []
    names = sorted(set(os.listdir(data)) - {"manifest.json", "quarantine.jsonl"})
    if format == "webdataset":
        names = sorted({*chance.sample(names, 3), "train.records.safetensors", "train-000000.tar", "train-000000.idx"})
    flips = 0
    for name in names:
        for at in places(data, name, chance):
            bits = 1 << chance.randrange(8)
            flip(data / name, at, bits)
            found = problems(data)
            assert any(problem.startswith(f"{name}: its SHA-256 is") for problem in found), (name, at, found)
            flip(data / name, at, bits)
            flips += 1
    assert problems(data) == []
    assert flips > 20


def test_damage_to_what_lies_around_an_image_names_the_sample(data: Path, format: str) -> None:
    split = open_converted(data).splits["train"]
    row = split.records.rows(20, 21)[0]  # type: ignore[attr-defined]
    file = split.files[int(row["shard"])].path  # type: ignore[attr-defined]
    if format == "ffcv":
        cases = {
            2104 + 20 * 24 + 3: "train.beton: the metadata of sample 20 is not what the records say",
            file.stat().st_size - 24 * (len(split) - 20) + 9: "train.beton: the allocation of sample 20 is not what",
            0: "train.beton: its header is not what the manifest says",
            100: "train.beton: its header is not what the manifest says",
        }
    else:
        label = int(row["offset"] + row["num_bytes"] + -row["num_bytes"] % 512)
        key = f"{int(row['position']):09}"
        name = split.names[20]
        cases = {
            int(row["offset"]) - 500: f"{name}: the tar header before {key}.jpg is damaged",
            label + 3: f"{name}: {key}.cls is damaged",
            label + 512: f"{name}: {key}.cls is damaged",
        }
    for at, expected in cases.items():
        flip(file, at)
        assert any(problem.startswith(expected) for problem in problems(data)), problems(data)
        flip(file, at)
    if format == "webdataset":
        index = file.with_suffix(".idx")
        flip(index, index.stat().st_size // 2)
        assert f"{index.name}: it is not the index of the samples in its tar" in problems(data)


def test_files_that_are_cut_short_or_missing(data: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(set(os.listdir(data)) - {"manifest.json", "quarantine.jsonl"})
    for name in names if format == "ffcv" else [names[0], *names[-3:]]:
        kept = (data / name).read_bytes()
        for size in (len(kept) // 2, len(kept) + 1):
            (data / name).write_bytes((kept + b"\0")[:size])
            expected = f"{name}: it has {size:,} bytes and not {len(kept):,}"
            assert expected in problems(data)
            with pytest.raises(ValueError, match=f"{name} has {size:,} bytes and not {len(kept):,}, as the manifest"):
                open_converted(data)
        (data / name).unlink()
        assert f"{name}: it is missing" in problems(data)
        assert exit_code("verify", data) == 1
        assert f"{name}: it is missing" in capsys.readouterr().out
        with pytest.raises(FileNotFoundError, match=f"lacks {name}, which its manifest lists"):
            open_converted(data)
        (data / name).write_bytes(kept)
    assert problems(data) == []


def test_any_byte_of_the_manifest(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No flip of a bit goes unseen, and none makes a mess."""
    path = data / "manifest.json"
    text = path.read_bytes()
    chance = random.Random(11)
    for at in range(0, len(text), 97):
        path.write_bytes(text[:at] + bytes([text[at] ^ (1 << chance.randrange(8))]) + text[at + 1 :])
        with pytest.raises(ValueError, match=f"{path} cannot be used: "):
            Manifest.load(data)
    for size in (0, 1, len(text) // 2, len(text) - 2):
        path.write_bytes(text[:size])
        with pytest.raises(ValueError, match="cannot be used"):
            open_converted(data)
    path.write_bytes(text.replace(b"\n", b"\r\n"))
    with pytest.raises(ValueError, match="it was changed after it was written"):
        verify(data)
    assert exit_code("verify", data) == 1
    assert "manifest.json cannot be used: it was changed after" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"is no converted data set: it has no manifest.json"):
        open_converted(data)
    path.write_bytes(text)
    assert problems(data) == []


# The source


def damaged_in_its_scan() -> bytes:
    """A JPEG with a whole header and an end of image, which Pillow cannot decode."""
    whole = jpeg(200, 150, 1, quality=95)
    scan = whole.index(b"\xff\xda") + 14
    data = whole[: scan + 40] + b"\xff\xd8\xff\xc0" + bytes(60) + whole[scan + 104 :]
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(data)).load()
    return data


def test_an_image_that_is_damaged_inside_its_scan(tmp_path: Path, format: str) -> None:
    files = {f"train/a/{number}.jpg": jpeg(40, 30, number) for number in range(5)}
    source = write_tar(tmp_path / "images.tar", files | {"train/a/damaged.jpg": damaged_in_its_scan()})
    convert(source, tmp_path / "header", options(format, check="header"))
    assert problems(tmp_path / "header", source=source) == []
    found = problems(tmp_path / "header", deep=True)
    assert len(found) == 1
    assert found[0].startswith("train/a/damaged.jpg: it cannot be decoded: ")
    summary = convert(source, tmp_path / "decode", options(format, check="decode"))
    assert (summary["samples"], summary["quarantined"]) == (5, 1)
    entry = json.loads((tmp_path / "decode" / "quarantine.jsonl").read_text())
    assert (entry["name"], entry["split"]) == ("train/a/damaged.jpg", "train")
    assert problems(tmp_path / "decode", source=source, deep=True) == []


FILES = {
    f"{split}/{name}/{number}.jpg": jpeg(30, 20, number)
    for split in ("train", "val")
    for name in "bc"
    for number in range(4)
}
NEW = jpeg(30, 20, 77)
CHANGES: dict[str, tuple[str, dict[str, bytes], str]] = {
    "bytes": ("train/b/2.jpg", {"train/b/2.jpg": NEW}, "train/b/2.jpg: its bytes are not those of the source"),
    "name": (
        "train/b/2.jpg",
        {"train/b/2x.jpg": FILES["train/b/2.jpg"]},
        "train/b/2.jpg: the source has another image, or none, at its index 2",
    ),
    "added": (
        "-",
        {"train/c/9.jpg": NEW},
        "train/c/9.jpg: the source has it; here it is neither a sample nor in quarantine",
    ),
    "removed": ("val/c/3.jpg", {}, "val/c/3.jpg: the source has another image, or none, at its index 7"),
    "class added": ("-", {"train/a/0.jpg": NEW}, "val/b/0.jpg: its label is 0, in the source 1"),
    "split added": ("-", {"test/b/0.jpg": NEW}, "test: the source has 1 images, here are none"),
    "split removed": ("val/", {}, "the source has no split val"),
}
"""What is removed (by the beginning of its name), what is added, and the problem that is found."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_has_changed(tmp_path: Path, change: str) -> None:
    convert(write_tar(tmp_path / "images.tar", FILES), tmp_path / "data", options("webdataset"))
    assert problems(tmp_path / "data", source=tmp_path / "images.tar") == []
    removed, added, expected = CHANGES[change]
    files = {name: data for name, data in FILES.items() if not name.startswith(removed)} | added
    found = problems(tmp_path / "data", source=write_tar(tmp_path / "changed.tar", files))
    assert expected in found, found
    assert exit_code("verify", tmp_path / "data", "--source", tmp_path / "changed.tar") == 1

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.sources import open_source, spool
from dataset_tools.sources.tar_archive import open_tar
from dataset_tools.sources.tar_index import TarIndex
from tests.dataset_tools.made_up import assert_reads_in_processes, assert_unpacked_once, everything, tar_bytes

FILES = {
    "val/dog/9.jpg": b"val dog 9",
    "train/dog/10.jpg": b"",
    "train/cat/b.png": b"cat b" * 400,
    "train/dog/2.jpg": b"dog 2",
    "train/cat/in/side.JPEG": b"nested",
    "train/cat/readme.txt": b"no image",
    "train/cat-big/1.jpg": b"another class",
    "train/cat/a.jpg": b"cat a" * 103,
    "unlabeled/1.jpg": b"?",
}
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def test_a_tar_equals_the_folder_of_its_files(write_tree, write_tar) -> None:
    folder, tar = open_source(write_tree(FILES)), open_source(write_tar(FILES))
    assert tar.kind == "tar"
    assert tar.classes == folder.classes == ("cat", "cat-big", "dog")
    assert everything(tar) == everything(folder)
    assert tar.fingerprint == folder.fingerprint
    assert list(tar.splits) == ["train", "val", "unlabeled"]
    assert list(tar.splits["train"].names) == [
        "train/cat/a.jpg",
        "train/cat/b.png",
        "train/cat/in/side.JPEG",
        "train/cat-big/1.jpg",
        "train/dog/10.jpg",
        "train/dog/2.jpg",
    ]
    assert tar.splits["train"].labels.tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("top", ["./", "data/", "./data-v1.0/"])
def test_one_folder_around_everything_is_looked_through(write_tar, top: str) -> None:
    plain = open_source(write_tar(FILES))
    wrapped = open_source(write_tar({top + name: data for name, data in FILES.items()}, name="wrapped.tar"))
    assert everything(wrapped) == everything(plain)
    assert wrapped.fingerprint == plain.fingerprint


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_formats_and_long_names(write_tar, format: int) -> None:
    folder = "/".join(["class", *("deep" * 15 for _ in range(2))])
    names = {f"{folder}/{'x' * 90}.jpg": b"long", "class/é.jpg": b"accent", "class/s.jpg": b"short"}
    if format != tarfile.USTAR_FORMAT:
        names[f"{folder}/{'y' * 300}.jpg"] = b"very long"
    source = open_source(write_tar(names, format=format))
    assert {name: data for name, _, data in everything(source)["train"]} == names


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[Any, Any]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, io.BytesIO(data)


def test_links_are_followed_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as archive:
        for each in (
            member("a", kind=tarfile.DIRTYPE),
            member("a/s.jpg", kind=tarfile.SYMTYPE, link="../blobs/sha256"),  # to what follows, and is called otherwise
            member("a/1.jpg", b"abc"),
            member("a/h.jpg", kind=tarfile.LNKTYPE, link="a/1.jpg"),
            member("b/chain.jpg", kind=tarfile.SYMTYPE, link="../a/s.jpg"),
            member("c", kind=tarfile.SYMTYPE, link="a"),
            member("a/lost.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"),
            member("a/loop.jpg", kind=tarfile.SYMTYPE, link="loop.jpg"),
            member("a/pipe.jpg", kind=tarfile.FIFOTYPE),
            member("a/._1.jpg", b"abc"),
            member("blobs/sha256", b"blob"),
        ):
            archive.addfile(*each)
    source = open_source(path)
    assert everything(source) == {
        "train": [
            *(("a/1.jpg", 0, b"abc"), ("a/h.jpg", 0, b"abc"), ("a/s.jpg", 0, b"blob")),
            *(("b/chain.jpg", 1, b"blob"), ("c/1.jpg", 3, b"abc")),
        ]
    }
    assert source.account.left_out == {
        "hidden": (1, ["a/._1.jpg"]),
        "devices and pipes": (1, ["a/pipe.jpg"]),
        "without extension": (1, ["blobs/sha256"]),
        "links that lead nowhere in the archive": (2, ["a/loop.jpg", "a/lost.jpg"]),
    }


def test_labels_that_are_links_and_those_that_lack(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for each in (
            *(member(f"{key}.jpg", b"abc") for key in range(3)),
            member("0.cls", b"7"),
            member("1.cls", kind=tarfile.LNKTYPE, link="0.cls"),
        ):
            archive.addfile(*each)
    source = open_source(tmp_path / "x.tar")
    assert (source.classes, source.splits["train"].labels.tolist()) == (("7",), [0, 0, -1])
    assert source.describe()[0].endswith("1 classes (7); 1 of train without labels")


def test_links_to_one_folder_do_not_make_any_number_of_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(300):
            archive.addfile(*member(f"all/{number}.jpg", b"abc"))
            archive.addfile(*member(f"class{number}", kind=tarfile.SYMTYPE, link="all"))
    with pytest.raises(ValueError, match="its links stand for more files than an archive of its size can hold"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize("padding", [0, 512, 9 * 512, 1 << 21])
@pytest.mark.parametrize("packing", [None, "gz"])
def test_joined_archives_are_read_to_the_end(write_tar, tmp_path: Path, padding: int, packing: str | None) -> None:
    first = write_tar({"a/1.jpg": b"1"}).read_bytes()
    joined = first + bytes(padding) + write_tar({"b/2.jpg": b"22"}).read_bytes()
    path = tmp_path / "joined"
    path.write_bytes(PACK[packing](joined) if packing else joined)
    assert everything(open_source(path)) == {"train": [("a/1.jpg", 0, b"1"), ("b/2.jpg", 1, b"22")]}
    path.write_bytes(first + b"no tar")
    assert "the 6 bytes behind its end" in open_source(path).account.notes[0]


def test_webdataset_shards_have_their_labels(write_tar, write_tree) -> None:
    def shard(keys: range) -> dict[str, bytes]:
        files = [(f"{key:06}.jpg", b"image %d" % key) for key in keys] + [(f"{key:06}.json", b"{}") for key in keys]
        return dict(files) | {f"{key:06}.cls": b"%d\n" % (key % 3) for key in keys}

    source = open_source(write_tar(shard(range(4))))
    assert (source.kind, source.classes) == ("webdataset tar", ("0", "1", "2"))
    assert everything(source) == {"train": [(f"train/{k:06}.jpg", k % 3, b"image %d" % k) for k in range(4)]}
    assert source.account.left_out == {".json": (4, ["000000.json", "000001.json", "000002.json"])}

    many = write_tar({f"{k}.{kind}": b"%d" % (11 - k) for k in range(12) for kind in ("jpg", "cls")}, name="val-0.tar")
    assert open_source(many).splits["val"].labels.tolist() == [11, 10, 1, 0, 9, 8, 7, 6, 5, 4, 3, 2]

    odd = write_tar({"a.1.jpg": b"", "a.1.cls": b"1", "a.2.jpg": b"", "a.2.CLS": b"2", "a.cls": b"3", "a.jpg": b""})
    source = open_source(odd)
    assert [source.classes[label] for label in source.splits["train"].labels] == ["1", "2", "3"]

    shards = {"train-000000": range(6), "train-000001": range(6, 12), "val-000000": range(12, 15)}
    packed = {f"{name}.tar": write_tar(shard(keys)).read_bytes() for name, keys in shards.items()}
    folder = open_source(write_tree(packed | {"README.md": b""}))
    assert {name: split.labels.tolist() for name, split in folder.splits.items()} == {
        "train": [0, 1, 2] * 4,
        "val": [0, 1, 2],
    }
    assert folder.splits["train"].names[7] == "train/train-000001/000007.jpg"
    assert folder.splits["train"].read(7) == b"image 7"
    assert pickle.loads(pickle.dumps(folder.splits["train"])).read(11) == b"image 11"


@pytest.mark.parametrize("top", ["train/", ""])
def test_half_unpacked_imagenet_is_read(write_tar, write_tree, top: str) -> None:
    wnids = ("n01440764", "n01443537")
    tars = {f"{top}{w}.tar": write_tar({f"./{w}_{i}.JPEG": b"%d" % i for i in range(3)}).read_bytes() for w in wnids}
    source = open_source(write_tree(tars))
    assert (source.kind, source.classes) == ("folder of tars", wnids)
    assert everything(source)["train"][4] == (f"train/{wnids[1]}/{wnids[1]}_1.JPEG", 1, b"1")


def test_tars_that_are_data_sets_of_their_own_are_not_joined(write_tar, write_tree) -> None:
    tar = write_tar({"train/a/1.jpg": b"1", "val/a/1.jpg": b"1"}).read_bytes()
    with pytest.raises(ValueError, match=r"one.tar is a data set of its own, with train, val"):
        open_source(write_tree({"one.tar": tar, "two.tar": tar}))


def test_pax_size_comes_first(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a/1.jpg")
    info.size, info.pax_headers = 0, {"size": "700"}
    header = info.tobuf(tarfile.PAX_FORMAT)
    path = tmp_path / "pax.tar"
    path.write_bytes(header + b"p" * 700 + bytes(1024 - 700) + bytes(1024))
    assert everything(open_source(path)) == {"train": [("a/1.jpg", 0, b"p" * 700)]}


@pytest.mark.parametrize("packing", list(PACK))
def test_compressed_tars_are_unpacked_once(
    write_tar, cache_folder: Path, packing: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    caplog.set_level("INFO")
    plain = write_tar(FILES)
    packed = plain.with_name(f"images.tar.{packing}")
    packed.write_bytes(PACK[packing](plain.read_bytes()))
    source = open_source(packed)
    assert everything(source) == everything(open_source(plain))
    assert source.path == packed
    assert f"unpacking {packed} once, into {cache_folder}" in caplog.text
    assert sorted(path.suffix for path in cache_folder.iterdir()) == [".crc32", ".lock", ".npz", ".tar"]

    monkeypatch.setattr(spool, "_unpack", lambda *_: pytest.fail("unpacked again"))
    monkeypatch.setattr(spool.TarIndex, "build", lambda *_: pytest.fail("indexed again"))
    assert everything(open_source(packed)) == everything(source)


def test_a_changed_archive_is_unpacked_again(write_tar) -> None:
    packed = write_tar({"a/1.jpg": b"old"}, name="x.tar.gz", mode="w:gz")
    assert everything(open_source(packed))["train"][0][2] == b"old"
    write_tar({"a/1.jpg": b"new"}, name="x.tar.gz", mode="w:gz")
    os.utime(packed, ns=(1, 1))
    assert everything(open_source(packed))["train"][0][2] == b"new"


def test_a_damaged_cached_index_is_made_again(write_tar, cache_folder: Path, caplog) -> None:
    packed = write_tar(FILES, name="x.tar.gz", mode="w:gz")
    expected = everything(open_source(packed))
    (index,) = cache_folder.glob("*.npz")
    for damage in (b"", index.read_bytes()[:100], b"\x80\x04N."):
        index.write_bytes(damage)
        assert everything(open_source(packed)) == expected
    assert caplog.text.count("is made again") == 3


def test_without_a_home_a_cache_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    for name in ("LEOCLR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    for place, expected in (("mine", True), ("open", False), ("link", False)):
        (tmp_path / place).mkdir()
        folder = tmp_path / place / f"leoclr-fast-{os.getuid()}"
        if place == "open":
            folder.mkdir(mode=0o777)
            folder.chmod(0o777)
        elif place == "link":
            folder.symlink_to(tmp_path)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
        chosen = spool.cache_folder()
        assert (chosen == folder) is expected
        assert chosen == spool.cache_folder()
        assert chosen.stat().st_mode & 0o777 == 0o700


def test_processes_that_start_at_once_unpack_once(write_tar, cache_folder: Path) -> None:
    packed = write_tar({f"a/{i}.jpg": b"\xff\xd8" + b"x" * 5000 for i in range(300)}, name="x.tar.xz", mode="w:xz")
    assert_unpacked_once(packed, cache_folder, 300)


def test_a_bit_that_has_flipped_in_the_cache(write_tar, cache_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = write_tar(FILES, name="x.tar.gz", mode="w:gz")
    expected = everything(open_source(packed))
    (unpacked,) = cache_folder.glob("*.tar")
    content = bytearray(unpacked.read_bytes())
    content[tarfile.BLOCKSIZE + 3] ^= 4  # in the first image; neither size nor index tell
    unpacked.write_bytes(content)
    assert everything(open_source(packed)) == expected
    assert f"{unpacked} has changed since it was unpacked, and is made again" in caplog.text


def test_no_room_to_unpack(write_tar, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = write_tar(FILES, name="x.tar.gz", mode="w:gz")
    full = shutil.disk_usage(packed)._replace(free=spool.SPARE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"no room to unpack .*x.tar.gz: .* set LEOCLR_CACHE"):
        open_source(packed)
    assert [path.suffix for path in cache_folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("damage", ["cut", "flipped", "inner"])
def test_damaged_compressed_tars(write_tar, cache_folder: Path, packing: str, damage: str) -> None:
    data = write_tar({f"a/{i}.jpg": os.urandom(2000) for i in range(50)}).read_bytes()
    packed = PACK[packing](data)
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed = packed[:5000] + bytes(64) + packed[5064:]
    else:
        packed = PACK[packing](data[:50_000])
    path = cache_folder.parent / f"x.tar.{packing}"
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=rf"the archive {path} cannot be used: it is damaged or cut short"):
        open_source(path)
    assert [path.suffix for path in cache_folder.iterdir()] == [".lock"]


FORTY = tar_bytes({f"a/{i}.jpg": b"x" * 512 for i in range(40)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. A file must be a tar"),
        (b"\xff\xd8\xff\xe0" + bytes(2000), "is no tar. A file must be a tar"),
        (b"PK\x03\x04" + bytes(2000), "unpack other archives"),
        (gzip.compress(b"not a tar" * 1000), "cannot be used: it is damaged or cut short"),
        (tar_bytes({}), "holds no image"),
        (tar_bytes({"a/1.txt": b""}), "x.tar holds no image. Expected"),
        (FORTY[:20_000], "damaged or cut short"),
        (FORTY[: 20 * 1024], "the end of the file without the end-of-archive mark at byte 20480"),
        (FORTY[:10_340] + b"\xff" * 50 + FORTY[10_390:], "a damaged header at byte 10240"),
    ],
    ids=lambda given: given if isinstance(given, str) else "archive",
)
def test_unusable_archives(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(path)


@pytest.mark.parametrize("name", ["/etc/1.jpg", "a/../../1.jpg", "../1.jpg", "a/.."])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_unsafe_paths_are_refused(write_tar, tmp_path: Path, name: str, mode: str) -> None:
    """And nothing is unpacked."""
    with pytest.raises(ValueError, match=f"its member '{name}' has an absolute or `..` path, which is refused"):
        open_source(write_tar({"a/1.jpg": b"", name: b""}, mode=mode))
    assert not list(tmp_path.rglob("1.jpg"))


@pytest.mark.parametrize("again", ["a/1.jpg", "./a/1.jpg", "a//1.jpg"])
def test_duplicates_are_refused(write_tar, again: str) -> None:
    with pytest.raises(ValueError, match=r"holds 'a/1.jpg' more than once"):
        open_source(write_tar([("a/1.jpg", b"1"), (again, b"")]))


def test_a_tar_without_the_padding_behind_its_end(write_tar) -> None:
    path = write_tar({f"a/{i}.jpg": b"x" * 512 for i in range(40)})
    os.truncate(path, 41 * 1024)
    assert len(open_source(path).splits["train"]) == 40


def header(size: int, name: bytes, kind: bytes = b"0") -> bytes:
    """A header of the old GNU format, with a size of base 256."""
    block = bytearray(512)
    block[: len(name)], block[100:108] = name, b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = b"\xff" * 4 + (size & (1 << 64) - 1).to_bytes(8, "big")
    if size >= 0:
        block[124:136] = b"\x80" + bytes(3) + size.to_bytes(8, "big")
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, b"ustar  \0"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"0", b"5", b"L", b"K", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [-1, -512, -1024, 1 << 40])
def test_sizes_that_lead_back_or_far_away_are_refused(write_tar, tmp_path: Path, kind: bytes, size: int) -> None:
    good = write_tar({"a/1.jpg": b"1", "a/2.jpg": b"2"}).read_bytes()[:2048]
    path = tmp_path / "evil.tar"
    for name in (b"a/3.jpg", b"README"):
        path.write_bytes(good + header(size, name, kind) + bytes(1024))
        if kind == b"5" and size > 0:  # of a folder, a size means nothing
            assert len(open_source(path).splits["train"]) == 2
            continue
        with pytest.raises(ValueError, match=r"cannot be used: it is damaged|a sparse file"):
            open_source(path)


@given(st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=5), st.integers(0, 4))
def test_a_changed_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], block: int
) -> None:
    """Also where the checksum fits."""
    data = bytearray(tar_bytes({"a/1.jpg": b"1", f"a/{'long' * 40}.jpg": b"2"}))
    for position, value in changes:
        data[block * 512 + position] = value
    head = data[block * 512 : (block + 1) * 512]
    head[148:156] = b"        "
    data[block * 512 + 148 : block * 512 + 156] = b"%06o\0 " % sum(head)
    path = tmp_path_factory.getbasetemp() / "changed.tar"
    path.write_bytes(data)
    try:
        splits = list(open_tar(path, (path, TarIndex.build(path))).splits.values())
    except ValueError:
        splits = []
    assert all(len(split.read(index)) <= len(data) for split in splits for index in range(len(split)))


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("content", ["zeros", "a file of zeros"])
def test_what_is_refused_leaves_nothing_in_the_cache(
    tmp_path: Path, cache_folder: Path, packing: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "RATIO_FROM_BYTES", 4 << 20)
    size = 30 << 20
    data = bytes(size) if content == "zeros" else header(size, b"a/x.txt") + bytes(size + 1024)
    path = tmp_path / f"x.tar.{packing}"
    path.write_bytes(PACK[packing](data))
    with pytest.raises(ValueError, match=r"nothing but zeros|more than 200 times as large"):
        open_source(path)
    assert [each.suffix for each in cache_folder.iterdir()] == [".lock"]
    path.write_bytes(PACK[packing](tar_bytes({"a/x.txt": b"1"})))
    with pytest.raises(ValueError, match="holds no image"):
        open_source(path)
    assert {each.suffix for each in cache_folder.iterdir()} == {".lock"}


def test_a_tar_that_shrank_or_vanished_is_an_error_that_names_the_sample(write_tar) -> None:
    path = write_tar({"a/1.jpg": b"1" * 600, "a/2.jpg": b"2" * 600})
    train = open_source(path).splits["train"]
    fresh = pickle.loads(pickle.dumps(train))
    assert train.read(0) == b"1" * 600
    os.truncate(path, 2400)
    with pytest.raises(OSError, match=r"cannot read sample 'a/2.jpg': .* holds 352 of its 600 bytes at offset 2048"):
        train.read(1)
    path.unlink()
    assert train.read(0) == b"1" * 600
    with pytest.raises(FileNotFoundError, match=r"cannot read sample 'a/1.jpg'"):
        fresh.read(0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_in_worker_processes(write_tar, method: str) -> None:
    split = open_source(write_tar({f"a/{i:03}.jpg": bytes([i]) * (i + 1) for i in range(100)})).splits["train"]
    split.read(0)
    assert_reads_in_processes(split, method)


def test_no_file_stays_open(write_tar) -> None:
    path = write_tar({"a/1.jpg": b"1"})

    def num_open() -> int:
        opened = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(each) and os.path.samefile(each, path) for each in opened)

    split = open_source(path).splits["train"]
    split.read(0)
    assert num_open() == 1
    del split
    assert num_open() == 0


@pytest.mark.real_data
def test_real_cifar10_tar(real_data: Path) -> None:
    archive = real_data / "cifar10-jpeg.tar.xz"
    source = open_source(archive)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert source.classes == classes
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 50_000, "test": 10_000}
    for split, count in (("train", 5000), ("test", 1000)):
        assert np.array_equal(source.splits[split].labels, np.repeat(np.arange(10), count))
    assert source.splits["train"].names[5001] == "train/automobile/0001.jpg"
    with tarfile.open(archive) as reference:
        member = reference.next()
        while member is not None and not member.isreg():
            member = reference.next()
        assert member is not None
        expected = reference.extractfile(member).read()  # type: ignore[union-attr]
    split = source.splits[member.name.split("/")[0]]
    assert split.read(list(split.names).index(member.name)) == expected

    start = time.perf_counter()
    assert open_source(archive).fingerprint == source.fingerprint
    assert time.perf_counter() - start < 2

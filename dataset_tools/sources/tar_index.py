"""Where the images of an uncompressed tar are."""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from array import array
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dataset_tools.account import Account
from dataset_tools.files import open_regular, save_arrays
from dataset_tools.packed_names import PackedNames
from dataset_tools.schema import decode_json
from dataset_tools.sources.layout import is_hidden, is_image

END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)
LABEL_SUFFIX = ".cls"
"""webdataset's: KEY.jpg has its label in KEY.cls."""
MAX_LABEL_BYTES = 256
MAX_META_BYTES = 1 << 20
"""Of a header that tells the name, or the like, of the next one."""
MAX_PADDING_BYTES = 64 << 20
"""So far behind the end of an archive another one is looked for, as `cat a.tar b.tar` makes."""
MAX_LINKS = 40
MAX_NAME_BYTES = 4096
"""Linux's PATH_MAX."""
_META_TYPES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
    tarfile.SOLARIS_XHDTYPE,
)


class DamagedArchiveError(ValueError):
    """The archive cannot be read as it is. The message says why; it does not name the archive."""


@dataclass(frozen=True)
class TarIndex:
    """The N images of a tar, sorted by folder, then by file name. Memory: the name and 24 bytes for each."""

    names: PackedNames
    """Paths, without "./" at the front."""
    extents: NDArray[np.int64]
    """int64 [N, 2]: where the bytes of an image begin in the tar, and how many they are."""
    folders: dict[str, tuple[int, int]]
    """Each folder → the range [start, stop) of the images right inside, in order."""
    label_keys: PackedNames
    """webdataset's keys that have a label, with their folders."""
    label_texts: PackedNames
    account: Account

    @classmethod
    def build(cls, tar: Path) -> TarIndex:
        """Reads all headers (GNU and PAX long names and sizes, too), about 40,000 a second.

        Hard and symbolic links are followed; archives that were joined are read to the end. The images of a tar of tars
        (see `is_tar_of_tars`) are named "train/STEM OF THE INNER TAR/name". Raises DamagedArchiveError if the tar, or
        one inside, is cut short or damaged, holds a name twice, or an absolute or `..` path.
        """
        offsets, folder_of, numbers = array("q"), array("i"), dict[str, int]()
        content = _Content()

        def read_names() -> Iterator[str]:
            with open_regular(tar) as file:
                images = _nested_images if is_tar_of_tars(tar) else _images
                for name, offset, size in images(file, os.fstat(file.fileno()).st_size, content):
                    folder_of.append(numbers.setdefault(os.path.dirname(name), len(numbers)))
                    offsets.extend((offset, size))
                    yield name

        names = PackedNames(read_names())
        extents = np.frombuffer(offsets, dtype=np.int64).reshape(-1, 2)
        by_folder = np.argsort(np.frombuffer(folder_of, dtype=np.int32), kind="stable")
        stops = np.cumsum(np.bincount(folder_of, minlength=len(numbers)))
        order, folders, start = np.empty_like(by_folder), dict[str, tuple[int, int]](), 0
        for folder in sorted(numbers.keys() | content.folders):
            if folder not in numbers:
                folders[folder] = start, start
                continue
            number = numbers[folder]
            inside = by_folder[stops[number - 1] if number else 0 : stops[number]].tolist()
            inside.sort(key=names.__getitem__)
            for name, following in pairwise(map(names.__getitem__, inside)):
                if name == following:
                    raise DamagedArchiveError(f"it holds {name!r} more than once; keep one of them.")
            folders[folder] = start, start + len(inside)
            order[start : start + len(inside)] = inside
            start += len(inside)
        del by_folder
        if (order[1:] < order[:-1]).any():
            extents = extents[order]  # one after the other, so that only one of them is there twice
            names = names.select(order)
        labels = content.labels
        return cls(names, extents, folders, PackedNames(labels), PackedNames(labels.values()), content.account)

    def save(self, path: Path) -> None:
        """Writes an .npz without pickles; atomic."""
        ranges = np.array(list(self.folders.values()), dtype=np.int64).reshape(-1, 2)
        named = self.names.as_arrays("names") | PackedNames(self.folders).as_arrays("folders")
        named |= self.label_keys.as_arrays("label_keys") | self.label_texts.as_arrays("label_texts")
        named |= PackedNames([json.dumps(asdict(self.account))]).as_arrays("account")
        save_arrays(path, named | {"extents": self.extents, "ranges": ranges})

    @classmethod
    def load(cls, path: Path) -> TarIndex:
        """The inverse of `save`. Raises OSError, EOFError, ValueError, KeyError, TypeError or zipfile.BadZipFile."""
        with open_regular(path) as file, np.load(file, allow_pickle=False) as saved:
            names, extents = PackedNames.from_arrays(saved, "names"), saved["extents"]
            folders = dict(
                zip(PackedNames.from_arrays(saved, "folders"), map(tuple, saved["ranges"].tolist()), strict=True)
            )
            keys, texts = (PackedNames.from_arrays(saved, name) for name in ("label_keys", "label_texts"))
            account = decode_json(PackedNames.from_arrays(saved, "account")[0], Account, str(path))
        if extents.shape != (len(names), 2) or len(keys) != len(texts):
            raise ValueError(f"{path} is inconsistent")
        return cls(names, extents, folders, keys, texts, account)

    def labels(self) -> list[str | None]:
        """What webdataset's .cls files say of each image, None for those that have none."""
        texts = dict(zip(self.label_keys, self.label_texts, strict=True))
        return [next(filter(None, map(texts.get, _keys(name))), None) for name in self.names]


class _Content:
    """What a tar holds besides images."""

    def __init__(self) -> None:
        self.account = Account()
        self.folders: set[str] = set()
        self.labels: dict[str, str] = {}

    def keep_label(self, file: IO[bytes], name: str, member: tarfile.TarInfo) -> None:
        """Raises DamagedArchiveError for a second one of this name."""
        key = name[: -len(LABEL_SUFFIX)]
        if key in self.labels:
            raise DamagedArchiveError(f"it holds {name!r} more than once; keep one of them.")
        text = os.pread(file.fileno(), member.size, member.offset_data)
        self.labels[key] = text.decode("utf-8", "backslashreplace").strip()


def _keys(name: str) -> Iterator[str]:
    """What the label of "1.a.jpg" may be called: "1.a", or webdataset's "1"."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        yield f"{folder}{slash}{base}"


def _is_label(name: str, member: tarfile.TarInfo) -> bool:
    return member.isreg() and name.lower().endswith(LABEL_SUFFIX) and member.size <= MAX_LABEL_BYTES


def is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def is_tar_of_tars(tar: Path) -> bool:
    """Whether all regular files of a tar are tars by their names, as in ILSVRC2012_img_train.tar.

    Reads headers up to the first that is none. Raises DamagedArchiveError like `TarIndex.build`.
    """
    name = None
    with open_regular(tar) as file:
        for name, member in members(file, 0, os.fstat(file.fileno()).st_size, Account()):
            if not member.isdir() and not is_tar(name):
                return False
    return name is not None and is_tar(name)


def _images(file: IO[bytes], stop: int, content: _Content, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each image, in the order of the archive, those that are links at the end."""
    links: dict[str, str] = {}
    for name, member in members(file, start, stop, content.account):
        if member.isreg() and is_image(name):
            yield name, member.offset_data, member.size
            continue
        folder = name if member.isdir() else os.path.dirname(name)
        content.folders.add(folder)
        if member.issym():
            links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
        elif member.islnk():
            links[name] = posixpath.normpath(member.linkname)
        elif _is_label(name, member):
            content.keep_label(file, name, member)
        elif member.isreg():
            content.account.leave_out_by_extension([name])
        elif not member.isdir():
            content.account.leave_out("devices and pipes", name)
    if links:
        yield from _linked_images(file, start, stop, links, content)


def _linked_images(
    file: IO[bytes], start: int, stop: int, links: dict[str, str], content: _Content
) -> Iterator[tuple[str, int, int]]:
    """The images that links stand for, to files and to folders of them; labels, too.

    Raises DamagedArchiveError if their names are larger than the archive: links to one folder make any number of them.
    """
    waiting: dict[str, list[str]] = {}  # target → links
    for link in links:
        target = link
        for _ in range(MAX_LINKS):
            parts = target.split("/")
            heads = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
            head = next((head for head in heads if head in links), None)
            if head is None:
                break
            target = posixpath.normpath(links[head] + target[len(head) :])
        waiting.setdefault(target, []).append(link)
    found: set[str] = set()
    name_bytes = 0
    for name, member in members(file, start, stop, Account()):
        if not member.isreg():
            continue
        parts = name.split("/")
        for length in range(len(parts), 0, -1):
            target = "/".join(parts[:length])
            for link in waiting.get(target, ()):
                found.add(link)
                path = link + name[len(target) :]
                name_bytes += len(path)
                if name_bytes > stop - start:
                    raise DamagedArchiveError("its links stand for more files than an archive of its size can hold")
                if is_image(path):
                    yield path, member.offset_data, member.size
                elif _is_label(path, member):
                    content.keep_label(file, path, member)
    lost = sorted(links.keys() - found)
    if lost:
        content.account.leave_out("links that lead nowhere in the archive", *lost)


def _nested_images(file: IO[bytes], stop: int, content: _Content) -> Iterator[tuple[str, int, int]]:
    """The same for a tar of tars; the offsets count from the beginning of the outer one."""
    stems: set[str] = set()
    for outer, inner in members(file, 0, stop, content.account):
        if not inner.isreg():
            continue
        stem = os.path.basename(outer)[: -len(".tar")]
        if stem in stems:
            raise DamagedArchiveError(f"it holds {os.path.basename(outer)!r} more than once; keep one of them.")
        stems.add(stem)
        images, within = 0, _Content()
        try:
            for name, offset, size in _images(file, inner.offset_data + inner.size, within, inner.offset_data):
                yield f"train/{stem}/{name}", offset, size
                images += 1
        except DamagedArchiveError as error:
            raise DamagedArchiveError(f"in its member {inner.name!r}: {error}") from error
        content.account.add(within.account, inner.name)
        if not images:
            raise DamagedArchiveError(f"its member {inner.name!r} holds no image.")


class _Header(tarfile.TarInfo):
    """Refuses sizes with which tarfile steps back for ever, or reads an archive of any size into the memory."""

    @classmethod
    def frombuf(cls, *arguments: object) -> _Header:
        member = super().frombuf(*arguments)  # type: ignore[arg-type]
        if member.size < 0:
            raise DamagedArchiveError(f"it is damaged: its member {member.name!r} has {member.size} bytes")
        if member.type in _META_TYPES and member.size > MAX_META_BYTES:
            raise DamagedArchiveError(f"it is damaged: a name in it is said to have {member.size:,} bytes")
        return member


def members(file: IO[bytes], start: int, stop: int, account: Account) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The visible members of the tar, or of the joined tars, at bytes [start, stop) of `file`, with their names.

    Raises DamagedArchiveError. `account` notes what is hidden, and what is behind the end.
    """
    while True:
        end = yield from _members_of_one(file, start, stop, account)
        file.seek(end)
        limit = min(stop, end + MAX_PADDING_BYTES)
        while end < limit:
            chunk = file.read(min(1 << 20, stop - end))
            if not chunk or chunk.strip(b"\0"):
                end += len(chunk) - len(chunk.lstrip(b"\0"))
                break
            end += len(chunk)
        else:
            if end < stop:
                account.notes.append(f"the {stop - end:,} bytes behind many zeros, at {end}, are left out")
            return
        if end >= stop:
            return
        following = end - (end - start) % tarfile.BLOCKSIZE
        file.seek(following)
        try:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.TarError:
            account.notes.append(f"the {stop - end:,} bytes behind its end, at {end}, are no tar and are left out")
            return
        start = following


def _members_of_one(
    file: IO[bytes], start: int, stop: int, account: Account
) -> Generator[tuple[str, tarfile.TarInfo], None, int]:
    """The members of the one tar that begins at `start`; returns where it ends."""
    file.seek(start)
    reached = start - 1
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape", tarinfo=_Header
        ) as archive:
            while (member := archive.next()) is not None and member.offset < stop:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps 1 kB for each
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                name = "/".join(parts)
                if member.name.startswith("/") or ".." in parts:
                    raise DamagedArchiveError(
                        f"its member {member.name!r} has an absolute or `..` path, which is refused."
                    )
                if member.size < 0 or member.offset_data <= reached:
                    raise DamagedArchiveError(f"it is damaged: its member {member.name!r} leads back")
                reached = member.offset_data
                if member.offset_data + (member.size if member.isreg() else 0) > stop:
                    raise DamagedArchiveError(f"it is damaged or cut short: {member.name!r} goes on behind the end")
                if not parts:
                    continue
                if len(name) > MAX_NAME_BYTES:
                    account.leave_out(f"names longer than {MAX_NAME_BYTES:,}", f"{name[:40]}…")
                    continue
                if any(map(is_hidden, parts)):
                    account.leave_out("hidden", name)
                    continue
                if member.issparse() and (is_image(name) or is_tar(name)):
                    raise DamagedArchiveError(
                        f"its member {member.name!r} is a sparse file; create the tar without --sparse."
                    )
                yield name, member
            end = archive.offset if member is None else member.offset
    except (DamagedArchiveError, OSError, MemoryError):
        raise
    except Exception as error:  # beside its own errors, tarfile raises those of int and struct
        raise DamagedArchiveError(f"it is damaged or cut short: {error}") from error
    file.seek(end)  # tarfile also ends, silently, at a damaged header
    block = file.read(min(tarfile.BLOCKSIZE, max(0, stop - end)))
    if block != END_OF_ARCHIVE:
        what = "a damaged header" if block else "the end of the file without the end-of-archive mark"
        raise DamagedArchiveError(f"it is damaged or cut short: {what} at byte {end}")
    return end

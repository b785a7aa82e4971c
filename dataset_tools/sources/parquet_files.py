"""Which Parquet files belong to which split, by their names, as on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from itertools import islice
from pathlib import Path

from dataset_tools.account import Account
from dataset_tools.files import open_regular
from dataset_tools.sources.image_folder import scan
from dataset_tools.sources.layout import SPLIT_NAMES, first_few, is_hidden, is_image, split_of, split_word
from dataset_tools.sources.split import SPLIT_ORDER

SUFFIX = ".parquet"
MAGIC = b"PAR1"
DEPTH = 3
"""Folders deep that files are looked for: CONFIG/SPLIT/0000.parquet."""
SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})$")


def is_parquet(file: Path) -> bool:
    """Looks at the first bytes, and at the name, so that a damaged file is not taken for something else."""
    with open_regular(file) as opened:
        return opened.read(len(MAGIC)) == MAGIC or is_parquet_name(file.name)


def is_parquet_name(name: str) -> bool:
    return name.lower().endswith(SUFFIX) and not is_hidden(name)


def split_files(place: Path, account: Account) -> dict[str, list[Path]]:
    """The Parquet files at `place` (one file, or a folder), for each split in the order of their names; {} if
    there is none, or if there are images, too.

    A split is named by the beginning of the file name (train-00000-of-00005, validation.parquet), or by the
    folder; where nothing is named, all is train. Raises ValueError if there are several data sets in folders
    of their own, a split is named in two ways, or a shard (-00001-of-00005) is missing.
    """
    if place.is_file():
        return {SPLIT_NAMES[(split_word(place.name) or "train").lower()]: [place]}
    files = _find(place, account)
    if not files:
        return {}
    spellings: dict[str, set[str]] = defaultdict(set)
    named: dict[str, list[str]] = defaultdict(list)
    others, folders = list[str](), set[str]()
    for file in files:
        folder, name = os.path.split(file)
        parent, last = os.path.split(folder)
        folders.add(parent if split_of(last) else folder)
        if word := split_word(name) or (last if split_of(last) else None):
            split = SPLIT_NAMES[word.lower()]
            named[split].append(file)
            spellings[split].add(word)
        else:
            others.append(file)
    if len(folders) > 1:
        raise ValueError(
            f"{place} holds several Parquet data sets; give one of the folders: "
            f"{first_few([str(place / folder) for folder in sorted(folders)])}."
        )
    for split, words in spellings.items():
        if len(words) > 1:
            raise ValueError(f"{place}: {first_few(sorted(words))} mean the same split, {split}: keep one.")
    if not named:
        named["train"] = others
    elif others:
        account.notes.append(f"{place}: left out, being of no split: {first_few(others)}")
    _refuse_missing_shards(place, [file for paths in named.values() for file in paths])
    return {split: [place / file for file in sorted(named[split])] for split in SPLIT_ORDER if split in named}


def _find(place: Path, account: Account) -> list[str]:
    """Paths, relative to `place`; [] if there is an image."""
    found, others = list[str](), list[str]()
    for folder, names in scan(place, Account(), depth=DEPTH):
        if any(map(is_image, names)):
            return []
        for name in names:
            path = os.path.join(folder, name)
            (found if is_parquet_name(name) and (place / path).is_file() else others).append(path)
    if found:
        account.leave_out_by_extension(others)
    return sorted(found)


def _refuse_missing_shards(place: Path, files: list[str]) -> None:
    present: dict[tuple[str, int], set[int]] = defaultdict(set)
    for file in files:
        stem = file[: -len(SUFFIX)]
        if match := SHARD.search(stem):
            present[stem[: match.start()], int(match[2])].add(int(match[1]))
    for (stem, count), numbers in present.items():
        if len(numbers) < count:
            missing = islice((number for number in range(count) if number not in numbers), 10)
            shards = ", ".join(f"{stem}-{number:05}-of-{count:05}{SUFFIX}" for number in missing)
            raise ValueError(f"{place} lacks {count - len(numbers)} of {count} files: {shards}; download them.")

"""Lists of images, one name a line: class-balanced percentages of a split, and the lists that papers publish."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_tools.files import write_file
from dataset_tools.schema import read_bounded
from dataset_tools.sources.split import Split
from dataset_tools.subsets import rank_by

MAX_LIST_BYTES = 1 << 30


def percent_of(split: Split, percent: float, seed: int) -> NDArray[np.int64]:
    """A class-balanced choice of `percent` (above 0, at most 100) of a split: sorted indices.

    For one seed they are nested: 1 % is part of 2 %, and so on. The choice hangs on the images' names, not on their
    order, so that a shuffled data set gives the images that its source gives, and an image in quarantine displaces few.
    Raises ValueError for the percentage.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"--percent {percent:g} is not allowed: give a number above 0 and at most 100")
    draws = np.fromiter((_draw(name, split.name, seed) for name in split.names), dtype=np.uint64, count=len(split))
    count = max(1, round(len(split) * percent / 100))
    return np.sort(np.lexsort((draws, rank_by(draws, split.labels)))[:count])


def _draw(name: str, split: str, seed: int) -> int:
    """64 bits out of the seed and a name; whether the name begins with the folder of its split makes no difference."""
    text = f"{seed} {name.removeprefix(f'{split}/')}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def write_subset_list(path: Path, split: Split, indices: NDArray[np.int64]) -> dict[str, Any]:
    """Writes the names at `indices`. Returns `out`, `samples`, `min_per_class`, `max_per_class`, and the file's
    `sha256`.
    """
    text = subset_text(split, indices)
    write_file(path, text)
    per_class = np.bincount(split.labels[indices][split.labels[indices] >= 0], minlength=len(split.classes))
    return {
        "out": str(path),
        "samples": len(indices),
        "min_per_class": int(per_class.min()) if len(per_class) else 0,
        "max_per_class": int(per_class.max()) if len(per_class) else 0,
        "sha256": hashlib.sha256(text).hexdigest(),
    }


def subset_text(split: Split, indices: NDArray[np.int64]) -> bytes:
    """The content of a list of the images at `indices`: one name a line."""
    return "".join(_escaped(split.names[index]) + "\n" for index in indices.tolist()).encode()


def read_subset_list(path: Path, split: Split) -> NDArray[np.int64]:
    """The indices of the images that a list names, sorted. A name is one of the split's, or the end of just one.

    So published lists ("n01440764_10026.JPEG", a line) fit, in UTF-8 or UTF-16, with `./` before a name or blanks
    after it. Raises ValueError if a name fits none or several images,
    or stands there twice, FileNotFoundError if there is no list.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}")
    content = read_bounded(path, MAX_LIST_BYTES)
    of_windows = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if of_windows else "utf-8-sig", "surrogateescape").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"the list {path} begins as UTF-16 and is none: {error.reason}") from error
    if "\0" in text:
        raise ValueError(f"the list {path} is no text in UTF-8, or in UTF-16 with its mark at the beginning")
    wanted = [_unescaped(line.strip()) for line in text.split("\n") if line.strip()]
    if not wanted:
        raise ValueError(f"the list {path} is empty")
    if len(set(wanted)) != len(wanted):
        twice = Counter(wanted).most_common(1)[0][0]
        raise ValueError(f"the list {path} names {twice!r} more than once")
    missing = set(wanted)
    found = {name: index for index, name in enumerate(split.names) if name in missing}
    missing -= found.keys()
    depths = sorted({name.count("/") for name in missing})
    ends: dict[str, int] = {}
    for index, name in enumerate(split.names if missing else ()):
        parts = name.split("/")
        for end in ("/".join(parts[-depth - 1 :]) for depth in depths if depth < len(parts)):
            if end in ends:
                raise ValueError(f"{end!r} of the list {path} could be {split.names[ends[end]]!r} or {name!r}")
            if end in missing:
                ends[end] = index
    found |= ends
    missing -= ends.keys()
    if missing:
        some = ", ".join(repr(name) for name in sorted(missing)[:5])
        raise ValueError(f"{len(missing):,} of the {len(wanted):,} images of the list {path} are not there: {some}")
    indices = np.array(sorted(found.values()), dtype=np.int64)
    if len(np.unique(indices)) != len(wanted):
        raise ValueError(f"the list {path} names an image more than once, in different words")
    return indices


def _escaped(name: str) -> str:
    """A name as one line: as it is, or as JSON where it has what a line of UTF-8 cannot hold."""
    plain = name.isprintable() and not name.startswith('"') and name == name.strip()
    return name if plain else json.dumps(name)


def _unescaped(line: str) -> str:
    if not line.startswith('"'):
        return line.removeprefix("./")
    try:
        return str(json.loads(line))
    except ValueError as error:
        raise ValueError(f"{line!r} is no name: it begins with a quotation mark, but is no JSON string") from error

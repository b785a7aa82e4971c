"""Reads converted data sets with the libraries they are made for, in a process of its own.

For FFCV sets the numbers of threads of numba and torch as it is imported. As a script: requests (pickle) on stdin,
answers (pickle) on stdout.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def read_with_ffcv(
    path: Path, *, os_cache: bool, order: str, side: int = 16, decoder: str = "center"
) -> dict[str, Any]:
    """A request: one epoch of the stock Loader; its answer has `images` [N, side, side, 3] and `labels` [N]."""
    return {
        "with": "ffcv", "path": str(path), "os_cache": os_cache, "order": order, "side": side, "decoder": decoder
    }  # fmt: skip


def ffcv_layout(path: Path) -> dict[str, Any]:
    """A request: FFCV's dtypes, and what its Reader finds in the file."""
    return {"with": "ffcv layout", "path": str(path)}


def read_with_dali(tars: list[Path], *, extensions: tuple[str, ...]) -> dict[str, Any]:
    """A request: one epoch of fn.readers.webdataset; its answer has a list of bytes for each of `extensions`."""
    return {"with": "dali", "tars": [str(tar) for tar in tars], "extensions": extensions}


def decode_with_dali(tars: list[Path], *, extension: str) -> dict[str, Any]:
    """A request: as `read_with_dali`, but its answer has `images`, each uint8 [H, W, 3], decoded on the CPU."""
    return {"with": "dali", "tars": [str(tar) for tar in tars], "extensions": (extension,), "decode": True}


class ForeignReaders:
    """A process that answers requests, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)  # EOFError if it died; what it said is on stderr
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _ffcv(request: dict[str, Any]) -> dict[str, Any]:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    side = request["side"], request["side"]
    decoder = (
        CenterCropRGBImageDecoder(side, 1.0)
        if request["decoder"] == "center"
        else RandomResizedCropRGBImageDecoder(side)
    )
    loader = Loader(
        request["path"],
        batch_size=16,
        num_workers=1,
        os_cache=request["os_cache"],
        order=OrderOption[request["order"]],
        seed=7,
        drop_last=False,
        pipelines={"image": [decoder], "label": [IntDecoder()]},
    )
    images, labels = [], []
    for image, label in loader:
        images.append(np.array(image))
        labels.append(np.array(label)[:, 0])
    return {"images": np.concatenate(images), "labels": np.concatenate(labels)}


def _ffcv_layout(request: dict[str, Any]) -> dict[str, Any]:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

    reader = Reader(request["path"])
    return {
        "version": CURRENT_VERSION,
        "header": HeaderType,
        "field": FieldDescType,
        "metadata": get_metadata_type([RGBImageField(), IntField()]),
        "allocation": ALLOC_TABLE_TYPE,
        "names": list(reader.field_names),
        "handlers": [type(handler).__name__ for handler in reader.handlers.values()],
        "num_samples": int(reader.num_samples),
        "page_size": int(reader.page_size),
        "found_metadata": np.array(reader.metadata),
        "found_allocations": np.array(reader.alloc_table),
    }


def _dali(request: dict[str, Any]) -> dict[str, Any]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def read() -> Any:
        components = fn.readers.webdataset(
            paths=request["tars"],
            index_paths=[tar[: -len("tar")] + "idx" for tar in request["tars"]],
            ext=list(request["extensions"]),
            missing_component_behavior="error",
            pad_last_batch=False,
            name="reader",
        )
        if request.get("decode"):
            return fn.decoders.image(components, device="cpu", adjust_orientation=False)
        return tuple(components) if isinstance(components, list | tuple) else components

    pipeline = read()
    pipeline.build()
    count = pipeline.reader_meta("reader")["epoch_size"]
    found: dict[str, list[Any]] = {extension: [] for extension in request["extensions"]}
    while len(found[request["extensions"][0]]) < count:
        for values, batch in zip(found.values(), pipeline.run(), strict=True):
            values += [np.array(sample) for sample in batch]
    if request.get("decode"):
        return {"images": found[request["extensions"][0]][:count]}
    texts = {extension: [value.tobytes() for value in values[:count]] for extension, values in found.items()}
    return texts | {"count": count}


if __name__ == "__main__":
    kinds = {"ffcv": _ffcv, "ffcv layout": _ffcv_layout, "dali": _dali}
    output, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer: Any = kinds[request["with"]](request)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        output.write(pickle.dumps(answer))
        output.flush()

"""Reads converted data sets with the libraries they are made for; FFCV sets numbers of threads for a whole process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def read_with_ffcv(
    path: Path, *, os_cache: bool, order: str, side: int = 16, decoder: str = "center"
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch of the stock Loader: images [N, side, side, 3] and labels [N]."""
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    crop = CenterCropRGBImageDecoder if decoder == "center" else RandomResizedCropRGBImageDecoder
    loader = Loader(
        str(path),
        batch_size=16,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption[order],
        seed=7,
        drop_last=False,
        pipelines={
            "image": [crop((side, side), *([1.0] if decoder == "center" else []))],
            "label": [IntDecoder()],
        },
    )
    batches = [(np.array(image), np.array(label)[:, 0]) for image, label in loader]
    return np.concatenate([image for image, _ in batches]), np.concatenate([label for _, label in batches])


def ffcv_layout(path: Path) -> SimpleNamespace:
    """FFCV's dtypes, and what its Reader finds in the file."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

    dtypes = {"header": HeaderType, "field": FieldDescType, "allocation": ALLOC_TABLE_TYPE}
    dtypes["metadata"] = get_metadata_type([RGBImageField(), IntField()])
    reader = Reader(str(path))
    return SimpleNamespace(
        version=CURRENT_VERSION,
        dtypes=dtypes,
        fields={name: type(handler).__name__ for name, handler in reader.handlers.items()},
        num_samples=int(reader.num_samples),
        page_size=int(reader.page_size),
        metadata=np.array(reader.metadata),
        allocations=np.array(reader.alloc_table),
    )


def read_with_dali(tars: list[Path], *extensions: str, decode: bool = False) -> list[list[Any]]:
    """One epoch of fn.readers.webdataset: for each of `extensions` the bytes, or the images, uint8 [H, W, 3], decoded
    on the CPU.
    """
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def read() -> Any:
        components = fn.readers.webdataset(
            paths=list(map(str, tars)),
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=list(extensions),
            missing_component_behavior="error",
            pad_last_batch=False,
            name="reader",
        )
        if decode:
            return fn.decoders.image(components, device="cpu", adjust_orientation=False)
        return tuple(components) if isinstance(components, list | tuple) else components

    pipeline = read()
    pipeline.build()
    count = pipeline.reader_meta("reader")["epoch_size"]
    found: list[list[Any]] = [[] for _ in extensions]
    while len(found[0]) < count:
        for values, batch in zip(found, pipeline.run(), strict=True):
            values += [np.array(sample) if decode else np.array(sample).tobytes() for sample in batch]
    return [values[:count] for values in found]

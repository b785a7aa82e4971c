"""Files that torch.save wrote, read without running what they hold, and without more memory than they have bytes."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class UnreadableTensorsError(ValueError):
    """A file that does not hold tensors and plain values alone, or is damaged."""


def load_tensors(content: bytes, what: str, device: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote: tensors, numbers, text, and containers of them. what: what errors call it.

    Raises UnreadableTensorsError, also for tensors that would take more memory than the file has bytes.
    """
    try:
        _require_stored(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            document = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in _distinct(document))
    except pickle.UnpicklingError as error:
        raise UnreadableTensorsError(
            f"{what} is refused: it is damaged, or holds more than tensors and plain values, which could run code when "
            "read. None of it was executed"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch's readers raise whatever bytes lead them to
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise UnreadableTensorsError(f"{what} cannot be read as a file of PyTorch: {reason}") from error
    if size > len(content):
        raise UnreadableTensorsError(
            f"{what} is refused: its tensors would take {size:,} bytes, and it has {len(content):,}"
        )
    return document


def _require_stored(content: bytes) -> None:
    """Raises ValueError unless a file of torch's newer kind, a zip, holds what it says it does, uncompressed."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("it is compressed, or its parts overlap")


def _distinct(document: Any) -> Iterator[Tensor]:
    """The tensors in nested containers; those that are one and the same, as tied weights, once."""
    seen, todo = set(), [document]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided:
                raise ValueError(f"it has a tensor of the layout {value.layout}")
            place = value.data_ptr(), value.shape, value.stride()
            if place not in seen:
                seen.add(place)
                yield value
        elif isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)

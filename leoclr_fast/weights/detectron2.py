"""A `.pkl` that detectron2 loads as `MODEL.WEIGHTS`, written and read without detectron2.

Names as facebookresearch/moco's convert-pretrain-to-detectron2 gives them: conv1 and bn1 belong to `stem`, layer1 to
layer4 become res2 to res5, a batch-norm is the `norm` of its convolution, and downsample is the `shortcut`.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset_tools.array_pickles import load_array_pickle

_IN_BLOCK = (
    (re.compile(r"^bn(\d)\."), r"conv\1.norm."),
    (re.compile(r"^downsample\.0\."), "shortcut."),
    (re.compile(r"^downsample\.1\."), "shortcut.norm."),
)


def detectron2_name(name: str) -> str:
    """`layer1.0.bn2.weight` -> `res2.0.conv2.norm.weight`."""
    stage = re.match(r"layer(\d)\.(\d+)\.", name)
    prefix = f"res{int(stage[1]) + 1}.{stage[2]}." if stage else "stem."
    rest = name[stage.end() :] if stage else name
    for pattern, replacement in _IN_BLOCK:
        rest = pattern.sub(replacement, rest)
    return prefix + rest


def detectron2_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a .pkl with the tensors of a backbone."""
    model = {detectron2_name(name): tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump({"model": model, "__author__": "leoclr-fast", "matching_heuristics": True})
    return buffer.getvalue()


def read_detectron2(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a .pkl that `detectron2_bytes` made, under torchvision's `names`; raises KeyError for others."""
    our_names = {detectron2_name(name): name for name in names}
    model = load_array_pickle(path)["model"]
    return {our_names[name]: torch.from_numpy(array.copy()) for name, array in model.items()}


class _ArrayPickler(pickle.Pickler):
    """Arrays by the names `numpy.ndarray` and `numpy.dtype` alone, which every NumPy has; its own way of pickling them
    names private modules that moved between NumPy 1 and 2."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value).reshape(value.shape)
            return np.ndarray, (array.shape, array.dtype), (1, array.shape, array.dtype, False, array.tobytes())
        return NotImplemented

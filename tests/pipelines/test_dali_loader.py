"""What is particular to DALI; see test_loader.py and test_encoded_loaders.py for the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dataset_tools.sources import Split
from pipelines.dali_loader import DaliLoader, _decoder_hints
from tests.pipelines.optional_packages import needs_dali
from tests.pipelines.oracle import open_by_name

Open = Callable[..., DaliLoader]


@needs_dali
def test_an_error_that_no_image_is_to_blame_for(
    split: Split, open_loader: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(split, "dali")
    original = loader._built_pipeline

    class Failing:
        def __init__(self, pipeline: Any) -> None:
            self.pipeline, self.runs = pipeline, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipeline, name)

        def share_outputs(self) -> Any:
            self.runs += 1
            if self.runs == 5:
                raise RuntimeError("CUDA error 999")
            return self.pipeline.share_outputs()

    monkeypatch.setattr(loader, "_built_pipeline", lambda *args, **kwargs: Failing(original(*args, **kwargs)))
    message = r"DALI failed at step 2 of epoch 0: CUDA error 999"
    with pytest.raises(RuntimeError, match=message):
        list(loader.batches(0))


def test_without_dali(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    message = (
        r"^the loader dali needs NVIDIA DALI, which cannot be imported \(.*nvidia.dali.*\)\. Install "
        r"it by `pip install 'leoclr-fast\[dali\]'` .* --loader auto, resident and torchvision work$"
    )
    with pytest.raises(ImportError, match=message):
        open_by_name("dali", split)


class TestHints:
    def test_of_a_converted_data_set(self, split: Split, as_beton: Callable[[Split], Any]) -> None:
        converted = as_beton(split)
        records = converted.records
        width, height = int(records["width"].max()), int(records["height"].max())
        pixels = records["width"].astype(int) * records["height"]
        for part in (converted, converted.subset([1, 2, 3])):
            hints = _decoder_hints(part, 4, 2)
            assert (hints["preallocate_width_hint"], hints["preallocate_height_hint"]) == (width, height)
            assert 3 * pixels.mean() <= hints["bytes_per_sample_hint"] <= 3 * pixels.max()

    def test_are_bounded(self, split: Split, as_beton: Callable[[Split], Any]) -> None:
        converted = as_beton(split)
        for side, value in (("width", 40_000), ("height", 30_000)):
            converted.records.columns[side] = np.array([*converted.records.columns[side][:-1], value])
        hints = _decoder_hints(converted, 256, 16)
        assert hints["preallocate_width_hint"] * hints["preallocate_height_hint"] * 16 <= 2**28
        assert hints["preallocate_width_hint"] > hints["preallocate_height_hint"] > 1000

    def test_of_a_folder_there_are_none(self, split: Split) -> None:
        assert _decoder_hints(split, 4, 2) == {}

from __future__ import annotations

import math

import pytest

from pipelines.config import ViewConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image size 0 is not allowed: give at least 1 and at most 4096"),
        ({"crop_scale": (0.0, 1.0)}, r"crop scale \(0.0, 1.0\) is not allowed: give 0 < lowest <= highest <= 1"),
        ({"crop_scale": (0.5, 0.2)}, "crop scale"),
        ({"crop_scale": (0.5, 1.1)}, "crop scale"),
        ({"crop_scale": (math.nan, 1.0)}, "crop scale"),
        ({"crop_ratio": (0.0, 1.0)}, r"crop ratio \(0.0, 1.0\) is not allowed: give 0 < lowest <= highest"),
        ({"crop_ratio": (2.0, 1.0)}, "crop ratio"),
        ({"blur_sigma": (2.0, 0.1)}, r"blur sigma \(2.0, 0.1\) is not allowed: give 0 < lowest <= highest"),
        *(
            ({f"{name}_probability": 1.5}, f"{name} probability 1.5")
            for name in ("jitter", "grayscale", "blur", "flip")
        ),
        *(({name: -0.1}, f"{name} -0.1 is not") for name in ("brightness", "contrast", "saturation", "hue")),
        ({"hue": 0.6}, "hue 0.6 is not allowed: give at least 0 and at most 0.5"),
        ({"center_crop_fraction": 0.0}, "center crop fraction 0.0 is not allowed: give more than 0 and at most 1"),
        ({"std": (0.2, 0.0, 0.2)}, "std 0.0 is not allowed: give more than 0"),
    ],
)
def test_bad_views(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewConfig(**changes)

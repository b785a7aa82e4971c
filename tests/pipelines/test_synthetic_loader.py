from __future__ import annotations

import numpy as np
import pytest
import torch

from dataset_tools.sources import Split
from pipelines.order import TrainOrder
from tests.pipelines.oracle import open_by_name


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_fixed_crops_with_the_labels_of_the_order(split: Split, rank: int) -> None:
    order = TrainOrder(num_images=23, batch_size=7, seed=3, rank=rank, world_size=3)
    with open_by_name("synthetic", split, order) as loader:
        batches = [*loader.batches(0), *loader.batches(1, start_step=2)]
    assert [(batch.epoch, batch.step) for batch in batches] == [(0, 0), (0, 1), (0, 2), (1, 2)]
    for batch in batches:
        assert batch.crops.shape == (3 if rank == 0 else 2, 3, 16, 16, 3)
        assert batch.crops.dtype == torch.uint8
        assert torch.equal(batch.crops, batches[0].crops)
        assert np.array_equal(batch.indices, order.indices(batch.epoch, batch.step))
        assert batch.labels.tolist() == split.labels[batch.indices].tolist()
        assert batch.boxes.shape == (len(batch.indices), 3, 8)
        assert (batch.boxes == [0, 0, 16, 16, 16, 16, 0, 0]).all()
    assert len(batches[0].crops.unique()) > 200


def test_no_image_is_read(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "read", lambda _: pytest.fail("an image was read"))
    list(open_by_name("synthetic", split).batches(0))

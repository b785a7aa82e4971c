"""A loader in a file of its own, registered by one entry in the factory's table."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch

from dataset_tools.sources import Split
from pipelines.config import LoaderConfig
from pipelines.crop_resize import cut_views
from pipelines.decode import Substitutes
from pipelines.factory import LOADERS, choose_loader, settle_loader
from pipelines.loader import DecodedBatch, Loader
from pipelines.packed_images import PackedImages
from pipelines.views import draw_boxes
from tests.pipelines.oracle import assert_like_the_oracle, in_order, open_by_name


class PlainLoader(Loader):
    """Decodes image by image in the process that trains."""

    name = "plain"

    def decode_batches(self, epoch: int, start_step: int) -> Generator[DecodedBatch, None, None]:
        substitutes = Substitutes(self.split)
        for step in range(start_step, self.steps_per_epoch):
            unreadable: dict[int, str] = {}
            found = [substitutes.decode(index, unreadable) for index in self.order.indices(epoch, step).tolist()]
            images = {index: np.array(image) for index, image in filter(None, found)}
            indices = np.array([index for index, _ in filter(None, found)], dtype=np.int64)
            heights, widths = (np.array([images[index].shape[axis] for index in indices]) for axis in (0, 1))
            boxes = draw_boxes(self.views, self.view_config, heights, widths, self.seed, epoch, indices)
            pixels = torch.from_numpy(np.concatenate([images[index].reshape(-1) for index in indices]))
            packed = PackedImages.side_by_side(pixels, heights, widths)
            crops = cut_views(packed, np.arange(len(indices)), boxes, self.view_config)
            self._num_decodes += len(images)
            yield DecodedBatch(crops, indices, boxes, unreadable)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOADERS, "plain", PlainLoader)


def test_it_hands_out_what_the_others_do(split: Split) -> None:
    with open_by_name("plain", split) as loader:
        assert isinstance(loader, PlainLoader)
        assert_like_the_oracle(loader, epochs=2)
        assert [batch.step for batch in loader.batches(0, start_step=2)] == [2, 3]


def test_unreadable_images_are_replaced_and_reported(split: Split, damage: object) -> None:
    damage(split, 4, 22)  # type: ignore[operator]
    with open_by_name("plain", split, in_order(split)) as loader:
        assert_like_the_oracle(loader)
        assert sorted(loader.unreadable) == [4, 22]


def test_it_is_named_among_the_others_and_auto_does_not_take_it(split: Split) -> None:
    with pytest.raises(
        ValueError, match=r"there is no loader 'plan'\. Did you mean plain\?.*Allowed: .*synthetic, plain"
    ):
        open_by_name("plan", split)
    assert choose_loader(split, LoaderConfig(resident_limit_gib=0.0), torch.device("cpu")) != "plain"
    assert settle_loader(split, LoaderConfig(name="plain"), torch.device("cpu")).name == "plain"


def test_auto_takes_one_that_asks_for_it(split: Split, package_log: pytest.LogCaptureFixture) -> None:
    class FastLoader(PlainLoader):
        auto_places = {"cpu": 0}  # noqa: RUF012

    LOADERS["plain"] = FastLoader
    assert choose_loader(split, LoaderConfig(resident_limit_gib=0.0), torch.device("cpu")) == "plain"
    assert "; not ffcv (slower), dali (slower" in package_log.messages[-1]

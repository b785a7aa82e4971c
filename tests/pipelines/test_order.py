from __future__ import annotations

import numpy as np
import pytest

from pipelines.order import SequentialOrder, TrainOrder, rank_slice


@pytest.mark.parametrize(
    ("batch_size", "world_size", "sizes"),
    [
        (256, 3, [86, 85, 85]),
        (256, 1, [256]),
        (8, 8, [1] * 8),
        (10, 4, [3, 3, 2, 2]),
        (2, 4, [1, 1, 0, 0]),
        (0, 2, [0, 0]),
    ],
)
def test_rank_slices_share_a_batch(batch_size: int, world_size: int, sizes: list[int]) -> None:
    parts = [rank_slice(batch_size, rank, world_size) for rank in range(world_size)]
    assert [part.stop - part.start for part in parts] == sizes
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(batch_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_images", "batch_size"), [(96, 12), (97, 12), (107, 12), (12, 12), (50, 7)])
def test_each_image_at_most_once_an_epoch(num_images: int, batch_size: int, world_size: int) -> None:
    orders = [
        TrainOrder(num_images=num_images, batch_size=batch_size, seed=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = orders[0].steps_per_epoch
    assert steps == num_images // batch_size
    for epoch in range(3):
        seen = []
        for step in range(steps):
            slices = [order.indices(epoch, step) for order in orders]
            assert [len(part) for part in slices] == [order.max_local_batch_size for order in orders]
            assert max(map(len, slices)) - min(map(len, slices)) <= 1
            together = np.concatenate(slices)
            assert np.array_equal(together, orders[0].global_indices(epoch, step))
            seen.extend(together.tolist())
        assert len(seen) == len(set(seen)) == steps * batch_size
        assert set(seen) <= set(range(num_images))
        if num_images % batch_size == 0:
            assert set(seen) == set(range(num_images))


def test_the_dropped_tail_changes_with_the_epoch() -> None:
    order = TrainOrder(num_images=13, batch_size=4, seed=0)
    dropped = set()
    for epoch in range(60):
        seen = np.concatenate([order.indices(epoch, step) for step in range(3)])
        dropped |= set(range(13)) - set(seen.tolist())
    assert dropped == set(range(13))


def test_the_order_is_the_same_for_ever() -> None:
    order = TrainOrder(num_images=1_281_167, batch_size=256, seed=0)
    assert order.steps_per_epoch == 5004
    assert order.indices(3, 5003)[:6].tolist() == LAST_IMAGENET_BATCH
    assert order.indices(3, 0).dtype == np.int64


LAST_IMAGENET_BATCH = [851964, 1139443, 899688, 975946, 988627, 1734]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_images", "batch_size"), [(12, 4), (13, 4), (14, 4), (2, 4), (1, 3), (0, 4)])
def test_sequential_order(num_images: int, batch_size: int, world_size: int) -> None:
    orders = [
        SequentialOrder(num_images=num_images, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = orders[0].steps_per_epoch
    assert steps == -(-num_images // batch_size)
    seen = []
    for step in range(steps):
        slices = [order.indices(epoch=step % 2, step=step) for order in orders]
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
        assert all(len(part) <= order.max_local_batch_size for part, order in zip(slices, orders, strict=True))
        together = np.concatenate(slices)
        assert np.array_equal(together, orders[-1].global_indices(0, step))
        seen.extend(together.tolist())
    assert seen == list(range(num_images))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_more_ranks_than_images_of_a_batch(micro_batches: int) -> None:
    message = f"a global batch of 2.* cannot be shared by 3 ranks.*raise --batch-size to {3 * micro_batches} or more"
    with pytest.raises(ValueError, match=message):
        SequentialOrder(num_images=10, batch_size=2, world_size=3, micro_batches=micro_batches)


def test_fewer_images_than_a_batch() -> None:
    message = "the data has 9 images, fewer than one batch of 10; give more images or a --batch-size of at most 9"
    with pytest.raises(ValueError, match=message):
        TrainOrder(num_images=9, batch_size=10, seed=0)


def test_an_incomplete_last_batch_can_be_kept() -> None:
    """MoCo's linear evaluation: 5,005 steps on ImageNet, every image in every epoch, also of less than a batch."""
    assert TrainOrder(num_images=1_281_167, batch_size=256, seed=0, keep_incomplete=True).steps_per_epoch == 5005
    for num_images in (3, 10, 11):
        order = TrainOrder(num_images=num_images, batch_size=5, seed=1, keep_incomplete=True)
        batches = [order.global_indices(2, step) for step in range(order.steps_per_epoch)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(num_images))
        assert [len(batch) for batch in batches] == {3: [3], 10: [5, 5], 11: [5, 5, 1]}[num_images]

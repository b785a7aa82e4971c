"""The shuffle of the keys: no batch-norm of keys has exactly the images of a batch-norm of queries."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from leoclr_fast.config import MethodConfig, ResultConfig
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.key_batchnorm import KeyBatchNorm2d
from leoclr_fast.method.key_schedule import KeySchedule
from leoclr_fast.method.methods import build_method
from tests.leoclr_fast.method.test_encoders import TINY

Groups = list[frozenset[int]]


def schedules(config: MethodConfig, batch_size: int, world_size: int, micro_batches: int) -> list[KeySchedule]:
    """Of every rank."""
    return [
        KeySchedule(
            config,
            BatchLayout(batch_size=batch_size, micro_batches=micro_batches, rank=rank, world_size=world_size),
            num_keys=2,
        )
        for rank in range(world_size)
    ]


def parts(numbers: np.ndarray, least: int) -> Groups:
    return [frozenset(part.tolist()) for part in np.array_split(numbers, max(1, len(numbers) // least))]


def normalised_together(ranks: list[KeySchedule], step: int) -> tuple[Groups, Groups]:
    """The images of each batch-norm of keys and of queries, as the encoders meet them."""
    config, batch_size = ranks[0].config, ranks[0].layout.batch_size
    keys, queries = Groups(), Groups()
    order = ranks[0].draw(7, step)
    for rank, encoded in zip(ranks, order.encoded, strict=True):
        for views in np.split(encoded, np.cumsum(rank.pass_sizes)[:-1]):
            keys += parts(views % batch_size, config.key_batchnorm_group)
        least = config.query_batchnorm_group if config.query_batchnorm == "split" else batch_size
        for share in rank.layout.own:
            queries += parts(np.arange(share.start, share.stop), least)
    assert sorted(np.concatenate(order.encoded).tolist()) == list(range(2 * batch_size))
    return keys, queries


@pytest.mark.parametrize("query", ["plain", "split"])
@pytest.mark.parametrize("passes", ["separate", "joint"])
@pytest.mark.parametrize("mode", ["shuffle", "split"])
@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ((1, 2, 3, 8), (4, 7, 16, 33, 64)),
        pytest.param((1, 2, 3, 4, 8, 16), (4, 6, 7, 16, 33, 64, 256), marks=pytest.mark.long),
    ],
)
def test_no_group_of_keys_has_the_images_of_a_query_group(
    counts: tuple[int, ...], sizes: tuple[int, ...], mode: str, passes: str, query: str
) -> None:
    """Over ranks x micro-batches x batch sizes, whether groups are large or tiny; what cannot be so is refused."""
    num_allowed = 0
    for world_size, micro, size in product(counts, counts, sizes):
        if size < world_size * micro:
            continue
        for group in (2, 8, 32):
            config = MethodConfig(
                key_batchnorm=mode,  # type: ignore[arg-type]
                key_passes=passes,  # type: ignore[arg-type]
                query_batchnorm=query,  # type: ignore[arg-type]
                key_batchnorm_group=group,
                query_batchnorm_group=group,
            )
            ranks = schedules(config, size, world_size, micro)
            if ranks[0].leak() is not None:
                continue
            num_allowed += 1
            for step in range(2):
                keys, queries = normalised_together(ranks, step)
                assert not set(keys) & set(queries), (world_size, micro, size, group)
                assert len(keys) > 1
    assert num_allowed > 80


def test_groups_are_the_same_on_any_number_of_ranks() -> None:
    """Groups of 32, as on MoCo-v2's 8 GPUs: a step on 1, 2, 4 and 8 ranks normalises the same images together."""
    config = MethodConfig(query_batchnorm="split")
    found = [tuple(map(set, normalised_together(schedules(config, 256, ranks, 1), 3))) for ranks in (1, 2, 4, 8)]
    assert found.count(found[0]) == 4
    assert [len(groups) for groups in found[0]] == [16, 8]


@pytest.mark.parametrize(
    ("world_size", "micro", "size", "changes", "expected"),
    [
        (2, 1, 64, {"key_batchnorm": "split", "key_batchnorm_group": 4}, None),
        (
            2,
            1,
            4,
            {"key_batchnorm": "split", "key_batchnorm_group": 2},
            "give a larger --batch-size, --method.key-batchnorm shuffle, --method.key-batchnorm ema, or plain",
        ),
        (
            1,
            1,
            2,
            {},
            r"all keys are in one group, .*; give a larger --batch-size, --method.key-batchnorm ema, or plain",
        ),
        (2, 2, 4, {}, "in every order a group of keys has exactly the images of a query's batch-norm"),
        (1, 8, 256, {}, None),
    ],
)
def test_what_cannot_be_shuffled_is_refused(
    world_size: int, micro: int, size: int, changes: dict[str, object], expected: str | None
) -> None:
    config = MethodConfig(projection_dim=8, queue_size=256, **changes)  # type: ignore[arg-type]
    result = ResultConfig(backbone=TINY, method=config, batch_size=size, micro_batches=micro)
    method = build_method(result, Ranks(0, world_size))
    layout = BatchLayout(batch_size=size, micro_batches=micro, world_size=world_size)
    if expected is None:
        method.plan(layout)
    else:
        with pytest.raises(ValueError, match=expected):
            method.plan(layout)


@pytest.mark.parametrize(
    ("world_size", "size", "mode", "group"),
    [(1, 63, "shuffle", 16), (1, 64, "shuffle", 32), (1, 8, "shuffle", 4), (2, 64, "split", 16), (1, 4, "shuffle", 2)],
)
def test_a_small_batch_has_smaller_groups(
    world_size: int, size: int, mode: str, group: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = MethodConfig(projection_dim=8, queue_size=64, key_batchnorm=mode)  # type: ignore[arg-type]
    method = build_method(ResultConfig(backbone=TINY, method=config, batch_size=size), Ranks(0, world_size))
    with caplog.at_level("INFO", "leoclr_fast"):
        method.plan(BatchLayout(batch_size=size, world_size=world_size))
    assert [f"key batch-norm {mode} in groups of {group}: a batch of {size} on" in m for m in caplog.messages] == [
        True
    ] * (group != 32)
    sizes = {norm.group_size for norm in method.modules() if isinstance(norm, KeyBatchNorm2d)}
    assert sizes == {group}


@pytest.mark.parametrize(
    ("mode", "query", "leaks"), [("plain", "plain", 2), ("plain", "split", 0), ("ema", "plain", 0), ("sync", "sync", 1)]
)
def test_a_leak_that_was_asked_for_is_named(
    mode: str, query: str, leaks: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = MethodConfig(projection_dim=8, queue_size=64, key_batchnorm=mode, query_batchnorm=query)  # type: ignore[arg-type]
    config = replace(config, query_batchnorm_group=4)
    method = build_method(ResultConfig(backbone=TINY, method=config, batch_size=16), Ranks(0, 2))
    method.plan(BatchLayout(batch_size=16, world_size=2))
    expected = f"key batch-norm {mode}: {leaks} of {leaks} groups of keys have exactly the images of a query's"
    assert [expected in message for message in caplog.messages] == [True] * (leaks > 0)

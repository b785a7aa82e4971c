"""A rank that fails leaves its reason to the others; of one that says nothing they know by its silence."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.distributed import failures
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.failures import failures_explained, is_lost_connection
from leoclr_fast.distributed.host_group import OtherRankError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """Where three ranks have met."""
    monkeypatch.setattr(failures, "_PATIENCE_S", 0.3)
    store = dist.TCPStore("localhost", 0, 3, is_master=True, wait_for_workers=False)
    for rank in range(3):
        store.set(f"joined/{rank}", f"node-{rank} (process {100 + rank})")
    return store


def fails(ranks: Ranks, error: BaseException, step: int = 16) -> None:
    with failures_explained(ranks, lambda: step):
        raise error


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:61648")


def test_the_first_reason_reaches_the_others(store: dist.Store) -> None:
    with pytest.raises(ValueError, match="no such image"):
        fails(Ranks(2, 3, store=store), ValueError("no such image"))
    with pytest.raises(MemoryError):
        fails(Ranks(1, 3, store=store), MemoryError("after it"))
    with pytest.raises(OtherRankError) as ended:
        fails(Ranks(0, 3, store=store), LOST)
    assert str(ended.value) == (
        "rank 2 on node-2 (process 102) failed in step 17: no such image; the same command continues from the last "
        "checkpoint"
    )
    assert ended.value.exit_code == 75


def test_a_silent_rank_is_named(store: dist.Store) -> None:
    store.set("lost/2", "")
    with pytest.raises(OtherRankError, match=r"^lost rank 1 on node-1 \(process 101\) in step 17: \[gloo"):
        fails(Ranks(0, 3, store=store), LOST)


def test_nobody_is_named_if_all_have_lost_each_other(store: dist.Store) -> None:
    for rank in (1, 2):
        store.set(f"lost/{rank}", "")
    with pytest.raises(OtherRankError, match=r"^the connections between the ranks broke in step 17: "):
        fails(Ranks(0, 3, store=store), LOST)


def test_an_orderly_end_is_no_failure(store: dist.Store) -> None:
    for error in (StoppedBySignalError("saved"), OtherRankError("rank 1")):
        with pytest.raises(type(error)) as ended:
            fails(Ranks(0, 3, store=store), error)
        assert ended.value is error
    assert not store.check(["failure"])


def test_what_a_lost_connection_is() -> None:
    assert is_lost_connection(LOST)
    assert is_lost_connection(dist.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_connection(ValueError("gloo"))


def test_a_single_rank_fails_as_it_is() -> None:
    with pytest.raises(RuntimeError) as ended:
        fails(Ranks(), LOST)
    assert ended.value is LOST

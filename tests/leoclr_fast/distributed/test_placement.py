"""Cores of the ranks: shares, memory nodes, threads."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from leoclr_fast.distributed import placement
from leoclr_fast.distributed.placement import Place, settle, settled
from pipelines.cores import available_cores

CPU = torch.device("cpu")
TWO_NODES = ((0, (0, 1, 2, 3, 8, 9, 10, 11)), (1, (4, 5, 6, 7, 12, 13, 14, 15)))
ALL = tuple(range(16))


def at(gpu_node: int | None, cores: tuple[int, ...] = ALL, machine: str = "a") -> Place:
    return Place(machine=machine, cores=cores, nodes=TWO_NODES, gpu_node=gpu_node)


def shares(places: list[Place]) -> list[int]:
    return [rank.share for rank in settle(places)]


class TestSettle:
    def test_ranks_of_a_machine_share_its_cores(self) -> None:
        assert shares([at(None)]) == [16]
        assert shares([at(None)] * 3) == [5, 5, 5]
        assert shares([at(None)] * 3 + [at(None, machine="b")]) == [5, 5, 5, 16]
        assert shares([at(None, cores=(0,))] * 3) == [1, 1, 1]

    def test_who_has_cores_of_its_own_is_not_divided_again(self) -> None:
        """As srun and `torchrun --numa-binding exclusive` start ranks."""
        places = [at(0, cores=(0, 1, 2, 3)), at(0, cores=(8, 9)), at(1, cores=(4, 5, 6, 7, 12))]
        assert shares(places) == [4, 2, 5]
        assert [(rank.cores, rank.node) for rank in settle(places)] == [(place.cores, None) for place in places]

    def test_masks_that_overlap(self) -> None:
        assert shares([at(None, cores=(0, 1, 2, 3)), at(None, cores=(2, 3, 4, 5))]) == [3, 3]
        assert shares([at(None, cores=(0, 1, 2))] * 2 + [at(None, cores=(2,))]) == [1, 1, 1]

    def test_ranks_of_a_container_share_its_quota(self) -> None:
        pod = replace(at(None), quota=6.0, container="pod 1")
        assert shares([pod, pod, replace(pod, container="pod 2", quota=2.5), replace(pod, quota=None)]) == [2, 2, 2, 4]
        assert shares([replace(pod, quota=0.5)]) == [1]
        assert shares([replace(pod, quota=64.0)]) == [16]

    def test_a_rank_on_a_gpu_keeps_to_the_cores_beside_it(self) -> None:
        outcome = settle([at(0), at(0), at(1)])
        assert [rank.node for rank in outcome] == [0, 0, 1]
        assert [rank.cores for rank in outcome] == [TWO_NODES[0][1], TWO_NODES[0][1], TWO_NODES[1][1]]
        assert [rank.share for rank in outcome] == [4, 4, 8]

    @pytest.mark.parametrize(
        "places",
        [
            [at(0)],
            [at(0), at(0)],
            [at(0), at(1, machine="b")],
            [at(None), at(None)],
            [at(1, cores=(0, 1)), at(0, cores=(0, 1))],
            [replace(at(0), nodes=TWO_NODES[:1])] * 2,
        ],
        ids=["alone", "one node idle", "two machines", "no GPU", "GPU out of reach", "one node"],
    )
    def test_no_core_is_given_up_in_vain(self, places: list[Place]) -> None:
        assert [(rank.cores, rank.node) for rank in settle(places)] == [(place.cores, None) for place in places]


class TestSettled:
    def test_what_holds_within(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As the second of two ranks under torchrun, each with a GPU at a memory node of its own."""
        kept: list[list[int]] = []
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: kept.append(sorted(cores)))
        store, before = dist.HashStore(), available_cores()
        at(0).tell(store, 0)
        at(1).tell(store, 1)
        with settled(store, 1, 2, CPU) as line:
            assert line == f"2 ranks: 8 cores each, {torch.get_num_threads()} torch threads; memory nodes: 0 1"
            assert available_cores() == 8
        assert kept == [list(TWO_NODES[1][1]), sorted(os.sched_getaffinity(0))]
        assert available_cores() == before

    @pytest.mark.parametrize(("given", "threads"), [("1", 3), ("2", None), (None, None)])
    def test_threads(self, monkeypatch: pytest.MonkeyPatch, given: str | None, threads: int | None) -> None:
        """torchrun's one thread becomes the share; what the user said stays."""
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        store, before = dist.HashStore(), torch.get_num_threads()
        for rank in range(4):
            at(None, cores=ALL[:15] if rank else ALL[:12]).tell(store, rank)
        with settled(store, 0, 4, CPU) as line:
            assert torch.get_num_threads() == (threads or before)
            assert line.startswith(f"4 ranks: 3 to 4 cores each, {threads or before} torch thread")
        assert torch.get_num_threads() == before

    def test_this_process(self) -> None:
        place = Place.here(CPU)
        assert place.cores == tuple(sorted(os.sched_getaffinity(0)))
        assert place.gpu_node is None
        store = dist.HashStore()
        place.tell(store, 0)
        assert Place.of_json(store.get(placement._key(0))) == place

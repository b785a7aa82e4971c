"""Joining the ranks: each wait is bounded and ends in what to do."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from leoclr_fast.distributed.process_group import JoinError, join, wait_for_all
from tests.leoclr_fast.held_port import held_port

LIMIT_S = 30.0


def announce(monkeypatch: pytest.MonkeyPatch, port: int, rank: int) -> None:
    words = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in words.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_another_program_has(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as other:
        port, start_s = other.getsockname()[1], time.monotonic()
        announce(monkeypatch, port, rank)
        with pytest.raises(
            JoinError, match=rf"rank {rank} on .* did not meet the others at localhost:{port} within 1 s"
        ):
            join(1)
        assert time.monotonic() - start_s < LIMIT_S


def test_a_master_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with held_port() as port:
        announce(monkeypatch, port, 1)
        with pytest.raises(JoinError, match=r"Is the first node up, .*--monitor.join-limit-s"):
            join(0.5)


def test_a_rank_that_does_not_come() -> None:
    store = dist.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT_S))
    with pytest.raises(JoinError, match=r"after 0.5 s, rank 1 of 2 did not come; here: rank 0 on"):
        wait_for_all(store, 0, 2, 0.5)


def test_an_environment_that_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, 29500, 0)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="environment variable MASTER_PORT expected, but not set"):
        join(LIMIT_S)

"""Joining the ranks: each wait is bounded and ends in what to do."""

from __future__ import annotations

import socket
import time

import pytest

from leoclr_fast.distributed.process_group import JoinError, Rendezvous
from tests.leoclr_fast.held_port import held_port

LIMIT_S = 30.0


def rendezvous(rank: int, port: int, *, has_host: bool = True) -> Rendezvous:
    return Rendezvous(address="localhost", port=port, rank=rank, world_size=2, attempt=0, has_host=has_host)


def test_a_port_that_another_program_has() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(JoinError, match=rf"no torch store at localhost:{port}: .*in use.*another MASTER_PORT if"):
            rendezvous(0, port, has_host=False).connect(5)


def test_something_else_listens_at_the_port() -> None:
    with socket.create_server(("", 0)) as other:
        port, start_s = other.getsockname()[1], time.monotonic()
        with pytest.raises(JoinError, match=rf"found no torch store at localhost:{port}.*another MASTER_PORT"):
            rendezvous(1, port).connect(1)
        assert time.monotonic() - start_s < LIMIT_S


def test_a_master_that_does_not_come() -> None:
    told = r"waited 0.5 s for the master localhost:\d+.*--monitor.join-limit-s"
    with held_port() as port, pytest.raises(JoinError, match=told):
        rendezvous(1, port).connect(0.5)


def test_a_rank_that_does_not_come() -> None:
    told = r"after 0.5 s, rank 1 of 2 did not come to localhost:\d+; here: rank 0 on"
    with held_port() as port:
        first = rendezvous(0, port, has_host=False)
        store = first.connect(LIMIT_S)
        with pytest.raises(JoinError, match=told):
            first.wait_for_all(store, 0.5)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"MASTER_PORT": None}, "RANK and WORLD_SIZE are set and MASTER_PORT not"),
        ({"RANK": "one"}, "RANK=one is not allowed: give a number"),
        ({"RANK": "2"}, "RANK=2 is not allowed with WORLD_SIZE=2: ranks count from 0"),
    ],
)
def test_an_environment_that_is_not_whole(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], told: str
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (whole | changed).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        Rendezvous.of_environment()

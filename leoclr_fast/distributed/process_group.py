"""The process group that torchrun announces: joined within a bounded time, and the device of this process in it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.failures import failures_explained

JOIN_LIMIT_S = 300.0
"""How long a rank waits for the others before it says who is missing."""

COLLECTIVE_TIMEOUT_S = 600.0
"""How long a rank waits in a collective for the others before it fails: torch's own default for NCCL."""
EVALUATION_TIMEOUT_S = 1800.0
"""The same in an evaluation, in which a rank may be the first to read or index its data."""
_NCCL_MARGIN_S = 60.0
_MAX_LISTED = 8


class JoinError(RuntimeError):
    """The ranks did not find each other."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of a run meet, as torchrun (or whoever started them) tells it in the environment."""

    address: str
    port: int
    rank: int
    world_size: int
    attempt: int
    """How often torchrun has started the ranks again."""
    has_host: bool
    """Whether torchrun itself hosts the store; otherwise the first rank does."""

    @classmethod
    def of_environment(cls) -> Rendezvous | None:
        """None outside torchrun. Raises ValueError if variables are missing or are no numbers."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ValueError(
                f"RANK and WORLD_SIZE are set and {' and '.join(missing)} not: start the ranks with torchrun, or set "
                "all four; unset RANK to run alone"
            )
        numbers = {}
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            try:
                numbers[name] = int(os.environ[name])
            except ValueError as error:
                raise ValueError(f"{name}={os.environ[name]} is not allowed: give a number") from error
        if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise ValueError(
                f"RANK={numbers['RANK']} is not allowed with WORLD_SIZE={numbers['WORLD_SIZE']}: ranks count from 0"
            )
        return cls(
            address=os.environ["MASTER_ADDR"],
            port=numbers["MASTER_PORT"],
            rank=numbers["RANK"],
            world_size=numbers["WORLD_SIZE"],
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            has_host=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def connect(self, limit_s: float) -> dist.Store:
        """A new connection to the store. Raises JoinError if there is none within the limit, or its port is taken."""
        hosts = self.rank == 0 and not self.has_host
        if not hosts:
            self._wait_for_port(limit_s)
        return dist.PrefixStore(self._prefix, self._open_store(hosts, limit_s))

    @property
    def _prefix(self) -> str:
        """In torchrun's store another one after every restart, so that nothing of before is read. The first rank's own
        begins anew, and torchruns that joined the run later have counted fewer restarts.
        """
        if not self.has_host:
            return "leoclr_fast"
        return f"leoclr_fast/{self.attempt}/{self.world_size}"

    def wait_for_all(self, store: dist.Store, limit_s: float) -> None:
        """Until every rank is here. Raises JoinError, with the ranks that are missing and those that are there."""
        store.set(f"joined/{self.rank}", f"{socket.gethostname()} (process {os.getpid()})")
        keys = [f"joined/{rank}" for rank in range(self.world_size)]
        deadline, pause_s = time.monotonic() + limit_s, 0.01
        while not store.check(keys):
            if time.monotonic() > deadline:
                here = [rank for rank, key in enumerate(keys) if store.check([key])]
                missing = [rank for rank in range(self.world_size) if rank not in here]
                places = [f"rank {rank} on {store.get(keys[rank]).decode()}" for rank in here[:_MAX_LISTED]]
                raise JoinError(
                    f"after {limit_s:g} s, {listed_ranks(missing)} of {self.world_size} did not come to "
                    f"{self.address}:{self.port}; here: {', '.join(places)}{'…' if len(here) > _MAX_LISTED else ''}. "
                    "Look at why they did not start, or give --monitor.join-limit-s more seconds."
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)

    def _wait_for_port(self, limit_s: float) -> None:
        """A quiet wait: torch's own one prints a trace of its C++ calls."""
        deadline = time.monotonic() + limit_s
        while True:
            left = deadline - time.monotonic()
            try:
                socket.create_connection((self.address, self.port), timeout=max(0.1, min(5.0, left))).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise JoinError(
                        f"rank {self.rank} on {socket.gethostname()} waited {limit_s:g} s for the master "
                        f"{self.address}:{self.port} and cannot connect to it: {error.strerror or error}. Is the first "
                        "node up, is the address right, and does a firewall let the port through? "
                        "--monitor.join-limit-s sets how long to wait."
                    ) from error
            time.sleep(min(0.2, max(0.0, left)))

    def _open_store(self, hosts: bool, limit_s: float) -> dist.Store:
        """In a thread: whatever listens at the port instead of a store would be waited for without an end."""
        outcome: list[dist.Store | Exception] = []

        def connect() -> None:
            try:
                outcome.append(
                    dist.TCPStore(
                        self.address,
                        self.port,
                        self.world_size,
                        is_master=hosts,
                        timeout=timedelta(seconds=limit_s),
                        wait_for_workers=False,
                        multi_tenant=True,
                    )
                )
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(limit_s)
        if outcome and isinstance(outcome[0], dist.Store):
            return outcome[0]
        reason = f": {str(outcome[0]).splitlines()[0]}" if outcome else ", although something listens there"
        raise JoinError(
            f"rank {self.rank} on {socket.gethostname()} found no torch store at {self.address}:{self.port}{reason}. "
            "Choose another MASTER_PORT if another program has it."
        )


@contextmanager
def process_group(
    device: str, join_limit_s: float = JOIN_LIMIT_S, timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group that torchrun announced in the environment, if any, and leave it at the end.

    device: `auto`, `cpu`, `cuda` or `cuda:N`. join_limit_s: how long to wait for the other ranks at the start.
    timeout_s: how long to wait for them in a collective.
    Yields this process's `Ranks` and its device.
    Raises ValueError for a device that this machine does not have, JoinError if ranks or their master do not come, and
    OtherRankError instead of what torch raises when another rank is gone or does not answer.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = resolve_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    rendezvous = Rendezvous.of_environment()
    if rendezvous is None:
        yield Ranks(), chosen
        return
    rank, world_size = rendezvous.rank, rendezvous.world_size
    store = rendezvous.connect(join_limit_s)
    rendezvous.wait_for_all(store, join_limit_s)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        # NCCL's watchdog ends the process without a word: the hosts' own collectives, which name the rank, come first.
        timeout=timedelta(seconds=timeout_s + (_NCCL_MARGIN_S if chosen.type == "cuda" else 0.0)),
    )
    ranks = Ranks(rank, world_size, store=store if world_size > 1 else None)
    try:
        with failures_explained(ranks):
            yield ranks, chosen
    except StoppedBySignalError:
        # torchrun sends SIGTERM to all as soon as one has left; the exit code shall tell of an orderly end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    # Not after an exception: closing may wait for ranks that wait for this one, and the error must be printed first.
    dist.destroy_process_group()


def listed_ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0, 1 and 7`; of many only the first."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > _MAX_LISTED:
        return f"ranks {', '.join(map(str, ranks[:_MAX_LISTED]))} and {len(ranks) - _MAX_LISTED} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device that a `--device` means for the rank `local_rank` of this machine."""
    num_gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}; choose auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        return chosen
    if chosen.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {device} would put all ranks of this machine on one GPU; give --device cuda")
    index = local_rank if chosen.index is None else chosen.index
    if index >= num_gpus:
        raise ValueError(f"--device {device} means GPU {index}, but this machine has {num_gpus}; choose --device cpu")
    return torch.device("cuda", index)

"""The process group that torchrun announces: joined within a bounded time, and the device of this process in it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
_CONNECTING_MARGIN_S = 2.0
_MAX_LISTED = 8


class JoinError(RuntimeError):
    """The ranks did not find each other."""


def join(limit_s: float) -> tuple[dist.Store, int, int]:
    """The store where the ranks meet, as torchrun tells it in the environment; this rank, and how many there are.

    Raises ValueError if variables are missing, JoinError if the store or ranks do not come within the limit.
    """
    outcome: list[tuple[dist.Store, int, int] | Exception] = []

    def meet() -> None:
        try:
            outcome.append(next(dist.rendezvous("env://", timeout=timedelta(seconds=limit_s))))
        except (ValueError, RuntimeError) as error:
            outcome.append(error)

    # In a thread: signals could not end torch's wait, and whatever else listens at the port it awaits without an end.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(limit_s + _CONNECTING_MARGIN_S)
    found = outcome[0] if outcome else RuntimeError("whatever listens there does not answer")
    if isinstance(found, ValueError):
        raise found
    if isinstance(found, Exception):
        reason = str(found).splitlines()[0]  # behind it may come a trace of C++ calls
        raise JoinError(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {limit_s:g} s: {reason}. Is the first "
            "node up, is the address right, does a firewall let the port through, and has no other program the port? "
            "--monitor.join-limit-s sets how long to wait."
        ) from found
    store, rank, world_size = found
    prefix = "leoclr_fast"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # which holds what was before a restart, too
        prefix += f"/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{world_size}"
    store = dist.PrefixStore(prefix, store)
    wait_for_all(store, rank, world_size, limit_s)
    return store, rank, world_size


def wait_for_all(store: dist.Store, rank: int, world_size: int, limit_s: float) -> None:
    """Until every rank is here. Raises JoinError, with the ranks that are missing and those that are there."""
    store.set(f"joined/{rank}", f"{socket.gethostname()} (process {os.getpid()})")
    keys = [f"joined/{rank}" for rank in range(world_size)]
    deadline, pause_s = time.monotonic() + limit_s, 0.01
    while not store.check(keys):
        if time.monotonic() > deadline:
            here = [rank for rank, key in enumerate(keys) if store.check([key])]
            missing = [rank for rank in range(world_size) if rank not in here]
            places = [f"rank {rank} on {store.get(keys[rank]).decode()}" for rank in here[:_MAX_LISTED]]
            raise JoinError(
                f"after {limit_s:g} s, {listed_ranks(missing)} of {world_size} did not come; here: {', '.join(places)}"
                f"{'…' if len(here) > _MAX_LISTED else ''}. Look at why they did not start, or give "
                "--monitor.join-limit-s more seconds."
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.5)


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
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(), chosen
        return
    store, rank, world_size = join(join_limit_s)
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

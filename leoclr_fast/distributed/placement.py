"""Where each rank computes: its machine, its cores, how many of them are its share, and the memory node of its GPU."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Self

import torch
import torch.distributed as dist

from leoclr_fast.machine.control_groups import cpu_quota
from leoclr_fast.machine.memory_nodes import gpu_node, node_cores
from leoclr_fast.run.environment import boot_id
from pipelines.cores import sharing_cores

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is before anything is settled."""

    machine: str
    """The same for ranks that share cores."""
    cores: tuple[int, ...]
    """That it may run on."""
    nodes: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Memory nodes of the machine, with their cores."""
    gpu_node: int | None = None
    quota: float | None = None
    """Cores' worth of time that its container may use; None without a limit."""
    container: str = ""
    """The same for ranks that share the quota."""

    @classmethod
    def here(cls, device: torch.device) -> Self:
        """This process's."""
        on_gpu = device.type == "cuda" and device.index is not None
        return cls(
            machine=boot_id() or socket.gethostname(),
            cores=tuple(sorted(os.sched_getaffinity(0))),
            nodes=tuple((number, tuple(sorted(cores))) for number, cores in node_cores().items()),
            gpu_node=gpu_node(device.index) if on_gpu else None,
            quota=cpu_quota(),
            container=socket.gethostname(),
        )

    def tell(self, store: dist.Store, rank: int) -> None:
        """To the other ranks, before they come together."""
        store.set(_key(rank), json.dumps(asdict(self)))

    @classmethod
    def of_json(cls, text: bytes) -> Self:
        """What another rank told."""
        fields = json.loads(text)
        nodes = tuple((number, tuple(cores)) for number, cores in fields.pop("nodes"))
        return cls(nodes=nodes, cores=tuple(fields.pop("cores")), **fields)

    def nodes_within_reach(self) -> set[int]:
        """Nodes of the cores that it may run on."""
        return {number for number, cores in self.nodes if set(cores) & set(self.cores)}


@dataclass(frozen=True, slots=True)
class Settled:
    """Which cores a rank keeps to, and how many of them it may keep busy."""

    cores: tuple[int, ...]
    share: int
    node: int | None
    """The memory node that it is kept at; None where it is left as it was."""


def settle(places: Sequence[Place]) -> list[Settled]:
    """What is fair, for ranks at these places.

    A rank on a GPU keeps to the cores beside it, if ranks of the machine are beside all nodes within its reach: with
    one rank at one of two nodes, half of the machine would lie idle. Whoever started the ranks may have given each its
    own cores already (`torchrun --numa-binding`, `srun --cpu-bind`): that is kept. Cores that several ranks may use are
    shared equally, and so is the quota of a container.
    """
    kept = [_beside_gpu(place, [other for other in places if other.machine == place.machine]) for place in places]
    users = Counter((place.machine, core) for place, _ in kept for core in place.cores)
    in_container = Counter((place.machine, place.container) for place in places)
    outcome = []
    for place, node in kept:
        share = sum(Fraction(1, users[place.machine, core]) for core in place.cores)
        if place.quota is not None:
            share = min(share, Fraction(place.quota) / in_container[place.machine, place.container])
        outcome.append(Settled(place.cores, max(1, int(share)), node))
    return outcome


def _beside_gpu(place: Place, neighbours: list[Place]) -> tuple[Place, int | None]:
    within_reach = place.nodes_within_reach()
    if place.gpu_node not in within_reach or len(within_reach) < 2:
        return place, None
    if not within_reach <= {other.gpu_node for other in neighbours}:
        return place, None
    beside = dict(place.nodes)[place.gpu_node]
    return replace(place, cores=tuple(core for core in place.cores if core in beside)), place.gpu_node


@contextmanager
def settled(store: dist.Store, rank: int, world_size: int, device: torch.device) -> Iterator[str]:
    """Within it, this rank keeps to its cores and counts on its share of them; yields a line about all ranks.

    Every rank has told its `Place` before.
    torch takes as many threads as the share on a CPU where torchrun, having found nothing set, has set OMP_NUM_THREADS
    to 1; any other number is the user's and is kept.
    """
    outcome = settle([Place.of_json(store.get(_key(other))) for other in range(world_size)])
    own = outcome[rank]
    with ExitStack() as stack:
        if own.node is not None:
            stack.callback(_keep_to, os.sched_getaffinity(0))
            _keep_to(own.cores)
        stack.enter_context(sharing_cores(own.share))
        by_torchrun = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and os.environ.get("OMP_NUM_THREADS") == "1"
        if device.type == "cpu" and by_torchrun and own.share > 1:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(own.share)
        yield _told(outcome, torch.get_num_threads())


def _key(rank: int) -> str:
    return f"place/{rank}"


def _keep_to(cores: Sequence[int] | set[int]) -> None:
    """The threads that begin from now on keep to them, too. Where it is not allowed, all goes on as it was."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        log.warning("this process cannot be kept to the cores beside its GPU: %s", error.strerror)


def _told(outcome: Sequence[Settled], torch_threads: int) -> str:
    shares = sorted({settled.share for settled in outcome})
    cores = " to ".join(str(share) for share in dict.fromkeys((shares[0], shares[-1])))
    line = f"{len(outcome)} ranks: {cores} {'core' if shares == [1] else 'cores'} each, "
    line += f"{torch_threads} torch {'thread' if torch_threads == 1 else 'threads'}"
    nodes = [settled.node for settled in outcome]
    if any(node is not None for node in nodes):
        line += f"; memory nodes: {' '.join('-' if node is None else str(node) for node in nodes)}"
    return line

"""Memory nodes (NUMA) of this machine: which cores each has, and which GPU is beside which."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def node_cores(root: Path = Path("/")) -> dict[int, frozenset[int]]:
    """Number of a node → its cores, in order of the numbers; nodes without a core, or hidden ones, are left out."""
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            nodes[int(folder.name.removeprefix("node"))] = cpu_list((folder / "cpulist").read_text())
    return {number: cores for number, cores in sorted(nodes.items()) if cores}


def gpu_node(number: int, root: Path = Path("/")) -> int | None:
    """The node that the GPU `cuda:number` is at; None where the kernel does not know it."""
    about: Any = torch.cuda.get_device_properties(number)
    try:
        address = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
        node = int((root / "sys/bus/pci/devices" / address / "numa_node").read_text())
    except (AttributeError, OSError, ValueError):
        return None
    return node if node >= 0 else None


def cpu_list(text: str) -> frozenset[int]:
    """`0-3,8` as numbers."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
    return frozenset(numbers)

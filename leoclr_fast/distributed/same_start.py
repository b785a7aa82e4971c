"""Whether all ranks were started alike: options, data and packages."""

from __future__ import annotations

import platform
import socket
from typing import Any

from dataset_tools.sources import ImageSource
from dataset_tools.versions import installed_version
from leoclr_fast.config import RunConfig
from leoclr_fast.config_file import as_plain, flat
from leoclr_fast.distributed.host_group import HostGroup
from leoclr_fast.distributed.process_group import listed_ranks

_PACKAGES = ("leoclr-fast", "torch", "torchvision", "numpy", "numba", "triton")
_MAX_FIELDS = 8


def require_same_everywhere(host: HostGroup, config: RunConfig, source: ImageSource, options: dict[str, Any]) -> None:
    """Raises ValueError, on every rank the same, if ranks differ from the first one: which, and in what.

    `--device` may differ. options: further ones of the command line.
    """
    own = flat(as_plain(config)) | options
    own.pop("speed.device")
    own["the data's names and labels"] = source.fingerprint
    own["the bytes of a sample of its images"] = source.sample_digest()
    own["python"] = platform.python_version()
    own |= {f"package {name}": installed_version(name) for name in _PACKAGES}
    started = host.gathered((socket.gethostname(), own))
    hosts, everyone = [host for host, _ in started], [values for _, values in started]
    first = everyone[0]
    lines: dict[str, list[int]] = {}
    for rank, other in enumerate(everyone):
        for name in sorted(first.keys() | other.keys()):
            if other.get(name) != first.get(name):
                line = f"{name}: {other.get(name)} there, {first.get(name)} on rank 0"
                lines.setdefault(line, []).append(rank)
    if not lines:
        return
    places = [f"{listed_ranks(ranks)} on {hosts[ranks[0]]}: {line}" for line, ranks in lines.items()]
    more = f"; and {len(places) - _MAX_FIELDS} more" if len(places) > _MAX_FIELDS else ""
    raise ValueError(
        f"the ranks were not started alike. {'; '.join(places[:_MAX_FIELDS])}{more}. Start every rank with the same "
        "options, data and packages."
    )

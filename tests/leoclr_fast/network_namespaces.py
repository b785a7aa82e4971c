"""Two machines that are none: network namespaces of this one, joined by a cable that can be pulled. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "cable0"
_HOSTS = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
_NAMED = Path("/etc/netns")
_LIMIT_S = 20


class NoNamespacesError(RuntimeError):
    """Why this machine cannot have two network namespaces."""


@dataclass(frozen=True, slots=True)
class Node:
    """A network namespace, with a host name of its own for what is started in it."""

    namespace: str
    host: str

    def command(self, *words: str) -> list[str]:
        """A command as it is started on this node."""
        rename = 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace]
        return [*inside, "unshare", "--uts", "sh", "-c", rename, self.host, *words]

    def pull_cable(self) -> None:
        _ip("-netns", self.namespace, "link", "set", INTERFACE, "down")

    def plug_cable(self) -> None:
        _ip("-netns", self.namespace, "link", "set", INTERFACE, "up")

    def end_processes(self) -> None:
        """SIGKILL to all that runs on this node."""
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """node-a and node-b, which know each other by name; at the end nothing is left of them.

    Raises NoNamespacesError.
    """
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            raise NoNamespacesError(f"there is no `{program}`: apt-get install {package}")
    if os.geteuid() != 0:
        raise NoNamespacesError("only root may make network namespaces")
    first, second = (Node(f"leoclr-{os.getpid()}-{host}", host) for host in _HOSTS)
    try:
        for node in (first, second):
            try:
                _ip("netns", "add", node.namespace)
            except subprocess.CalledProcessError as error:
                raise NoNamespacesError(f"`ip netns add`: {error.stderr.strip()}") from error
            known = "".join(f"{address} {host}\n" for host, address in _HOSTS.items())
            (_NAMED / node.namespace).mkdir(parents=True)
            (_NAMED / node.namespace / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            (_NAMED / node.namespace / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # which refuses at once
        peer = ["type", "veth", "peer", "name", INTERFACE, "netns", second.namespace]
        _ip("link", "add", INTERFACE, "netns", first.namespace, *peer)
        for node in (first, second):
            _ip("-netns", node.namespace, "address", "add", f"{_HOSTS[node.host]}/24", "dev", INTERFACE)
            _ip("-netns", node.namespace, "link", "set", "lo", "up")
            node.plug_cable()
        yield first, second
    finally:
        for node in (first, second):
            with suppress(subprocess.CalledProcessError):
                node.end_processes()
                _ip("netns", "delete", node.namespace)
            shutil.rmtree(_NAMED / node.namespace, ignore_errors=True)
        with suppress(OSError):
            _NAMED.rmdir()  # if it was there before, others' files are in it


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=_LIMIT_S, check=True)
    return done.stdout

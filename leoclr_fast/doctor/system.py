"""The operating system: its name, whether this is a container, limits, encoding and clocks."""

from __future__ import annotations

import ctypes
import locale
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from leoclr_fast.doctor.result import Result, failed

_CONTAINER_MARKS = (".dockerenv", "run/.containerenv", ".singularity.d", "run/.singularity.d")
_FEW_FILES, _TOO_FEW_FILES = 4096, 256
_FEW_PROCESSES = 4096
_UNSYNCHRONISED = 0x0040  # STA_UNSYNC of <sys/timex.h>
_PLAUSIBLE_UNIX_S = (1735689600, 4102444800)  # 2025 to 2099


def system(root: Path = Path("/")) -> Result:
    """Name, kernel, container, user. root: where `/proc` and the like are found, another one in tests."""
    if platform.system() != "Linux":
        return failed(platform.platform(), "Run it under Linux: in a container, a virtual machine or WSL 2.")
    release = root / "etc/os-release"
    named = re.search(r'^PRETTY_NAME="?([^"\n]+)', release.read_text() if release.is_file() else "", re.MULTILINE)
    name = named[1] if named else "Linux"
    user = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    marks = [f"/{mark} exists" for mark in _CONTAINER_MARKS if (root / mark).exists()]
    marks = ["Kubernetes"] if "KUBERNETES_SERVICE_HOST" in os.environ else marks
    inside = f"in a container ({marks[0]})" if marks else "not in a container that shows"
    return Result(f"{name}, kernel {platform.release()}, {platform.machine()}, {inside}, as {user}")


def limits(getrlimit: Callable[[int], tuple[int, int]] = resource.getrlimit, root: Path = Path("/")) -> Result:
    """Open files, processes, locked memory and core files, as `ulimit` sets them.

    getrlimit, root: where they and `/sys` are read, others in tests.
    """
    files, processes, locked, core = (
        getrlimit(number)[0]
        for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK, resource.RLIMIT_CORE)
    )
    result = Result(
        f"open files {_limit(files)}, processes {_limit(processes)}, locked memory {_limit(locked, ' B')}, core files "
        f"{_limit(core, ' B')}"
    )
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        add = result.fail if files < _TOO_FEW_FILES else result.warn
        add(f"{files} open files are few for loaders with many workers", "Allow more with `ulimit -n 65536`.")
    if processes != resource.RLIM_INFINITY and processes < _FEW_PROCESSES:
        what = f"{processes} processes and threads are few for several ranks"
        result.warn(what, "Allow more with `ulimit -u 65536`.")
    if (root / "sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        remedy = "Allow it with `ulimit -l unlimited` (containers: `--ulimit memlock=-1`)."
        result.warn("InfiniBand needs locked memory without a limit", remedy)
    return result


def encoding() -> Result:
    """Names of files and printed text should be UTF-8."""
    of_files, of_text = sys.getfilesystemencoding(), locale.getpreferredencoding(False)
    language = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "not set")
    result = Result(f"file names {of_files}, text {of_text}, locale {language}")
    if {name.lower().replace("-", "").replace("_", "") for name in (of_files, of_text)} != {"utf8"}:
        result.status = "warning"
        result.remedy = "Names with accents may be misread: `export LC_ALL=C.UTF-8`."
    return result


def clock() -> Result:
    """The monotonic clock never goes back; the wall clock is plausible and follows time servers.

    The time zone does not matter.
    """
    readings = [time.monotonic_ns() for _ in range(1000)]
    now, synchronised = time.time(), is_synchronised()
    follows = {
        True: "follows time servers",
        False: "by the kernel's word it follows no time server",
        None: "synchronisation cannot be read",
    }[synchronised]
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    result = Result(f"{date}, {follows}; monotonic, {time.get_clock_info('monotonic').resolution:g} s steps")
    if any(later < earlier for earlier, later in pairwise(readings)) or len(set(readings)) < 2:
        result.fail("the monotonic clock goes back or stands still", "Restart the machine, or take another.")
    set_it = "Set it with `timedatectl set-ntp true`, or by chrony."
    if not _PLAUSIBLE_UNIX_S[0] < now < _PLAUSIBLE_UNIX_S[1]:
        result.warn("the date cannot be right", set_it)
    if synchronised is False:
        result.warn("times in the logs of several machines will not agree (training does not rely on them)", set_it)
    return result


def is_synchronised() -> bool | None:
    """Whether the kernel says that its clock is disciplined; None where it does not say."""
    try:
        # struct timex: an int that is padded, four longs, then `status`; 256 bytes are more than it has.
        buffer = ctypes.create_string_buffer(256)
        if ctypes.CDLL(None).adjtimex(buffer) == -1:
            return None
    except (OSError, AttributeError):
        return None
    return not ctypes.c_int.from_buffer(buffer, 5 * ctypes.sizeof(ctypes.c_long)).value & _UNSYNCHRONISED


def _limit(limit: int, unit: str = "") -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}{unit}"

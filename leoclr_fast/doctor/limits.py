"""What the shell allows a process, and in which encoding it speaks."""

from __future__ import annotations

import locale
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from leoclr_fast.doctor.finding import Finding, Trouble, judged, ok, warning

_FEW_FILES, _TOO_FEW_FILES = 4096, 256
_FEW_PROCESSES = 4096


def limits(getrlimit: Callable[[int], tuple[int, int]] = resource.getrlimit, root: Path = Path("/")) -> Finding:
    """Open files, processes, locked memory and core files, as `ulimit` sets them.

    getrlimit, root: where they and `/sys` are read, others in tests.
    """
    soft = {name: getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("NOFILE", "NPROC", "MEMLOCK", "CORE")}
    troubles = []
    if _below(soft["NOFILE"], _FEW_FILES):
        status = "failed" if _below(soft["NOFILE"], _TOO_FEW_FILES) else "warning"
        what = f"{soft['NOFILE']} open files are few for loaders with many workers"
        troubles.append(Trouble(status, what, "Allow more with `ulimit -n 65536`."))  # type: ignore[arg-type]
    if _below(soft["NPROC"], _FEW_PROCESSES):
        what = f"{soft['NPROC']} processes and threads are few for several ranks"
        troubles.append(Trouble("warning", what, "Allow more with `ulimit -u 65536`."))
    if (root / "sys/class/infiniband").is_dir() and soft["MEMLOCK"] != resource.RLIM_INFINITY:
        what = "InfiniBand needs locked memory without a limit"
        remedy = "Allow it with `ulimit -l unlimited` (containers: `--ulimit memlock=-1`)."
        troubles.append(Trouble("warning", what, remedy))
    return judged(
        f"open files {_told(soft['NOFILE'])}, processes {_told(soft['NPROC'])}, locked memory "
        f"{_told(soft['MEMLOCK'], 'B')}, core files {_told(soft['CORE'], 'B')}",
        troubles,
    )


def encoding() -> Finding:
    """Names of files and printed text should be UTF-8."""
    of_files, of_text = sys.getfilesystemencoding(), locale.getpreferredencoding(False)
    language = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "not set")
    found = f"file names {of_files}, text {of_text}, locale {language}"
    if {_plain(of_files), _plain(of_text)} == {"utf8"}:
        return ok(found)
    return warning(found, "Names with accents may be misread: `export LC_ALL=C.UTF-8`.")


def _plain(encoding_name: str) -> str:
    return encoding_name.lower().replace("-", "").replace("_", "")


def _below(limit: int, wanted: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < wanted


def _told(limit: int, unit: str = "") -> str:
    if limit == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{limit:,} {unit}".strip()

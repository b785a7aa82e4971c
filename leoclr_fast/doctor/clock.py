"""The clocks of this machine."""

from __future__ import annotations

import ctypes
import time
from itertools import pairwise

from leoclr_fast.doctor.finding import Finding, Trouble, judged

_UNSYNCHRONISED = 0x0040  # STA_UNSYNC of <sys/timex.h>
_READINGS = 1000
_PLAUSIBLE_UNIX_S = (1735689600, 4102444800)  # 2025 to 2099


def clock() -> Finding:
    """The monotonic clock never goes back; the wall clock is plausible and follows time servers.

    The time zone does not matter.
    """
    readings = [time.monotonic_ns() for _ in range(_READINGS)]
    now = time.time()
    troubles = []
    if any(later < earlier for earlier, later in pairwise(readings)) or len(set(readings)) < 2:
        troubles.append(
            Trouble("failed", "the monotonic clock goes back or stands still", "Restart the machine, or take another.")
        )
    set_it = "Set it with `timedatectl set-ntp true`, or by chrony."
    if not _PLAUSIBLE_UNIX_S[0] < now < _PLAUSIBLE_UNIX_S[1]:
        troubles.append(Trouble("warning", "the date cannot be right", set_it))
    synchronised = is_synchronised()
    if synchronised is False:
        what = "times in the logs of several machines will not agree (training does not rely on them)"
        troubles.append(Trouble("warning", what, set_it))
    told = {
        True: "follows time servers",
        False: "by the kernel's word it follows no time server",
        None: "synchronisation cannot be read",
    }[synchronised]
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    return judged(f"{date}, {told}; monotonic, {time.get_clock_info('monotonic').resolution:g} s steps", troubles)


def is_synchronised() -> bool | None:
    """Whether the kernel says that its clock is disciplined; None where it does not say."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # struct timex: an int that is padded, four longs, then `status`; 256 bytes are more than it has.
        buffer = ctypes.create_string_buffer(256)
        if libc.adjtimex(buffer) == -1:
            return None
        status = ctypes.c_int.from_buffer(buffer, 5 * ctypes.sizeof(ctypes.c_long)).value
    except (OSError, AttributeError):
        return None
    return not status & _UNSYNCHRONISED

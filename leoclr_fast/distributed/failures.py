"""Which rank ended a run, in which step, and why: what torch and torchrun do not hand on.

torchrun ends all ranks when one has died, and names it; a collective in which one hangs ends by the process group's
timeout. The reason is ours: the first rank that fails leaves it in the store where the ranks have met, and the others,
whose collectives break, read it there; of one that says nothing they know by its silence.
"""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.host_group import OtherRankError, describe

_PATIENCE_S = 5.0
_FAILURE = "failure"
_COLLECTIVES = str(Path(dist.__file__).parent)
_CONTINUES = "the same command continues from the last checkpoint"


@contextmanager
def failures_explained(ranks: Ranks, step: Callable[[], int] | None = None) -> Iterator[None]:
    """If this rank fails in here, the others read why; if it fails because another one did, it says which and why.

    step: how many steps are finished.
    Raises OtherRankError instead of what torch says when another rank is gone or does not answer.
    """
    try:
        yield
    except (OtherRankError, StoppedBySignalError):
        raise
    except BaseException as error:
        place = "" if step is None else f" in step {step() + 1}"
        if ranks.store is None:
            raise
        if is_lost_connection(error):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to all that are left: this is said first
            raise OtherRankError(f"{_cause(ranks, ranks.store, error, place)}; {_CONTINUES}") from error
        with suppress(RuntimeError):  # without the store nobody can read it
            own = ranks.store.get(f"joined/{ranks.rank}").decode()
            ranks.store.compare_set(_FAILURE, "", f"rank {ranks.rank} on {own} failed{place}: {describe(error)}")
        raise


def is_lost_connection(error: BaseException) -> bool:
    """Whether torch raised it in a collective: another rank is gone or does not answer, or the network."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    within = any(frame.filename.startswith(_COLLECTIVES) for frame in traceback.extract_tb(error.__traceback__))
    return within or "gloo" in str(error) or "NCCL" in str(error)


def _cause(ranks: Ranks, store: dist.Store, error: BaseException, place: str) -> str:
    """Why other ranks are gone, from themselves or from their silence; waits a few seconds for it."""
    keys = [f"lost/{rank}" for rank in range(ranks.world_size)]
    reason = describe(error)
    try:
        store.set_timeout(timedelta(seconds=_PATIENCE_S))
        store.set(keys[ranks.rank], "")
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if store.check([_FAILURE]):
                return store.get(_FAILURE).decode()
            time.sleep(0.1)
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        names = [f"rank {rank} on {store.get(f'joined/{rank}').decode()}" for rank in silent[:4]]
    except RuntimeError:
        return f"the connection to other ranks broke{place}, and the store where they had met is gone: {reason}"
    if not names:
        return f"the connections between the ranks broke{place}: {reason}"
    more = f" and {len(silent) - len(names)} more" if len(silent) > len(names) else ""
    return f"lost {', '.join(names)}{more}{place}: {reason}"

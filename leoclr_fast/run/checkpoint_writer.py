"""Checkpoints written beside the training: the step waits for a copy in host memory, a thread does the rest."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leoclr_fast.run.checkpoint import (
    drop_unfinished_checkpoints,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from leoclr_fast.run.folder import RunFolder

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Of the first rank. One checkpoint at a time is written; whoever saves the next one waits for it."""

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy `state` and start to write it as the checkpoint of `step`.

        Raises OSError if the checkpoint before could not be written.
        """
        self.flush()
        copy, copied = _on_host(state)
        self._thread = threading.Thread(target=self._write, args=(step, copy, copied), name="checkpoint writer")
        self._thread.start()

    def raise_error(self) -> None:
        """Raises OSError if a checkpoint could not be written; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def flush(self) -> None:
        """Wait until everything is on the disk. Raises OSError if that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def continue_from(self, step: int) -> None:
        """Clear away what a killed process has left half done and what was passed over as damaged. Raises OSError."""
        checkpoints = self._folder.checkpoints
        drop_unfinished_checkpoints(checkpoints)
        set_aside_later_checkpoints(checkpoints, step)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """What is being written when this is left is finished, also after an exception."""
        try:
            yield
        except BaseException:
            try:
                self.flush()
            except OSError as error:
                log.warning("%s", error)
            raise
        self.flush()

    def _write(self, step: int, state: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            save_checkpoint(self._folder.checkpoints, step, state, self._keep)
        except OSError as error:
            self._error = error
        except Exception as error:  # nothing may get lost in a thread
            self._error = OSError(f"cannot write the checkpoint of step {step}: {type(error).__name__}: {error}")


def _on_host(state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """A copy of nested containers of tensors in host memory, and when the device has made it: nothing waits for it.

    The steps to come change the tensors after the copy, in the order of the device's stream.
    """
    on_device = False

    def copied(value: Any) -> Any:
        nonlocal on_device
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if not value.is_cuda:
            return value.detach().clone()
        on_device = True
        place = torch.empty_like(value, device="cpu", pin_memory=True)
        return place.copy_(value.detach(), non_blocking=True)

    copy = copied(state)
    if not on_device:
        return copy, None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return copy, event

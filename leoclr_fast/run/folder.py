"""A run on disk: config, environment, metrics, checkpoints, final weights. Only one process may write to it."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dataset_tools.files import LOCK_WAIT_S, open_own, take_lock, write_file
from dataset_tools.schema import convert, read_bounded, read_json
from leoclr_fast.config import RunConfig
from leoclr_fast.config_file import from_yaml, to_yaml
from leoclr_fast.run.documents import Summary, records
from leoclr_fast.run.environment import environment

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
HISTORY_KINDS = ("start", "end", "warning")
"""Of the records of `metrics.jsonl` that no resumed run writes again."""
_held_locks: set[IO[str]] = set()


def _drop_locks() -> None:
    """In a forked child: a loader's worker that outlives its killed parent must not keep the folder locked."""
    for lock in _held_locks:
        lock.close()
    _held_locks.clear()


os.register_at_fork(after_in_child=_drop_locks)


class _File:
    """The path of a file in the folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, _: type[RunFolder]) -> Path:
        return folder.path / self._name


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a run: `config.yaml`, `environment.json`, `data.json` and `preview.png` (what it trains on),
    `metrics.jsonl`, `checkpoints/`, `report.html`, after an orderly end
    `summary.json` and `final.safetensors`, and `evaluations.jsonl` once it was evaluated.
    """

    path: Path

    config_file = _File("config.yaml")
    environment_file = _File("environment.json")
    data_file = _File("data.json")
    preview_file = _File("preview.png")
    metrics_file = _File("metrics.jsonl")
    checkpoints = _File("checkpoints")
    report_file = _File("report.html")
    summary_file = _File("summary.json")
    final_weights = _File("final.safetensors")
    evaluations_file = _File("evaluations.jsonl")

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    def create(self) -> None:
        """Make the folder. Raises ValueError if it holds other files, is no folder or cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A run that died before it had a config leaves an empty `checkpoints` and hidden files behind.
            names = {entry.name for entry in os.scandir(self.path)} - {"checkpoints"}
            foreign = sorted(name for name in names if not name.startswith("."))
            if foreign and not self.exists():
                raise ValueError(
                    f"the output folder {self.path} holds other files ({', '.join(foreign[:3])}…) and no run; "
                    "give --out a new or empty folder"
                )
            self.checkpoints.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise ValueError(f"cannot write to the output folder {self.path}: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second writer; children that this process forks meanwhile do not hold it.

        Raises RuntimeError if another process holds it for more than a moment, as one does that was just killed, or a
        reader that looks whether the run is alive.
        """
        with open_own(self.path / LOCK_NAME, "a") as lock:
            _held_locks.add(lock)
            try:
                try:
                    take_lock(lock, LOCK_WAIT_S)
                except BlockingIOError as error:
                    wait = "wait for it or choose another --out"
                    raise RuntimeError(f"another process is writing to {self.path}; {wait}") from error
                yield
            finally:
                _held_locks.discard(lock)

    def write_config(self, config: RunConfig) -> None:
        write_file(self.config_file, to_yaml(config))

    def read_config(self) -> RunConfig:
        """Raises FileNotFoundError if there is no run here, ValueError if its config cannot be understood."""
        if not self.exists():
            raise FileNotFoundError(
                f"{self.path} is not a run folder: it has no config.yaml; give the --out of a pretrain"
            )
        return from_yaml(RunConfig, read_bounded(self.config_file), str(self.config_file))

    def write_environment(self, device: torch.device, world_size: int, gpu_warnings: list[str] | None) -> None:
        """gpu_warnings: what makes figures of this GPU worth less (a MIG slice, other users); None without a GPU."""
        document = environment(device, world_size)
        if gpu_warnings is not None:
            document["gpu_warnings"] = gpu_warnings
        write_json(self.environment_file, document)

    def keep_metrics_until(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run logs it again. A half-written last line goes too.

        When the run started and ended, and what it warned of, stays: that did happen.
        """
        if not self.metrics_file.exists():
            return
        found = records(self.metrics_file.read_bytes())
        kept = [record for record in found if record["kind"] in HISTORY_KINDS or 0 < step >= record["step"]]
        write_file(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def add_evaluation(self, evaluator: str, result: dict[str, Any]) -> None:
        """Append a result to `evaluations.jsonl`, for the report. Where that cannot be written, it is a warning."""
        line = json.dumps({"evaluator": evaluator, "unix_s": round(time.time(), 3), **result}) + "\n"
        try:
            with open_own(self.evaluations_file, "a") as file:
                file.write(line)
        except OSError as error:
            log.warning("the result is not kept for the report: %s", error)

    def read_summary(self) -> dict[str, Any] | None:
        """What the last orderly end of the run wrote, if there was one. Raises ValueError if it is no such thing."""
        if not self.summary_file.exists():
            return None
        summary = read_json(self.summary_file, dict[str, Any])
        convert(summary, Summary, str(self.summary_file))
        return summary

    def read_metrics(self, kind: str) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl` with this `kind`: step, knn, start, end or warning."""
        if not self.metrics_file.exists():
            return []
        return [record for record in records(self.metrics_file.read_bytes()) if record["kind"] == kind]


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_file(path, json.dumps(document, indent=2) + "\n")

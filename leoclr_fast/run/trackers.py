"""Metrics for TensorBoard and Weights & Biases, beside `metrics.jsonl`. Both packages are optional."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from leoclr_fast.config import MonitorConfig, RunConfig
from leoclr_fast.config_file import as_plain

log = logging.getLogger(__name__)

_PROJECT = "leoclr-fast"


class Tracker:
    """Where numbers go. A tracker that fails is a warning, is left out from then on, and does not harm the run."""

    def __init__(
        self, name: str, log_numbers: Callable[[int, Mapping[str, float]], object], close: Callable[[], object]
    ) -> None:
        self._name, self._log_numbers, self._close = name, log_numbers, close
        self._works = True

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """numbers: such as `step/loss` and `knn/top1`, after `step` finished steps."""
        self._attempt(self._log_numbers, step, numbers)

    def close(self) -> None:
        self._attempt(self._close)

    def _attempt(self, action: Callable[..., object], *given: Any) -> None:
        if not self._works:
            return
        try:
            action(*given)
        except Exception as error:
            self._works = False
            log.warning("%s gets no more metrics: %s: %s", self._name, type(error).__name__, error)


def require_trackers(config: MonitorConfig) -> None:
    """Raises ValueError, with what to install, if a package that the configuration asks for is missing."""
    if config.tensorboard:
        _optional("tensorboard", "torch.utils.tensorboard")
    if config.wandb:
        _optional("wandb", "wandb")


def open_trackers(config: RunConfig, run: Path) -> list[Tracker]:
    """Those that the configuration asks for. Raises as `require_trackers`."""
    trackers = []
    if config.monitor.tensorboard:
        writer = _optional("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))
        trackers.append(Tracker("TensorBoard", partial(_add_scalars, writer), writer.close))
    if config.monitor.wandb:
        names = {"project": _PROJECT, "name": run.name, "dir": str(run)}
        session = _optional("wandb", "wandb").init(**names, config=as_plain(config))
        trackers.append(
            Tracker("Weights & Biases", lambda step, numbers: session.log(dict(numbers), step=step), session.finish)
        )
    return trackers


def _add_scalars(writer: Any, step: int, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def _optional(package: str, module: str) -> Any:
    """The module. Raises ValueError where the package is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--monitor.{package} needs the package {package}, which is not installed: pip install {package}, or "
            "leave the flag out"
        ) from error

"""An evaluation on disk: its settings, its checkpoints, and in the end its result."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console

from dataset_tools.schema import read_json
from dataset_tools.sources import Split
from dataset_tools.stop_signals import stop_signals
from dataset_tools.terminal import PlainConsole
from leoclr_fast.config_file import differing_fields
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import EVALUATION_TIMEOUT_S, process_group
from leoclr_fast.evaluate.data import EvaluationLoaders
from leoclr_fast.evaluate.detection.config import DetectionOptions
from leoclr_fast.evaluate.protocols import EvaluationOptions, KnnOptions, TrainingOptions
from leoclr_fast.machine.precision import settled
from leoclr_fast.run.environment import environment
from leoclr_fast.run.folder import RunFolder, write_json
from leoclr_fast.run.stepper import PausedError, Stepper
from leoclr_fast.run.telemetry import ProgressDisplay
from leoclr_fast.weights.pretrained import Pretrained
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import settle_loader, shows_images

log = logging.getLogger(__name__)

_LINE_EVERY_S = 5.0

Options = TypeVar("Options", bound="EvaluationOptions | DetectionOptions")


class Result(NamedTuple):
    """What every evaluator's `run` returns."""

    name: str
    """Of the evaluator: knn, linear, linear_cached_features, finetune, transfer, detect-voc or detect-coco."""
    values: dict[str, Any]
    """Plain JSON; empty on other ranks than the first. `complete` is False where it was paused before its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation in its folder: `settings.json`, checkpoints while it trains, `result.json` once it is finished.

    The folder lies in the run folder, or beside a file of weights, under a name that the settings determine, so that
    the same command continues it.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    """All that the result depends on."""
    finished: dict[str, Any] | None
    """The values of the result, where this very evaluation was made before."""
    pretrained: Pretrained
    ranks: Ranks
    device: torch.device
    options: TrainingOptions | KnnOptions
    _done_with: list[Path] = field(default_factory=list, init=False)

    def stepper(self, training: str, total_steps: int, save_every_steps: int, *, steps_before: int = 0) -> Stepper:
        """The steps of one training of this evaluation, which follows `steps_before` steps of others.

        training: a name for its checkpoints, which go when the evaluation has its result; "" for the folder itself,
        where they stay.
        """
        assert isinstance(self.options, TrainingOptions)
        if training:
            self._done_with.append(self.path / training)
        return Stepper(
            self.path / training,
            total_steps=total_steps,
            ranks=self.ranks,
            device=self.device,
            save_every_steps=save_every_steps,
            save_every_s=self.options.checkpoint_every_s,
            pause_after=self.options.max_steps,
            steps_before=steps_before,
        )

    def loaders(self, train: Split, views: ViewConfig, batch_size: int, seed: int) -> EvaluationLoaders:
        """The loaders of a training on `train` and of its tests. batch_size: over all ranks."""
        return EvaluationLoaders(
            views=views,
            config=settle_loader(train, self.options.loader, self.device),
            batch_size=batch_size,
            seed=seed,
            device=self.device,
            ranks=self.ranks,
        )

    @contextmanager
    def display(
        self, console: Console | None, total_steps: int, line_every_s: float = _LINE_EVERY_S
    ) -> Iterator[ProgressDisplay]:
        """The progress of a training, shown by the first rank."""
        display = ProgressDisplay(console or PlainConsole(), total_steps, self.ranks.is_main, line_every_s)
        try:
            yield display
        finally:
            display.close()

    def result(self, compute: Callable[[], dict[str, Any]], *, of_a_part: bool = False) -> Result:
        """The result of before, or of `compute`, which is then kept here and in the run's `evaluations.jsonl`.

        of_a_part: it is for trying out, so that the result of before is not meant, and this one is not kept here.
        """
        if self.finished is not None and not of_a_part:
            return Result(self.name, self.finished if self.ranks.is_main else {})
        try:
            values = compute()
        except PausedError as paused:
            values = {"complete": False, "step": paused.step, "training": paused.folder.name, "out": str(self.path)}
            return Result(self.name, values if self.ranks.is_main else {})
        if not self.ranks.is_main:
            return Result(self.name, {})
        values = {**values, "settings": self.settings}
        if self.pretrained.run is not None:
            self.pretrained.run.add_evaluation(self.name, values)
        document = {"evaluator": self.name, **values}
        if not of_a_part:
            made_on = environment(self.device, self.ranks.world_size)
            write_json(self.path / "result.json", document | {"environment": made_on})
        for folder in self._done_with:
            shutil.rmtree(folder, ignore_errors=True)
        return Result(self.name, document)


@contextmanager
def evaluation_ranks(options: Options) -> Iterator[tuple[Options, Ranks, torch.device]]:
    """The options with what `auto` means here, the ranks and the device.

    A signal ends what is done here at once; only the steps of a training save first.
    """
    with stop_signals(True) as stop, process_group(options.device, timeout_s=EVALUATION_TIMEOUT_S) as (ranks, device):
        stop.patience_s = 0
        yield settled(options, device), ranks, device


@contextmanager
def open_evaluation(
    name: str,
    settings: dict[str, Any],
    pretrained: Pretrained,
    ranks: Ranks,
    device: torch.device,
    options: TrainingOptions | KnnOptions,
) -> Iterator[Evaluation]:
    """The evaluation with these settings (plain JSON), its folder held against a second process.

    options.out: by default a folder in `pretrained.evaluations`, named by evaluator and settings.
    Raises ValueError if the folder cannot be written or holds an evaluation with other settings, RuntimeError if
    another process works in it.
    """
    settings = json.loads(json.dumps({"weights_sha256": pretrained.sha256, **settings}))
    digest = hashlib.sha256(json.dumps([name, settings], sort_keys=True).encode()).hexdigest()
    path = pretrained.evaluations / f"{name}-{digest[:12]}" if options.out is None else options.out
    with ExitStack() as stack:
        yield Evaluation(
            name=name,
            path=path,
            settings=settings,
            finished=ranks.from_main(_enter(path, {"evaluator": name, **settings}, stack) if ranks.is_main else None),
            pretrained=pretrained,
            ranks=ranks,
            device=device,
            options=options,
        )


def _enter(path: Path, settings: dict[str, Any], stack: ExitStack) -> dict[str, Any] | None:
    """Make and lock the folder; its result, if there is one."""
    described = path / "settings.json"
    try:
        there = sorted(file.name for file in path.iterdir() if file.name[0] != ".") if path.is_dir() else []
        if there and not described.exists():
            raise ValueError(
                f"{path} holds other files ({', '.join(there[:3])}…) and no evaluation of this version; give --out a "
                "new or empty folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunFolder(path).locked())
        if described.exists():
            differences = differing_fields(read_json(described, dict[str, Any]), settings)
            if differences:
                raise ValueError(
                    f"{path} holds another evaluation: {'; '.join(differences[:6])}. Give the same options as there to "
                    "continue it, or another --out."
                )
        write_json(described, settings)
    except OSError as error:
        raise ValueError(
            f"cannot write to {path}: {error.strerror}; give --out a folder that the evaluation can work in"
        ) from error
    result = path / "result.json"
    if not result.is_file():
        return None
    document = read_json(result, dict[str, Any])
    log.info("this evaluation was made before: %s; delete that file to make it again", result)
    return {key: value for key, value in document.items() if key != "environment"}


def evaluation_views(
    pretrained: Pretrained, crop_scale: tuple[float, float] = (0.08, 1.0), image_size: int | None = None
) -> ViewConfig:
    """The pretraining's image size (if no other is given) and normalisation, with torchvision's crop ratio."""
    views = pretrained.description.views
    size = views.image_size if image_size is None else image_size
    return replace(views, image_size=size, crop_scale=crop_scale, crop_ratio=(3 / 4, 4 / 3))


def data_settings(options: EvaluationOptions, views: ViewConfig, fingerprint: str) -> dict[str, Any]:
    """What a result depends on besides its protocol. fingerprint: of the data."""
    names = ("image_size", "center_crop_fraction", "flip_probability", "mean", "std")
    return {
        **{name: getattr(views, name) for name in names},
        "precision": options.precision,
        "data_fingerprint": fingerprint,
        "max_images": options.max_images,
    }


def require_real_images(loader: LoaderConfig) -> None:
    """Raises ValueError for the synthetic loader: an accuracy on its noise would mean nothing."""
    if not shows_images(loader):
        raise ValueError(
            f"the {loader.name} loader hands out noise, on which no accuracy can be measured; choose another --loader"
        )

"""What takes part in a timing of training: something that trains on the batches of a loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch

from leoclr_fast.bench.setting import BenchSetting
from leoclr_fast.config import MethodName, MonitorConfig, RunConfig, SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.flops import training_flops_per_image
from leoclr_fast.method.methods import METHODS
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch
from pipelines.views import ViewRecipe


class Contestant(ABC):
    """Trains on whatever batches it is given; each contestant has a network of its own."""

    name: str
    """leoclr, mocov2, or the name of a peer."""
    views: ViewRecipe
    """The views that its batches must hold."""
    flops_per_image: int

    @abstractmethod
    def step(self, batch: CropBatch) -> None:
        """One training step, from crops to moved weights; on a GPU, only enqueued."""


class OurMethod(Contestant):
    """LeOCLR or MoCo-v2, by the very step that `pretrain` runs, at a constant learning rate."""

    def __init__(self, method: MethodName, setting: BenchSetting, speed: SpeedConfig, device: torch.device) -> None:
        result = setting.result(method)
        config = RunConfig(recipe=setting.recipe, result=result, speed=speed, monitor=MonitorConfig())
        self.name = method
        self.views = METHODS[method].views
        self.flops_per_image = training_flops_per_image(result)
        self.config = config
        self.training = TrainingState.fresh(config, Ranks(), device)
        self._lr = result.lr
        self._step = TrainingStep(self.training, config, device)

    def step(self, batch: CropBatch) -> None:
        self._step(batch, self._lr)


def on_synthetic_images(speed: SpeedConfig) -> SpeedConfig:
    """The same, with the loader that neither reads nor decodes."""
    return replace(speed, loader=replace(speed.loader, name="synthetic"))

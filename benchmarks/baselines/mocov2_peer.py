"""What the MoCo-v2 peers share: our crops and our augmentation go in, the optimizer is the published one."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.bench.rounds import TimedMethod
from leoclr_fast.config import MethodName, SpeedConfig
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.method.flops import training_flops_per_image
from pipelines.augment import augmented_views
from pipelines.batch import CropBatch
from pipelines.views import MOCOV2_VIEWS


class MoCoV2Peer(TimedMethod):
    """MoCo-v2 with its networks eager, in NCHW, under autocast for half precision, and `torch.optim.SGD` as it comes.

    The views are cropped and augmented by our code, so that the loops are compared and not the data layers.
    """

    peer_of: ClassVar[MethodName] = "mocov2"
    """Our method that computes the same."""
    views = MOCOV2_VIEWS

    def __init__(self, setting: BenchSetting, speed: SpeedConfig, device: torch.device) -> None:
        result = setting.result(self.peer_of)
        self.result = result
        self.flops_per_image = training_flops_per_image(result)
        self._device, self._precision = device, speed.precision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(result.seed)
            self.build()
        for module in self.modules():
            module.to(device, encoder_dtype(speed.precision))
        self._optimizer = torch.optim.SGD(
            self.trained_parameters(),
            lr=result.lr,
            momentum=result.optimizer.momentum,
            weight_decay=result.optimizer.weight_decay,
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=speed.precision == "fp16")

    @abstractmethod
    def build(self) -> None:
        """Make networks and queue, on the CPU."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """All that moves to the device."""

    @abstractmethod
    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the query encoder."""

    @abstractmethod
    def loss(self, query_view: Tensor, key_view: Tensor) -> Tensor:
        """Forward pass of both encoders, with moving average and queue; runs under autocast. Views: [B, 3, S, S]."""

    def step(self, batch: CropBatch) -> None:
        views = augmented_views(
            batch, self.views, self.result.views, seed=self.result.seed, dtype=encoder_dtype(self._precision)
        )
        query_view, key_view = (view.contiguous() for view in views)
        with encoder_precision(self._precision, self._device):
            loss = self.loss(query_view, key_view)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.after_step(loss)

    def after_step(self, loss: Tensor) -> None:
        """What the loop does with the loss at the end of a step."""

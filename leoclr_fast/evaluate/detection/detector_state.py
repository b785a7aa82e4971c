"""A detector in training, and everything that it must remember to continue exactly."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leoclr_fast.config_file import as_plain, differing_fields
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.detection.config import DetectionConfig
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4
from leoclr_fast.evaluate.detection.synchronised_batchnorm import synchronised
from leoclr_fast.machine.precision import encoder_dtype
from leoclr_fast.weights.pretrained import Pretrained

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(slots=True, kw_only=True)
class DetectorState:
    """Detector, optimizer, loss scale and finished iterations; the same on every rank."""

    detector: FasterRCNNC4
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    iteration: int
    statistics_are_precise: bool
    """Whether the running statistics were averaged after the last iteration."""
    origin: dict[str, Any]
    """Configuration, weights and data: what a checkpoint must agree in."""
    world_size: int

    @classmethod
    def fresh(
        cls,
        config: DetectionConfig,
        pretrained: Pretrained,
        num_classes: int,
        data_fingerprint: str,
        precision: str,
        ranks: Ranks,
        device: torch.device,
    ) -> DetectorState:
        """The state before the first iteration: the heads are drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            detector = FasterRCNNC4(
                pretrained.backbone,
                num_classes,
                anchor_sizes=config.anchor_sizes,
                regions_per_image=config.regions_per_image,
            )
        detector.to(device, encoder_dtype(precision)).to(memory_format=torch.channels_last)
        if ranks.world_size > 1:
            synchronised(detector)
        origin = {
            "config": as_plain(config),
            "weights_sha256": pretrained.sha256,
            "data_fingerprint": data_fingerprint,
            "precision": precision,
        }
        return cls(
            detector=detector,
            optimizer=_optimizer(detector, config),
            scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
            iteration=0,
            statistics_are_precise=False,
            origin=origin,
            world_size=ranks.world_size,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "format": _FORMAT,
            "iteration": self.iteration,
            "statistics_are_precise": self.statistics_are_precise,
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "origin": self.origin,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any], path: object) -> None:
        """Continue from a checkpoint. Raises ValueError if it is of another configuration, other weights or data."""
        if state.get("format") != _FORMAT:
            raise ValueError(f"{path} has checkpoint format {state.get('format')}; this version reads {_FORMAT}")
        differences = differing_fields(state["origin"], self.origin)
        if differences:
            raise ValueError(
                f"{path} belongs to another detection run: {'; '.join(differences)}. Give the same weights, data and "
                "options as there to continue it, or another --out"
            )
        if state["world_size"] != self.world_size:
            log.warning(
                "%s was written by %d ranks, now there are %d: other anchors and regions are sampled from here on",
                path,
                state["world_size"],
                self.world_size,
            )
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.statistics_are_precise = state["iteration"], state["statistics_are_precise"]


def _optimizer(detector: nn.Module, config: DetectionConfig) -> torch.optim.SGD:
    """No weight decay on batch-norm, as detectron2."""
    norms = [p for module in detector.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()]
    of_norm = {id(parameter) for parameter in norms}
    others = [parameter for parameter in detector.parameters() if id(parameter) not in of_norm]
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)

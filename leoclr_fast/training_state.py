"""Everything that a run must remember to continue exactly."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from leoclr_fast.config import ResultConfig, RunConfig
from leoclr_fast.config_file import as_plain, differing_fields
from leoclr_fast.distributed import Ranks
from leoclr_fast.methods import MomentumContrast, build_method
from leoclr_fast.precision import encoder_dtype

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Model, key model, queue, optimizer, loss scale and step; the same on every rank."""

    method: MomentumContrast
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    step: int
    """Finished steps, over all epochs. Sample order, crops and augmentation follow from it and the seed."""
    synthetic: bool
    """Whether the images are the synthetic loader's noise."""

    @classmethod
    def fresh(cls, config: RunConfig, ranks: Ranks, device: torch.device) -> TrainingState:
        """The state before the first step, drawn from the seed."""
        result, speed = config.result, config.speed
        method = build_method(result.backbone, result.method, result.seed, ranks)
        memory_format = torch.channels_last if speed.channels_last else torch.contiguous_format
        method.to(device, encoder_dtype(speed.precision)).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(
            method.query_encoder.parameters(),
            lr=result.lr,
            momentum=result.optimizer.momentum,
            weight_decay=result.optimizer.weight_decay,
        )
        scaler = torch.amp.GradScaler(device.type, enabled=speed.precision == "fp16")
        synthetic = speed.loader.name == "synthetic"
        return cls(method=method, optimizer=optimizer, scaler=scaler, step=0, synthetic=synthetic)

    def state_dict(self, config: ResultConfig, data_fingerprint: str) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "format": _FORMAT,
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "result_config": as_plain(config),
            "data_fingerprint": data_fingerprint,
            "synthetic": self.synthetic,
            "world_size": self.method.ranks.world_size,
        }

    def load_state_dict(
        self, state: dict[str, Any], config: ResultConfig, data_fingerprint: str, origin: object
    ) -> None:
        """Continue from a checkpoint.

        Raises ValueError, naming `origin` and what differs, if it is of another format, configuration or data.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"{origin} has checkpoint format {state.get('format')}; this version reads {_FORMAT}")
        differences = differing_fields(state["result_config"], as_plain(config))
        if differences:
            raise ValueError(
                f"{origin} belongs to another configuration: {'; '.join(differences)}. Give the same options as there, "
                "or another --out for a new run."
            )
        if state["data_fingerprint"] != data_fingerprint:
            raise ValueError(
                f"{origin} was made on other data: names or labels differ from those of --data. Give the same data, or "
                "another --out for a new run."
            )
        if state["synthetic"] != self.synthetic:
            raise ValueError(
                f"{origin} is of a run on {'synthetic' if state['synthetic'] else 'real'} images; start anew"
            )
        if state["world_size"] != self.method.ranks.world_size:
            log.warning(
                "%s was written by %d ranks, now there are %d: batch-norm sees other groups of images from here on",
                origin,
                state["world_size"],
                self.method.ranks.world_size,
            )
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty unless the run was in fp16 before
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

"""Everything that a run must remember to continue exactly."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leoclr_fast.config import ResultConfig, RunConfig
from leoclr_fast.config_file import as_plain, differing_fields, from_plain
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.machine.precision import encoder_dtype
from leoclr_fast.method.method import Method
from leoclr_fast.method.methods import build_method
from pipelines.factory import shows_images

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Method, optimizer, loss scale and step; the same on every rank."""

    method: Method
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    step: int
    """Finished steps, over all epochs. Sample order, crops and augmentation follow from it and the seed."""
    synthetic: bool
    """Whether the images are the synthetic loader's noise."""
    data_fingerprint: str

    @classmethod
    def fresh(cls, config: RunConfig, ranks: Ranks, device: torch.device, data_fingerprint: str = "") -> TrainingState:
        """The state before the first step, drawn from the seed. data_fingerprint: of what it is to be trained on."""
        result, speed = config.result, config.speed
        method = build_method(result, ranks)
        memory_format = torch.channels_last if speed.channels_last else torch.contiguous_format
        method.to(device, encoder_dtype(speed.precision)).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(
            method.trained_weights(),
            lr=_learning_rate_place(result.lr, speed.precision, device),
            momentum=result.optimizer.momentum,
            weight_decay=result.optimizer.weight_decay,
            fused=True,
        )
        if result.optimizer.momentum > 0:  # all storage exists from the start; zeros are what a first step assumes
            for weight in method.trained_weights():
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        method.prepare(speed)
        scaler = torch.amp.GradScaler(device.type, enabled=speed.precision == "fp16")
        scaler.scale(torch.zeros((), device=device))  # makes its tensors
        synthetic = not shows_images(speed.loader)
        return cls(
            method=method,
            optimizer=optimizer,
            scaler=scaler,
            step=0,
            synthetic=synthetic,
            data_fingerprint=data_fingerprint,
        )

    def set_learning_rate(self, lr: float) -> None:
        """For the steps to come; nothing waits for the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes; none of them ever moves to other storage."""
        slots = (slot["momentum_buffer"] for slot in self.optimizer.state.values())
        scale = (self.scaler._scale, self.scaler._growth_tracker) if self.scaler.is_enabled() else ()
        everything = (*self.method.parameters(), *self.method.buffers(), *slots, *scale)
        return [tensor.detach() for tensor in everything if tensor is not None]

    def forget_unfinished_step(self) -> None:
        """Drop what a step leaves between its backward pass and its end, if it was cut short there."""
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()

    def state_dict(self, config: ResultConfig) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "format": _FORMAT,
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "result_config": as_plain(config),
            "data_fingerprint": self.data_fingerprint,
            "synthetic": self.synthetic,
            "world_size": self.method.ranks.world_size,
        }

    def load_state_dict(self, state: dict[str, Any], config: ResultConfig, origin: object) -> None:
        """Continue from a checkpoint: values are copied, storage stays, so that a captured step stays valid.

        Raises ValueError, naming `origin` and what differs, if it is of another format, configuration or data.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"{origin} has checkpoint format {state.get('format')}; this version reads {_FORMAT}")
        saved = from_plain(ResultConfig, state["result_config"], f"the configuration in {origin}")
        differences = differing_fields(as_plain(saved), as_plain(config))
        if differences:
            raise ValueError(
                f"{origin} belongs to another configuration: {'; '.join(differences)}. Give the same options as there, "
                "or another --out for a new run."
            )
        if state["data_fingerprint"] != self.data_fingerprint:
            raise ValueError(
                f"{origin} was made on other data: names or labels differ from those of --data. Give the same data, or "
                "another --out for a new run."
            )
        if state["synthetic"] != self.synthetic:
            raise ValueError(
                f"{origin} is of a run on {'synthetic' if state['synthetic'] else 'real'} images; start anew"
            )
        if state["world_size"] != self.method.ranks.world_size and config.method.depends_on_ranks:
            log.warning(
                "%s was written by %d ranks, now there are %d: batch-norm sees other groups of images from here on",
                origin,
                state["world_size"],
                self.method.ranks.world_size,
            )
        self.method.load_state_dict(state["method"])
        self._load_momentum(state["optimizer"]["state"])
        if state["scaler"]:  # empty unless the run was in fp16 before
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    @torch.no_grad()
    def _load_momentum(self, saved: dict[int, dict[str, Tensor | None]]) -> None:
        """Momentum buffers by the number of their weight. The optimizer's other values come from the configuration."""
        for number, slot in enumerate(self.optimizer.state.values()):
            buffer = saved.get(number, {}).get("momentum_buffer")
            if buffer is None:
                slot["momentum_buffer"].zero_()
            else:
                slot["momentum_buffer"].copy_(buffer)


def _learning_rate_place(lr: float, precision: str, device: torch.device) -> float | Tensor:
    """Where the optimizer finds its rate: on a GPU a tensor there, so that a captured step reads the newest value.

    The fused kernel of a GPU reads it in float32, so a truth in float64 has a number instead.
    """
    if device.type == "cuda" and precision != "fp64":
        return torch.tensor(lr, device=device)
    return lr

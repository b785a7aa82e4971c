"""Which means of speed are used on a device: torch.compile, a captured CUDA graph; and why not, where not."""

from __future__ import annotations

import logging

import torch

from leoclr_fast.config import SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.machine.compiling import what_compiling_lacks

log = logging.getLogger(__name__)


def compiles_encoders(speed: SpeedConfig, device: torch.device) -> bool:
    """Whether the encoders go through torch.compile: `auto` compiles on a GPU, but not float64.

    Raises ValueError if it is asked for and something is missing.
    """
    if speed.compile == "off" or (speed.compile == "auto" and (device.type == "cpu" or speed.precision == "fp64")):
        return False
    missing = what_compiling_lacks(device.type)
    if missing and speed.compile == "on":
        raise ValueError(f"--compile on needs {missing}, which was not found; install it or choose --compile off")
    if missing:
        log.warning("the encoders are not compiled because %s is missing; they run eagerly, slower", missing)
    return not missing


def captures_step(speed: SpeedConfig, device: torch.device, ranks: Ranks) -> bool:
    """Whether the step is captured as a CUDA graph: `auto` does so for a single rank, wherever it can; `on` also for
    several, whose collectives NCCL then records with the rest.

    Raises ValueError if it is asked for and cannot be.
    """
    if speed.cuda_graph == "off" or (speed.cuda_graph == "auto" and ranks.world_size > 1):
        return False
    obstacle = None
    if device.type != "cuda":
        obstacle = f"a CUDA GPU is needed and the device is {device}"
    elif ranks.meter is not None:
        obstacle = "the time of every collective is to be measured, and a graph runs without a stop"
    elif speed.precision == "fp64":
        obstacle = "in fp64 the learning rate is read from the host"
    if obstacle and speed.cuda_graph == "on":
        raise ValueError(f"--cuda-graph on is not possible: {obstacle}; choose --cuda-graph auto or off")
    if ranks.world_size > 1 and ranks.is_main:
        log.warning(
            "a graph of %d ranks has never been tried: compare its losses with --cuda-graph off", ranks.world_size
        )
    return obstacle is None

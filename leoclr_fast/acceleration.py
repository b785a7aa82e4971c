"""Which means of speed are used on a device: torch.compile, a captured CUDA graph; and why not, where not."""

from __future__ import annotations

import logging

import torch

from leoclr_fast.compiling import what_compiling_lacks
from leoclr_fast.config import SpeedConfig

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


def captures_step(speed: SpeedConfig, device: torch.device, world_size: int) -> bool:
    """Whether the step is captured as a CUDA graph: `auto` does so wherever it can.

    Raises ValueError if it is asked for and cannot be.
    """
    if speed.cuda_graph == "off":
        return False
    obstacle = None
    if device.type != "cuda":
        obstacle = f"a CUDA GPU is needed and the device is {device}"
    elif world_size > 1:
        obstacle = f"there are {world_size} ranks, and their collectives have not been tried in a graph"
    elif speed.precision == "fp64":
        obstacle = "in fp64 the learning rate is read from the host"
    if obstacle and speed.cuda_graph == "on":
        raise ValueError(f"--cuda-graph on is not possible: {obstacle}; choose --cuda-graph auto or off")
    return obstacle is None

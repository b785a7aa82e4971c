"""A few steps of a demo recipe on noise: `narrow_training RECIPE BATCH SIDE THREADS STEPS WIDTH`."""

import faulthandler
import sys
from dataclasses import replace

import numpy as np
import torch

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.recipes import get_recipe
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch


def train(recipe: str, batch_size: int, side: int, num_steps: int, width: float = 0.125) -> TrainingState:
    """The state after `num_steps` steps on random crops."""
    config = get_recipe(recipe)
    views = replace(config.result.views, image_size=side)
    backbone = replace(config.result.backbone, width_multiplier=width)
    config = replace(config, result=replace(config.result, batch_size=batch_size, views=views, backbone=backbone))
    state = TrainingState.fresh(config, Ranks(), torch.device("cpu"))
    step = TrainingStep(state, config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    num_views = len(state.method.views)
    for number in range(num_steps):
        shape = (batch_size, num_views, side, side, 3)
        batch = CropBatch(
            crops=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            labels=torch.full((batch_size,), -1),
            indices=np.arange(batch_size),
            boxes=np.zeros((batch_size, num_views, 4), dtype=np.int32),
            epoch=0,
            step=number,
        )
        assert torch.isfinite(step(batch, 0.01)).all()
    return state


if __name__ == "__main__":
    faulthandler.enable()
    recipe, *numbers, width = sys.argv[1:]
    batch_size, side, num_threads, num_steps = map(int, numbers)
    torch.set_num_threads(num_threads)
    train(recipe, batch_size, side, num_steps, float(width))

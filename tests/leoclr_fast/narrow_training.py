"""A few steps of a demo recipe on noise: `narrow_training RECIPE WIDTH THREADS STEPS BATCHxSIDE…`."""

import faulthandler
import sys
from dataclasses import replace

import numpy as np
import torch

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.machine.precision import settled
from leoclr_fast.recipes import get_recipe
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch


def train(recipe: str, batch_size: int, side: int, num_steps: int, width: float = 0.125) -> TrainingState:
    """The state after `num_steps` steps on random crops."""
    config, device = get_recipe(recipe), torch.device("cpu")
    views = replace(config.result.views, image_size=side)
    backbone = replace(config.result.backbone, width_multiplier=width)
    method = replace(config.result.method, key_batchnorm_group=min(32, batch_size // 2))  # so that they can be shuffled
    result = replace(config.result, batch_size=batch_size, views=views, backbone=backbone, method=method)
    config = replace(config, result=result, speed=settled(config.speed, device))
    state = TrainingState.fresh(config, Ranks(), device)
    step = TrainingStep(state, config, device)
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
    recipe, width, num_threads, num_steps, *sizes = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    for size in sizes:
        print(size, file=sys.stderr)  # the last one, if this crashes
        batch_size, side = map(int, size.split("x"))
        train(recipe, batch_size, side, int(num_steps), float(width))

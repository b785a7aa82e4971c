"""Methods that train in interleaved rounds, in one process: seconds, data wait and energy of each in every round."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from dataset_tools.packed_names import PackedNames
from dataset_tools.sources import Split, open_source
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from leoclr_fast.bench.config import BenchSetting, RoundsConfig
from leoclr_fast.bench.timing import Say, interleaved, peak_extra_mib, synchronize
from leoclr_fast.config import MethodName, MonitorConfig, ResultConfig, RunConfig, SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.machine.energy import EnergyMeter, energy_between
from leoclr_fast.method.flops import training_flops_per_image
from leoclr_fast.method.methods import method_class
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig
from pipelines.factory import make_loader, settle_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder
from pipelines.views import ViewRecipe

SYNTHETIC = LoaderConfig(name="synthetic")
"""The loader that neither reads nor decodes."""
_SYNTHETIC_STEPS = 64
_STEPS_AHEAD = 2

Batches = Mapping[ViewRecipe, Iterator[CropBatch]]


class TimedMethod(ABC):
    """Trains on whatever batches it is given, with a network of its own."""

    name: str
    """That of one of our methods, or of a peer."""
    views: ViewRecipe
    """The views that its batches must hold."""
    flops_per_image: int
    peak_memory_gib: float | None = None
    """Of all its tensors, at most, since it was made; None on a CPU."""

    @abstractmethod
    def step(self, batch: CropBatch) -> None:
        """One training step, from crops to moved weights; on a GPU, only enqueued."""


class OurMethod(TimedMethod):
    """One of our methods, by the very step that `pretrain` runs, at a constant learning rate."""

    def __init__(self, method: MethodName, setting: BenchSetting, speed: SpeedConfig, device: torch.device) -> None:
        result = setting.result(method)
        self.name = method
        self.views = method_class(method).views
        self.flops_per_image = training_flops_per_image(result)
        self.config = RunConfig(recipe=setting.recipe, result=result, speed=speed, monitor=MonitorConfig())
        self.training = TrainingState.fresh(self.config, Ranks(), device)
        self._lr = result.lr
        self._step = TrainingStep(self.training, self.config, device)

    def step(self, batch: CropBatch) -> None:
        self._step(batch, self._lr)


class UnreadImages(Split):
    """So many unlabelled images that nobody reads: what the synthetic loader is given."""

    def __init__(self, num_images: int) -> None:
        self.name = "synthetic"
        self.labels = np.full(num_images, -1, dtype=np.int64)
        self.names = PackedNames(f"synthetic {number}" for number in range(num_images))
        self.classes = ()

    def read(self, index: int) -> bytes:
        raise OSError(f"{self.names[index]} does not exist")


def training_images(data: Path | None, result: ResultConfig, max_images: int | None = None) -> Split:
    """The images that `pretrain` would train on; without `data`, images that only the synthetic loader can use.

    Raises ValueError for data that cannot be read, or with fewer images than one batch.
    """
    if data is None:
        return UnreadImages(_SYNTHETIC_STEPS * result.batch_size)
    split = limited(choose_splits(open_source(data)).pretrain, max_images)
    if len(split) < result.batch_size:
        raise ValueError(
            f"{data} has {len(split)} images to train on, fewer than one batch of {result.batch_size}; give more "
            "images or a smaller --batch-size"
        )
    return split


@contextmanager
def open_batches(
    split: Split, recipes: Sequence[ViewRecipe], result: ResultConfig, config: LoaderConfig, device: torch.device
) -> Iterator[tuple[Batches, str]]:
    """Batches of each of `recipes`, epoch after epoch, from loaders with the same settings; and the loader's name.

    The images and the crops are those of the seed: the same for every recipe.
    Raises what `make_loader` raises.
    """
    order = TrainOrder(num_images=len(split), batch_size=result.batch_size, seed=result.seed)
    settled = settle_loader(split, config, device)
    with ExitStack() as stack:
        batches = {}
        for views in dict.fromkeys(recipes):
            loader = stack.enter_context(
                make_loader(split, views, result.views, settled, order, seed=result.seed, device=device)
            )
            batches[views] = endless(loader)
            stack.callback(batches[views].close)  # before its loader
        yield batches, settled.name


def endless(loader: Loader) -> Generator[CropBatch, None, None]:
    for epoch in count():
        yield from loader.batches(epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSteps:
    """Some steps of a method, one after the other; the device was idle before and after."""

    steps: int
    seconds: float
    data_wait_s: float
    """Of them, in which the device had nothing to do because its next batch was not there."""
    energy_j: float | None

    @property
    def step_ms(self) -> float:
        return 1000 * self.seconds / self.steps


def prepare(make: Callable[[], TimedMethod], batches: Batches, device: torch.device, steps: int) -> TimedMethod:
    """Make a method and let it train for some steps; on a GPU, it is told how much memory that took."""
    made: list[TimedMethod] = []

    def make_and_train() -> None:
        made.append(make())
        _train(made[0], batches, steps)

    peak_mib = peak_extra_mib(make_and_train, device)
    made[0].peak_memory_gib = None if peak_mib is None else peak_mib / 1024
    return made[0]


def train_interleaved(
    methods: Sequence[TimedMethod],
    batches: Batches,
    device: torch.device,
    config: RoundsConfig,
    say: Say = lambda _: None,
) -> list[list[TimedSteps]]:
    """Warm all up, then let them train in interleaved rounds: what each did in every one. `say` is given its lines.

    batches: without end, for the views of each method. Methods with the same views share them.
    """
    start = time.perf_counter()
    meter = EnergyMeter.of(device)
    timed: list[list[TimedSteps]] = [[] for _ in methods]
    for method in methods:
        _train(method, batches, config.warmup_steps)
    left_s = config.max_s - (time.perf_counter() - start)
    for number, place in interleaved(range(len(methods)), config.rounds, max_s=left_s, say=say):
        method = methods[place]
        timed[place].append(_timed_steps(method, batches, device, config, meter))
        say(f"round {number + 1}/{config.rounds}: {method.name} {timed[place][-1].step_ms:,.1f} ms a step")
    return timed


def _timed_steps(
    method: TimedMethod, batches: Batches, device: torch.device, config: RoundsConfig, meter: EnergyMeter
) -> TimedSteps:
    _train(method, batches, config.lead_steps)
    synchronize(device)
    before_j, data_wait_s = meter.read_j(), 0.0
    done: deque[torch.cuda.Event] = deque()
    start = time.perf_counter()
    for _ in range(config.steps):
        asked = time.perf_counter()
        batch = next(batches[method.views])
        if not done or done[-1].query():  # else the device was still busy when the batch came
            data_wait_s += time.perf_counter() - asked
        method.step(batch)
        if device.type == "cuda":
            done.append(torch.cuda.Event())
            done[-1].record()
            if len(done) > _STEPS_AHEAD:
                done.popleft().synchronize()  # a host far ahead would take the waiting for batches as its own speed
    synchronize(device)
    seconds = time.perf_counter() - start
    energy_j = energy_between(before_j, meter.read_j())
    return TimedSteps(steps=config.steps, seconds=seconds, data_wait_s=data_wait_s, energy_j=energy_j)


def _train(method: TimedMethod, batches: Batches, steps: int) -> None:
    for batch in islice(batches[method.views], steps):
        method.step(batch)

"""The settings of the evaluators: protocols, which change a result, and options. Nothing here needs torch.

Each default of a protocol is a published value, or says that it is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from dataset_tools.limits import Count, Epochs, Limited, Positive, Seed, Temperature, WeightDecay, require_allowed
from leoclr_fast.config import Precision
from pipelines.config import LoaderConfig

Metric = Literal["top1", "mean_per_class"]

_SIMCLR_LR_GRID = (1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1)
_SIMCLR_WEIGHT_DECAY_GRID = (0.0, 1e-6, 10**-5.5, 1e-5, 10**-4.5, 1e-4, 10**-3.5, 1e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions(Limited):
    """On which weights, images and machine."""

    out: Path | None = None
    """Where it works, and finds its result again; by default a folder that the settings determine, in RUN/evaluations
    or, of a file, in WEIGHTS.evaluations beside it."""
    untrained: bool = False
    """Of a run, the weights that it began with: what pretraining is measured against."""
    max_images: Count | None = None
    """At most this many images to learn from, and to test on: for trying out."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Of the network: bf16 and fp16 by autocast. auto: bf16 on a GPU that computes it, fp16 on another, fp32 on a
    CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions(EvaluationOptions):
    """The same of an evaluation whose images are square and of one size."""

    image_size: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Side of an image, pixels; the pretraining's if not given."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Changes only the speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions(ViewOptions):
    """The same of one that trains something, and can be resumed."""

    max_steps: Count | None = None
    """Pause when so many steps are done in all, without a result; the same command without it continues."""
    checkpoint_every_s: Annotated[float, Meta(ge=0)] = 60.0
    """A checkpoint at the end of an epoch, once the last one is so many seconds old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnProtocol(Limited):
    """Weighted kNN of frozen features, as Wu et al. (CVPR 2018)."""

    k: Count | None = None
    """Neighbours that vote; the run's own if not given."""
    temperature: Temperature | None = None
    """Weight of a neighbour: exp(cosine similarity / temperature); the run's own if not given."""
    batch_size: Count = 256
    """Images per forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProtocol:
    """Linear classification of frozen features, as MoCo-v2's (main_lincls.py of facebookresearch/moco): momentum
    0.9, random crop and flip, centre crop on val, the last epoch's classifier. The LeOCLR paper fixes 100 epochs, crop
    and flip.
    """

    epochs: Epochs = 100
    batch_size: Count = 256
    """Images per step over all ranks; an epoch's last batch may be smaller."""
    lr: Positive = 30.0
    """At the start; not scaled with the batch size."""
    lr_grid: tuple[Positive, ...] = ()
    """Instead of --lr: a classifier for each of these, all trained on the same features in the same pass. The one that
    does best on images held out of train, a tenth of it but at most 10,000, is reported; val has no say. (Ours; BYOL's
    choice on ImageNet is about as large.)"""
    weight_decay: WeightDecay = 0.0
    milestones: tuple[int, ...] | None = None
    """Epochs before which the learning rate falls to a tenth; by default at 60 % and 80 % of the epochs."""
    seed: Seed = 0
    cached_features: bool = False
    """A quick estimate, not the protocol: one pass over the centre crops of train, and no augmentation."""

    def __post_init__(self) -> None:
        require_allowed(self)
        if len(set(self.lr_grid)) != len(self.lr_grid):
            raise ValueError(f"--lr-grid {' '.join(f'{lr:g}' for lr in self.lr_grid)} has a value twice")

    @property
    def lrs(self) -> tuple[float, ...]:
        """The learning rates of all classifiers."""
        return self.lr_grid or (self.lr,)

    @property
    def lr_drops(self) -> tuple[int, ...]:
        """Epochs before which the learning rate falls to a tenth."""
        if self.milestones is not None:
            return self.milestones
        return round(0.6 * self.epochs), round(0.8 * self.epochs)

    def lr_factor(self, epoch: int) -> float:
        """What the learning rates are multiplied by in an epoch (from 0)."""
        return 0.1 ** sum(epoch >= drop for drop in self.lr_drops)


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneProtocol:
    """Semi-supervised fine-tuning of the whole network, as SimCLR's (Chen et al., 2020, appendix B.5, and its code):
    Nesterov momentum 0.9, 0.05 * batch / 256, cosine decay, no weight decay, random crop and flip, centre crop on val.
    The LeOCLR paper fixes 60 epochs for 1 % of the labels and 30 for 10 %.
    """

    percent: tuple[float, ...] = ()
    """Shares of train, one after the other: 1, or 1 2 5 10 20 50 100. Nested and class-balanced."""
    list: Path | None = None
    """Instead of --percent: a published list of the images to learn from, or one that `subset` wrote."""
    subset_seed: Seed = 0
    """Which images --percent takes; as --seed of `subset`."""
    epochs: Epochs | None = None
    """By default 60 for less than 10 % of the labels, else 30 (for other shares than 1 % and 10 % that is ours)."""
    batch_size: Count = 256
    """Images per step over all ranks; an epoch's incomplete last batch is left out. (SimCLR: 4,096.)"""
    base_lr: Positive = 0.05
    """For a batch of 256; the learning rate is base_lr * batch_size / 256, at the start."""
    base_lr_grid: tuple[Positive, ...] = ()
    """Instead of --base-lr: the best of these on a tenth of the labelled images; then all of them are learned from."""
    weight_decay: WeightDecay = 0.0
    """Not on batch-norm."""
    seed: Seed = 0
    """Of the order, the crops and the classifier's first weights; of the labels with --percent, see --subset-seed."""

    def __post_init__(self) -> None:
        if bool(self.percent) == (self.list is not None):
            raise ValueError("give either --percent P … or --list FILE")
        require_allowed(self)

    def num_epochs(self, percent: float) -> int:
        """Epochs for a share of the labels."""
        if self.epochs is not None:
            return self.epochs
        return 60 if round(percent, 1) < 10 else 30  # a published list of 10 % has a little less


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProtocol:
    """Fine-tuning on other data, as SimCLR's (appendix B.8.1) after Kornblith, Shlens and Le (2019): 20,000 steps of
    256 images, Nesterov momentum 0.9, cosine decay, batch-norm momentum max(1 - 10 / s, 0.9) for s steps an epoch,
    random crop and flip, and 7 x 8 hyperparameters tried on a validation split; then train and it together are learned
    from. The LeOCLR paper names the data sets alone. The validation split, a tenth of train, is ours.
    """

    steps: Count = 20_000
    batch_size: Count = 256
    """Images per step over all ranks; an epoch's incomplete last batch is left out."""
    lr_grid: tuple[Positive, ...] = _SIMCLR_LR_GRID
    """Learning rates at the start; not scaled with the batch size."""
    weight_decay_grid: tuple[WeightDecay, ...] = _SIMCLR_WEIGHT_DECAY_GRID
    """Each is divided by the learning rate, as there. Not on batch-norm."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_allowed(self)
        if not self.lr_grid or not self.weight_decay_grid:
            raise ValueError("an empty grid is not allowed: give --lr-grid and --weight-decay-grid at least one value")

"""What a run is made of, in three parts: what changes the result, what changes only the speed, what is watched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from dataset_tools.limits import (
    Count,
    CountOrZero,
    Epochs,
    Limited,
    Momentum,
    Positive,
    Seconds,
    Seed,
    Share,
    Temperature,
    WeightDecay,
    require_allowed,
)
from pipelines.config import LoaderConfig, ViewConfig

LR_REFERENCE_BATCH_SIZE = 256

Architecture = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
InfoNCEImpl = Literal["auto", "eager", "compiled", "triton"]
MethodName = str  # a name in leoclr_fast.method.methods, where others may register theirs
LearningRateSchedule = Literal["cosine_per_epoch", "cosine_per_epoch_from_1", "cosine_per_step", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig(Limited):
    """The network that is pretrained."""

    arch: Architecture = "resnet50"
    """By its name in torchvision."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: 7x7 stride 2 and max-pooling. small: 3x3 stride 1 and no pooling, for images of 32 to 96 pixels."""
    width_multiplier: Annotated[float, Meta(gt=0, le=8)] = 1.0
    """Multiplies the number of channels of every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig(Limited):
    """LeOCLR or MoCo-v2. The defaults are MoCo-v2's published values, where the LeOCLR paper is silent."""

    name: MethodName = "leoclr"
    """leoclr or mocov2: a name in `leoclr_fast.method.methods`."""
    projection_dim: Annotated[int, Meta(ge=1, le=2**16)] = 128
    """Output of the projection head."""
    projection_layers: Literal[1, 2] = 2
    """Linear layers of the projection head, a ReLU between them: MoCo-v2 has 2, MoCo's CIFAR-10 demo 1."""
    queue_size: Annotated[int, Meta(ge=1, le=2**26)] = 65_536
    """Negative keys."""
    key_momentum: Share = 0.999
    """Momentum of the key encoder's moving average."""
    temperature: Temperature = 0.2
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Over the positives of a query. sum is eq. 2 of the paper, and doubles LeOCLR's gradient against MoCo-v2's at
    the same learning rate; mean does not. With one positive (MoCo-v2) there is no difference."""
    enqueue: Literal["first", "all"] = "first"
    """Whose keys enter the queue: those of the first crop (the queue is as old, and holds as many images, as
    MoCo-v2's), or those of all crops."""
    key_batchnorm: Literal["shuffle", "split", "sync", "ema", "plain"] = "shuffle"
    """Batch-norm of the key encoder. shuffle: over groups of images shuffled among all ranks and micro-batches. split:
    the same within a rank. sync: over the global batch. ema: averaged running statistics (EMAN, CVPR 2021). plain: over
    each rank's batch, which the query's batch-norm sees, too, so that it leaks which key is whose."""
    key_batchnorm_group: Count = 32
    """shuffle and split: least number of images in a group; MoCo-v2 had 32 on each of 8 GPUs. A batch that is too small
    for two such groups has smaller ones, which is said."""
    query_batchnorm: Literal["plain", "split", "sync"] = "plain"
    """Batch-norm of the query encoder. plain: over each rank's images, as DistributedDataParallel leaves it. split:
    over groups of them, as on the GPUs of MoCo-v2. sync: over those of all ranks; with a key_batchnorm of sync (or ema)
    too, any number of ranks learns the same thing. Its running statistics, which evaluation uses, are averaged over
    groups and ranks, where DistributedDataParallel keeps those of rank 0."""
    query_batchnorm_group: Count = 32
    """split: least number of images in a group."""
    key_passes: Literal["separate", "joint"] = "separate"
    """separate: one forward of the key encoder for each crop (Algorithm 1). joint: one forward for all of them, with
    batch statistics over all of them."""

    @property
    def depends_on_ranks(self) -> bool:
        """Whether the number of ranks changes the result by more than rounding: some batch-norm is a rank's own."""
        return self.query_batchnorm != "sync" or self.key_batchnorm not in ("sync", "ema")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig(Limited):
    """SGD."""

    base_lr: Positive = 0.03
    """Learning rate for a global batch of 256; the run's `lr` is base_lr * batch_size / 256."""
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 1e-4
    """On every parameter, as MoCo-v2."""
    schedule: LearningRateSchedule = "cosine_per_epoch"
    """cosine_per_epoch is MoCo-v2's; with from_1 epochs count from 1, as in MoCo's CIFAR-10 demo, whose last epoch has
    a rate of 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultConfig:
    """Everything that changes the result. Two runs that agree here, on the same data and on as many ranks (each has
    its own batch-norm, unless both encoders synchronise it), learn the same thing.
    """

    epochs: Epochs = 200
    batch_size: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 256
    """Images per step over all ranks: the global batch."""
    micro_batches: Count = 1
    """Parts of the global batch that a step works through one after the other (gradient accumulation), so that less
    memory is needed. Every key of the step is made first, from one moving average, and shuffled over the whole batch;
    the queue, the moving average, the optimizer and the schedule move once a step, and the negatives are the same for
    all parts. Batch-norm sees one part at a time, and the query's running statistics move with each: that changes the
    result. Each part is shared by all ranks, so that it holds the same images for any number of ranks."""
    seed: Seed = 0
    max_images: Count | None = None
    """Pretrain on at most this many images, a class-balanced choice; all if not given."""
    holdout_seed: Seed = 0
    """Draws the images held out for kNN where the data has no val or test split."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    views: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self) -> None:
        require_allowed(self)
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"{self.micro_batches} micro-batches are not allowed for a batch of {self.batch_size}: give "
                f"--micro-batches from 1 to {self.batch_size}"
            )

    @property
    def lr(self) -> float:
        """Initial learning rate of this run: base_lr * batch_size / 256 (linear scaling)."""
        return self.optimizer.base_lr * self.batch_size / LR_REFERENCE_BATCH_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedConfig:
    """Everything that changes only the speed: the loss curve stays the same up to rounding. The one exception is the
    synthetic loader, whose runs measure speed and cannot be continued on real images.
    """

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Of the encoders: bf16 and fp16 by autocast with float32 weights; fp64 throughout, as a truth to compare with.
    auto: that of the run which is continued; else bf16 on a GPU that computes it, fp16 on another, fp32 on a CPU."""
    channels_last: bool = True
    """Memory format of the encoders."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the encoders. auto: on a GPU where a C compiler and Triton are found."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """The whole step as one captured CUDA graph. auto: on a single GPU, except in fp64; on: with several ranks, too."""
    loss_impl: InfoNCEImpl = "auto"
    """auto (triton on a GPU, eager on a CPU), eager, compiled or triton."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig(Limited):
    """What is watched and kept on the way; the weights do not depend on it."""

    knn: Literal["auto", "on", "off"] = "auto"
    """auto: before the first epoch, on the way, and at the end, but not at the start and the pause of a run that
    --max-steps pauses. on: there, too. off: never."""
    knn_every_epochs: CountOrZero = 10
    """Evaluate kNN before the first epoch, after every so many, and at the end; 0 only before and at the end."""
    knn_max_images: Count = 100_000
    """A class-balanced choice of so many images is the bank, and of at most 10,000 the queries. The command `knn` takes
    all of them."""
    knn_k: Count = 200
    """Neighbours that vote (MoCo's CIFAR demo: 200)."""
    knn_features: Literal["backbone", "projection"] = "backbone"
    """What kNN compares: the backbone's features, or the projection head's outputs, as MoCo's CIFAR-10 demo."""
    knn_temperature: Temperature = 0.1
    """Weight of a neighbour: exp(cosine similarity / temperature)."""
    log_every_steps: Count = 10
    """Steps between two looks at the metrics; the log holds the mean over them."""
    checkpoint_every_epochs: Count = 1
    """A checkpoint is also written at the end."""
    checkpoint_every_steps: Count | None = None
    """Further checkpoints within an epoch."""
    keep_checkpoints: Count = 2
    """The newest so many are kept."""
    join_limit_s: Seconds = 300.0
    """How long ranks wait for each other at the start."""
    collective_timeout_s: Seconds = 600.0
    """How long ranks wait for one of them that does not answer before the run ends. A slow rank is no dead one: one
    that has died ends the run at once."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run folder."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run; a recipe returns one."""

    recipe: str
    """The recipe this configuration started from."""
    result: ResultConfig
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

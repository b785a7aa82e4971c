"""What each benchmark is given: the flags of `leoclr-fast bench`. Nothing here needs torch or tyro."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from leoclr_fast.config import Architecture, MethodName, ResultConfig
from leoclr_fast.recipes import get_recipe

LEAST_ROUNDS = 2
"""Of a benchmark that stops when its time is over."""


def _require(config: Any, **least: int) -> None:
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise ValueError(f"{name} {getattr(config, name)} is not allowed: give at least {minimum}")


def _require_seconds(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} {getattr(config, name)} is not allowed: give a positive number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSetting:
    """Network, sizes and batch, the same for every method. What is not given is the recipe's."""

    recipe: str = "leoclr_imagenet_200ep"
    """Where everything comes from but the method; the default is the paper's setting."""
    arch: Architecture | None = None
    stem: Literal["imagenet", "small"] | None = None
    width_multiplier: float | None = None
    image_size: int | None = None
    """Side of a view, pixels."""
    batch_size: int | None = None
    queue_size: int | None = None
    key_batchnorm: Literal["shuffle", "split", "sync", "ema", "plain"] | None = None
    key_passes: Literal["separate", "joint"] | None = None
    seed: int = 0

    def result(self, method: MethodName) -> ResultConfig:
        """The configuration of a method on one device. Raises ValueError for an unknown recipe or sizes that do not
        fit.
        """
        base = get_recipe(self.recipe).result
        config = _changed(
            base.method,
            name=method,
            queue_size=self.queue_size,
            key_batchnorm=self.key_batchnorm,
            key_passes=self.key_passes,
        )
        if config.key_batchnorm == "shuffle":  # on one GPU the same thing, by its own name
            config = replace(config, key_batchnorm="split")
        return replace(
            base,
            batch_size=self.batch_size or base.batch_size,
            seed=self.seed,
            backbone=_changed(base.backbone, arch=self.arch, stem=self.stem, width_multiplier=self.width_multiplier),
            method=config,
            views=_changed(base.views, image_size=self.image_size),
        )


def _changed(config: Any, **changes: Any) -> Any:
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class LossBenchConfig:
    """The sizes of the loss, and how often it is timed."""

    batch_size: int = 256
    queue_size: int = 65536
    dim: int = 128
    """Of the projection."""
    positives: int = 2
    """Keys of each query: 2 are LeOCLR's, 1 is MoCo-v2's."""
    temperature: float = 0.2
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of query, keys and queue; a training hands them over in fp32, whatever its own precision."""
    rounds: int = 15
    """Timed calls of each implementation, after two that are not counted."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        _require(self, batch_size=1, queue_size=1, dim=1, positives=1, rounds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentBenchConfig:
    """The views that are augmented, and how often they are timed."""

    method: MethodName = "leoclr"
    """Whose views: leoclr has three of each image, mocov2 two."""
    batch_size: int = 256
    """Images."""
    image_size: int = 224
    """Side of a view, pixels."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the views that come out; auto is what a training takes there."""
    rounds: int = 15
    """Timed calls of each implementation, after two that are not counted."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        _require(self, batch_size=1, rounds=1)
        if self.image_size < 2:
            raise ValueError(f"image size {self.image_size} is not allowed: a blur of 3 taps needs at least 2 pixels")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBenchConfig:
    """Whose steps are taken apart, and how often each part is timed."""

    methods: tuple[MethodName, ...] = ()
    """Names in `leoclr_fast.method.methods`; by default all."""
    repeats: int = 20
    """Timed calls of each part."""
    warmup: int = 3
    """Calls before them, not timed."""
    max_s: float = 600.0
    """For everything; when it is over, each part has been timed less often, at least twice."""

    def __post_init__(self) -> None:
        _require(self, repeats=2, warmup=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig:
    """How long methods are trained and timed in turn."""

    rounds: int = 9
    """Every method trains once in each; the order rotates from round to round."""
    steps: int = 20
    """Timed steps of a method in a round."""
    lead_steps: int = 3
    """Steps before them, not timed: they use up what the loader had ready."""
    warmup_steps: int = 5
    """Steps of each method before the first round."""
    max_s: float = 600.0
    """No new round begins after so many seconds, preparation included; two are always run."""

    def __post_init__(self) -> None:
        _require(self, rounds=LEAST_ROUNDS, steps=1, lead_steps=0, warmup_steps=1)
        _require_seconds(self, "max_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTimeConfig:
    """What is compared."""

    methods: tuple[MethodName, ...] = ()
    """Names in `leoclr_fast.method.methods`; by default all. The step time of the first is given over that of the
    second."""
    peers: bool = False
    """Also time the published MoCo-v2 loop and lightly's MoCo-v2 (from a checkout of the repository)."""
    max_images: int | None = None
    """At most so many real images, a class-balanced choice."""

    def __post_init__(self) -> None:
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods {' '.join(self.methods)} is not allowed: give different methods")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderBenchConfig:
    """Which loaders are compared, at which task, and how long."""

    loaders: tuple[str, ...] = ()
    """Names of --loader, stock-torchvision, stock-ffcv, stock-dali; by default all that can run here."""
    views: int = 3
    """Of each image: 3 are LeOCLR's, 2 MoCo-v2's."""
    image_size: int = 224
    """Side of a view, pixels."""
    batch_size: int = 64
    rounds: int = 7
    """Timed epochs of each loader, after one that is not counted."""
    max_images: int | None = None
    """At most so many images an epoch, a class-balanced choice."""
    workers: int | None = None
    """Threads or worker processes of each loader; by default one for each core."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.views not in (2, 3):
            raise ValueError(f"{self.views} views are not allowed: give 3 (LeOCLR) or 2 (MoCo-v2)")
        _require(self, image_size=1, batch_size=1, rounds=1)


Mode = Literal["weak", "strong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """The numbers of ranks that are timed, and how long."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks to time. The command starts them itself, one for each GPU, or on the CPU."""
    mode: Literal["weak", "strong", "both"] = "both"
    """weak: --batch-size is that of each rank. strong: it is the global one, shared by all ranks."""
    method: MethodName = "leoclr"
    query_batchnorm: Literal["plain", "sync"] = "plain"
    """As in pretrain."""
    rounds: int = 5
    """Every number of ranks trains once in each; the order rotates from round to round."""
    steps: int = 20
    """Timed steps in a round."""
    warmup_steps: int = 5
    """Steps before them, not timed: the step is made anew in every round."""
    max_s: float = 1800.0
    """No new round begins after so many seconds; two are always run."""
    limit_s: float = 300.0
    """Ranks that take longer for their share of a round are an error."""

    def __post_init__(self) -> None:
        _require(self, rounds=LEAST_ROUNDS, steps=1, warmup_steps=1)
        _require_seconds(self, "max_s", "limit_s")
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"--ranks {' '.join(map(str, self.ranks))} is not allowed: give different numbers from 1")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("weak", "strong") if self.mode == "both" else (self.mode,)

    def result(self, setting: BenchSetting, mode: Mode, num_ranks: int) -> ResultConfig:
        """The configuration on so many ranks; weak: the setting's batch on every rank. Raises ValueError for one that
        cannot be.
        """
        given = setting.key_batchnorm or get_recipe(setting.recipe).result.method.key_batchnorm
        alone = setting.result(self.method)
        key_batchnorm = "split" if given == "shuffle" and num_ranks == 1 else given
        return replace(
            alone,
            batch_size=alone.batch_size * (num_ranks if mode == "weak" else 1),
            method=replace(alone.method, key_batchnorm=key_batchnorm, query_batchnorm=self.query_batchnorm),
        )

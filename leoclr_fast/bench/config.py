"""What each benchmark is given: the flags of `leoclr-fast bench`. Nothing here needs torch or tyro."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from msgspec import Meta

from dataset_tools.limits import Count, CountOrZero, Limited, Seconds, Seed, require_allowed
from leoclr_fast.config import Architecture, MethodName, ResultConfig
from leoclr_fast.recipes import get_recipe

LEAST_ROUNDS = 2
"""Of a benchmark that stops when its time is over."""
Rounds = Annotated[int, Meta(ge=LEAST_ROUNDS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSetting(Limited):
    """Network, sizes and batch, the same for every method. What is not given is the recipe's."""

    recipe: str = "leoclr_imagenet_200ep"
    """Where everything comes from but the method; the default is the paper's setting."""
    arch: Architecture | None = None
    stem: Literal["imagenet", "small"] | None = None
    width_multiplier: float | None = None
    image_size: Count | None = None
    """Side of a view, pixels."""
    batch_size: Count | None = None
    queue_size: Count | None = None
    key_batchnorm: Literal["shuffle", "split", "sync", "ema", "plain"] | None = None
    query_batchnorm: Literal["plain", "split", "sync"] | None = None
    key_passes: Literal["separate", "joint"] | None = None
    seed: Seed = 0

    def result(self, method: MethodName) -> ResultConfig:
        """The configuration of a method on one device. Raises ValueError for an unknown recipe or sizes that do not
        fit.
        """
        base = get_recipe(self.recipe).result
        batch_size = self.batch_size or base.batch_size
        half = max(1, batch_size // 2)  # two groups at least: one would hide nothing, and be refused
        config = _changed(
            base.method,
            name=method,
            queue_size=self.queue_size,
            key_batchnorm=self.key_batchnorm,
            key_batchnorm_group=min(base.method.key_batchnorm_group, half),
            query_batchnorm=self.query_batchnorm,
            query_batchnorm_group=min(base.method.query_batchnorm_group, half),
            key_passes=self.key_passes,
        )
        return replace(
            base,
            batch_size=batch_size,
            seed=self.seed,
            backbone=_changed(base.backbone, arch=self.arch, stem=self.stem, width_multiplier=self.width_multiplier),
            method=config,
            views=_changed(base.views, image_size=self.image_size),
        )


def _changed(config: Any, **changes: Any) -> Any:
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig(Limited):
    """How long methods are trained and timed, in interleaved rounds."""

    rounds: Rounds = 9
    """Every method trains once in each; the order rotates from round to round."""
    steps: Count = 20
    """Timed steps of a method in a round."""
    lead_steps: CountOrZero = 3
    """Steps before them, not timed: they use up what the loader had ready."""
    warmup_steps: Count = 5
    """Steps of each method before the first round."""
    max_s: Seconds = 600.0
    """No new round begins after so many seconds, preparation included; two are always run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTimeConfig:
    """What is compared."""

    methods: tuple[MethodName, ...] = ()
    """Names in `leoclr_fast.method.methods`; by default all. The step time of the first is given over that of the
    second."""
    peers: bool = False
    """Also time the published MoCo-v2 loop and lightly's MoCo-v2 (from a checkout of the repository)."""
    max_images: Count | None = None
    """At most so many real images, a class-balanced choice."""

    def __post_init__(self) -> None:
        require_allowed(self)
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods {' '.join(self.methods)} is not allowed: give different methods")

"""What a method of pretraining is to the training step: views, encoders, inputs, losses.

Legend: B images of this rank, b of them in a micro-batch, V views, S side of a view, D projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from leoclr_fast.config import ResultConfig, SpeedConfig
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.backbone import Encoder
from pipelines.batch import CropBatch
from pipelines.views import ViewRecipe


class PartialLoss(NamedTuple):
    """Of a micro-batch."""

    loss: Tensor
    """Scalar, the mean over its images; what is minimised is the mean over the whole batch."""
    num_images: int
    metrics: Sequence[Tensor]
    """A scalar for each of the method's `metric_names`, means over its images."""


class StepTools(Protocol):
    """What a step hands its method; see `leoclr_fast.training.step.TrainingStep`."""

    def views(self, crops: Tensor, parameters: Tensor, recipe: ViewRecipe, sizes: Sequence[int]) -> Iterator[Tensor]:
        """Augmented views [size, 3, S, S] of uint8 crops [N, S, S, 3], for each of the sizes in turn."""

    def encode(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        """The encoder, compiled where this batch allows it, in the precision of the run."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host, copied without a wait."""


class Method(nn.Module, ABC):
    """A method is a subclass in a file of its own, and one line in `leoclr_fast.method.methods`.

    What it trains are its parameters that require a gradient.
    """

    title: ClassVar[str]
    """As people write it."""
    views: ClassVar[ViewRecipe]
    """What a loader cuts out of every image, [V]."""
    baseline: ClassVar[str] = ""
    """The name of the method that pages compare it with, where both have runs."""
    metric_names: ClassVar[tuple[str, ...]] = ()
    """What is logged beside the loss and the norm of its gradient."""
    num_forwards: ClassVar[int]
    """Work of a step for an image, in forward passes of the encoder; a backward pass counts as two: 3 for the query
    and 1 for each key, so 5 in LeOCLR and 4 in MoCo-v2."""

    def __init__(self, result: ResultConfig, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    @classmethod
    def require(cls, result: ResultConfig) -> None:
        """Raises ValueError for a configuration that the method cannot run with."""

    encoder_name: ClassVar[str] = "encoder"
    """The attribute that holds the encoder whose backbone is evaluated and kept."""

    @property
    def kept_encoder(self) -> Encoder:
        """The one whose backbone is evaluated and kept; its running statistics are averaged over the ranks."""
        encoder: Encoder = getattr(self, self.encoder_name)
        return encoder

    @property
    def step_metrics(self) -> tuple[str, ...]:
        """Names of what a step returns."""
        return ("loss", *self.metric_names, "gradient_norm")

    def trained_weights(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [weight for weight in self.parameters() if weight.requires_grad]

    def compiled_encoders(self) -> list[nn.Module]:
        """The modules that `StepTools.encode` may compile."""
        return [self.kept_encoder]

    def prepare(self, speed: SpeedConfig) -> None:
        """Called once, when the weights are on their device."""

    def plan(self, layout: BatchLayout) -> Any:
        """What stays the same for all batches of this layout; has the layout in `layout`."""
        return _Plan(layout)

    def inputs(self, plan: Any, batch: CropBatch, parameters: Tensor, step: int, tools: StepTools) -> list[Tensor]:
        """What a step needs from outside, tensors of shapes that follow from the plan.

        batch: crops uint8 [B, V, S, S, 3]. parameters: float64 [V * B, 13] of the augmentation, view by view, on the
        host. step: its number.
        """
        return [batch.crops, parameters]

    @abstractmethod
    def losses(self, plan: Any, inputs: Sequence[Tensor], tools: StepTools) -> Iterator[PartialLoss]:
        """The forward passes: the loss of each micro-batch, which the step differentiates before it asks for the next.

        A function of tensors on the device, without a wait for the host.
        """


class _Plan(NamedTuple):
    layout: BatchLayout

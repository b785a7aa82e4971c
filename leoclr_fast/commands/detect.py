"""`leoclr-fast detect`: object detection, MoCo's protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import EvaluationFlags, Flattened, say_paused
from leoclr_fast.evaluate.detection.config import DetectionOptions, DetectionProtocol


@dataclass(frozen=True, kw_only=True)
class Detect(EvaluationFlags):
    """Fine-tune Faster R-CNN R50-C4 on VOC07+12 or COCO from a backbone, and report AP, AP50 and AP75.

    The published config of MoCo, unless flags say otherwise; boxes alone, no masks. VOC's AP is that of its 11 points,
    COCO's its own. The same command continues a killed one.
    """

    data: Path
    """voc: the VOCdevkit folder (VOC2007/, VOC2012/). coco: the folder with annotations/, train2017/ and val2017/."""
    protocol: Annotated[DetectionProtocol, Flattened] = field(default_factory=DetectionProtocol)
    options: Annotated[DetectionOptions, Flattened] = field(default_factory=DetectionOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.detection import run_detection

        values = run_detection.run(self.weights, self.data, self.protocol, self.options, console=console)
        if values and not say_paused(console, values):
            say(console, _sentence(values, self.protocol.dataset))
        return values


def _sentence(values: dict[str, Any], dataset: str) -> str:
    suffix, kind = ("_11point", "VOC2007's 11 points") if dataset == "voc" else ("", "COCO's definition")
    found = {name: values[name + suffix] for name in ("AP", "AP50", "AP75")}
    shown = ", ".join(f"{name} {'undefined' if ap is None else f'{ap:.2f} %'}" for name, ap in found.items())
    return f"{shown} ({kind}; {values['test_images']:,} test images)"

"""`leoclr-fast detect`: object detection, MoCo's protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from dataset_tools.command_line import say
from leoclr_fast.commands.evaluation_flags import EvaluationFlags, Flattened
from leoclr_fast.evaluate.detection.config import DetectionOptions, DetectionProtocol


@dataclass(frozen=True, kw_only=True)
class Detect(EvaluationFlags):
    """Fine-tune Faster R-CNN R50-C4 on VOC07+12 or COCO from a backbone, and report AP, AP50 and AP75.

    The published config of MoCo, unless flags say otherwise; boxes alone, no masks. The same command continues a killed
    one.
    """

    data: Path
    """voc: the VOCdevkit folder (VOC2007/, VOC2012/). coco: the folder with annotations/, train2017/ and val2017/."""
    protocol: Annotated[DetectionProtocol, Flattened] = field(default_factory=DetectionProtocol)
    options: Annotated[DetectionOptions, Flattened] = field(default_factory=DetectionOptions)

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.evaluate.detection import run_detection

        _, values = run_detection.run(self.weights, self.data, self.protocol, self.options, console=console)
        if values:
            say(console, _sentence(values, self.protocol.dataset))
        return values


def _sentence(values: dict[str, Any], dataset: str) -> str:
    if not values["complete"]:
        return f"stopped at iteration {values['iteration']:,} as asked; the same command without the limit continues"

    def shown(name: str) -> str:
        return "undefined" if values[name] is None else f"{values[name]:.2f} %"

    text = f"AP {shown('AP')}, AP50 {shown('AP50')}, AP75 {shown('AP75')} (COCO's definition"
    if dataset == "voc":
        text += (
            f"); by VOC2007's 11 points, as detectron2 and MoCo report: AP {shown('AP_11point')}, "
            f"AP50 {shown('AP50_11point')}, AP75 {shown('AP75_11point')} ("
        )
    else:
        text += "; "
    of_all = "" if values["whole_test_set"] else ", a part of the set alone"
    return f"{text}{values['test_images']:,} test images{of_all})"

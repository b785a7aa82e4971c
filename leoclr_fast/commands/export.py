"""`leoclr-fast export`: weights for other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, say


@dataclass(frozen=True, kw_only=True)
class Export(CommonFlags):
    """Write a backbone for torchvision, timm, detectron2 or as safetensors; it is loaded back and compared."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """The --out of a pretrain (final weights, else the newest checkpoint), or a .safetensors file."""
    to: Literal["torchvision", "timm", "safetensors", "detectron2"]
    """The library that will load it: .pth, .safetensors, .safetensors or .pkl."""
    out: Path
    """The new file."""

    def run(self, console: Console) -> dict[str, Any]:
        from leoclr_fast.weights.export import export

        result = export(self.weights, self.to, self.out)
        say(
            console,
            f"{result['out']} holds {result['weights']} for {self.to}. Loaded back by {result['reader']}, its features "
            f"differ by {result['difference']:.1e} of the largest (allowed {result['tolerance']:.1e}). Load it by:",
        )
        say(console, result["usage"])
        return result

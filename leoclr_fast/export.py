"""Where weights are read and written was moved to `leoclr_fast.weights`; these two names are still found here."""

from leoclr_fast.weights.backbone_file import save_backbone
from leoclr_fast.weights.pretrained import load_backbone

__all__ = ["load_backbone", "save_backbone"]

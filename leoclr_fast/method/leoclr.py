"""LeOCLR (Alkhalefi, Leontidis, Zhong, TMLR 2024)."""

from __future__ import annotations

from leoclr_fast.method.momentum_contrast import MomentumContrast
from pipelines.views import LEOCLR_VIEWS


class LeOCLR(MomentumContrast):
    """The uncropped original is the query; two random crops of it are its keys (Algorithm 1 of the paper)."""

    title = "LeOCLR"
    views = LEOCLR_VIEWS
    baseline = "mocov2"
    num_forwards = 5

"""MoCo-v2 (Chen, Fan, Girshick, He 2020)."""

from __future__ import annotations

from leoclr_fast.method.momentum_contrast import MomentumContrast
from pipelines.views import MOCOV2_VIEWS


class MoCoV2(MomentumContrast):
    """One random crop is the query, another one its key."""

    title = "MoCo-v2"
    views = MOCOV2_VIEWS
    num_forwards = 4

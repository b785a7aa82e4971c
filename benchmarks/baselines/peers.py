"""Peers to run beside ours: MoCo-v2 as it was published, and as lightly has it, on our batches."""

from benchmarks.baselines.lightly_mocov2 import LightlyMoCoV2
from benchmarks.baselines.published_mocov2 import PublishedMoCoV2

PEERS = {peer.name: peer for peer in (PublishedMoCoV2, LightlyMoCoV2)}
"""Name -> method under test, for `bench train-time --peers`."""

"""The peers compute what ours computes: with batch-norm over the whole batch, the three MoCo-v2 are one algorithm."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from benchmarks.baselines.mocov2_peer import MoCoV2Peer
from benchmarks.baselines.peers import PEERS, LightlyMoCoV2, PublishedMoCoV2
from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.bench.rounds import SYNTHETIC, OurMethod, open_batches, training_images
from leoclr_fast.config import SpeedConfig
from pipelines.batch import CropBatch
from pipelines.views import MOCOV2_VIEWS

# Four batches fill the queue, so five steps go through its wrap.
SETTING = BenchSetting(
    recipe="leoclr_demo",
    batch_size=8,
    queue_size=32,
    image_size=16,
    width_multiplier=0.0625,
    key_batchnorm="plain",
)
FP64 = SpeedConfig(device="cpu", precision="fp64")
CPU = torch.device("cpu")
STEPS = 6


def batches() -> list[CropBatch]:
    result = SETTING.result("mocov2")
    split = training_images(None, result)
    with open_batches(split, [MOCOV2_VIEWS], result, SYNTHETIC, CPU) as (feeds, _):
        return list(islice(feeds[MOCOV2_VIEWS], STEPS))


def copy_of_ours(peer: MoCoV2Peer, ours: OurMethod) -> None:
    """Give a peer our weights and our queue."""
    encoder, queue = ours.training.method.query_encoder, ours.training.method.queue.keys
    if isinstance(peer, PublishedMoCoV2):
        for network in (peer._query_encoder, peer._key_encoder):
            network[0].load_state_dict(encoder.backbone.state_dict())
            network[1].load_state_dict(encoder.projection_head.state_dict())
        peer._queue.keys.copy_(queue.T)
    elif isinstance(peer, LightlyMoCoV2):
        for backbone, head in ((peer._backbone, peer._head), (peer._key_backbone, peer._key_head)):
            backbone.load_state_dict(encoder.backbone.state_dict())
            head.layers.load_state_dict(encoder.projection_head.state_dict())
        peer._criterion.memory_bank.bank.copy_(queue)


@pytest.mark.parametrize("name", list(PEERS))
def test_the_same_losses_and_weights_as_ours(name: str, monkeypatch: pytest.MonkeyPatch):
    if name == LightlyMoCoV2.name:
        pytest.importorskip("lightly")
    ours = OurMethod("mocov2", SETTING, FP64, CPU)
    peer = PEERS[name](SETTING, FP64, CPU)
    copy_of_ours(peer, ours)
    losses: list[float] = []
    monkeypatch.setattr(peer, "after_step", lambda loss: losses.append(loss.item()))
    expected = []
    for batch in batches():
        peer.step(batch)
        expected.append(float(ours._step(batch, ours._lr)[0]))
    assert losses == pytest.approx(expected, rel=1e-9)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)
    encoder = ours.training.method.query_encoder
    for mine, theirs in zip(encoder.parameters(), peer.trained_parameters(), strict=True):
        torch.testing.assert_close(theirs.detach(), mine.detach(), rtol=1e-8, atol=1e-10)


def test_the_published_queue_does_not_wrap():
    with pytest.raises(ValueError, match="36 keys are no multiple of the batch size 8"):
        PublishedMoCoV2(BenchSetting(recipe="leoclr_demo", batch_size=8, queue_size=36, image_size=16), FP64, CPU)


def test_lightly_missing_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "lightly.loss", None)
    with pytest.raises(ImportError, match=r"pip install 'leoclr-fast\[peers\]'"):
        LightlyMoCoV2(SETTING, FP64, CPU)

"""On CPU cores: our MoCo-v2 step against lightly's and the published loop's, and the one-pass loss against two cross
entropies, as `bench train-time --peers` and `benchmarks.kernels` time them. `python -m benchmarks.peers_cpu --help`

The step: the same network (torchvision's ResNet), the same crops and the same augmentation on all sides (ours, and it
is timed with the step), the same SGD, queue, batch and number of threads, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.baselines.peers import PEERS
from benchmarks.kernels import LossBenchConfig, bench_loss, loss_markdown
from benchmarks.results import RESULTS, Results, made_with
from leoclr_fast.bench.config import BenchSetting, RoundsConfig, TrainTimeConfig
from leoclr_fast.bench.train_time import bench_train_time, train_time_markdown
from leoclr_fast.config import SpeedConfig
from leoclr_fast.run.environment import environment

_Flattened = tyro.conf.arg(name="")
_SETTING = BenchSetting(
    recipe="mocov2_imagenet_200ep",
    arch="resnet18",
    image_size=96,
    batch_size=64,
    key_batchnorm="plain",
    query_batchnorm="plain",
)
"""Plain batch-norm is what the peers compute on one device: over the whole shuffled batch."""


@dataclass(frozen=True, kw_only=True)
class PeersBenchmark:
    """Our MoCo-v2 step and our loss against their peers, on CPU cores."""

    parts: tuple[Literal["step", "loss"], ...] = ("step", "loss")
    threads: int | None = None
    """Of all sides; torch's default if not given."""
    setting: Annotated[BenchSetting, _Flattened] = _SETTING
    rounds: Annotated[RoundsConfig, _Flattened] = field(
        default_factory=lambda: RoundsConfig(rounds=11, steps=3, lead_steps=1, warmup_steps=2, max_s=1e8)
    )
    loss: LossBenchConfig = field(default_factory=lambda: LossBenchConfig(rounds=33, device="cpu"))
    name: str = "peers_cpu"
    """Of the result files."""
    out: Path = RESULTS

    def run(self) -> None:
        """Measure, and write the result files."""
        if self.threads:
            torch.set_num_threads(self.threads)
        results = Results(module="benchmarks.peers_cpu", name=self.name, out=self.out)
        document: dict[str, Any] = {"environment": environment(torch.device("cpu"), 1)}
        pages = [f"`{results.command}`; {made_with(document['environment'], 'lightly')}\n"]
        for part in self.parts:
            if part == "step":
                config = TrainTimeConfig(methods=tuple({peer.peer_of for peer in PEERS.values()}), peers=True)
                speed = SpeedConfig(device="cpu")
                document[part] = bench_train_time(config, self.rounds, self.setting, speed, say=results.say)
                pages.append(train_time_markdown(document[part]))
            else:
                document[part] = bench_loss(self.loss)
                pages.append(loss_markdown(document[part]))
            results.write(document, "\n".join(pages))
        print("\n".join(pages))


if __name__ == "__main__":
    tyro.cli(PeersBenchmark).run()

"""On CPU cores: our MoCo-v2 step against lightly's and the published loop's, and the one-pass loss against two cross
entropies. `python -m benchmarks.peers_cpu --help`.

Both parts run in one process, in turns, with the same number of threads, in float32. The step: the same network
(torchvision's ResNet), the same crops and the same augmentation on all sides (ours, and it is timed with the step), the
same SGD, queue and batch. Written: NAME.json (all times, command, environment), NAME.md and NAME.log.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import PEERS
from leoclr_fast.bench.contestant import Contestant, OurMethod
from leoclr_fast.bench.feeds import open_feeds, training_images
from leoclr_fast.bench.setting import BenchSetting, setting_header
from leoclr_fast.bench.statistics import median_interval, quantiles
from leoclr_fast.bench.tables import markdown_table, spread
from leoclr_fast.bench.turns import prepare, take_turns
from leoclr_fast.bench.turns_config import TurnsConfig
from leoclr_fast.config import SpeedConfig
from leoclr_fast.losses.info_nce import info_nce
from leoclr_fast.run.environment import environment
from pipelines.config import LoaderConfig
from pipelines.views import MOCOV2_VIEWS

CPU = torch.device("cpu")
OURS, TWO = "ours, one pass", "two cross entropies"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSetting:
    """Legend: B queries, K negatives, D dimensions; two positives of each query."""

    B: int = 256
    K: int = 65_536
    D: int = 128
    temperature: float = 0.2


def compare_steps(setting: BenchSetting, rounds: int, steps: int, say: Say) -> dict[str, Any]:
    """Step times of our MoCo-v2 and of the peers in every round, and our speed over each peer's: median, low, high."""
    result, speed = setting.result("mocov2"), SpeedConfig(device="cpu", precision="fp32")
    makers: dict[str, Callable[[], Contestant]] = {"ours": partial(OurMethod, "mocov2", setting, speed, CPU)}
    makers |= {name: partial(peer, setting, speed, CPU) for name, peer in PEERS.items()}
    config = TurnsConfig(rounds=rounds, steps=steps, lead_steps=1, warmup_steps=2, max_s=float("inf"))
    split = training_images(None, result)
    with open_feeds(split, [MOCOV2_VIEWS], result, LoaderConfig(name="synthetic"), CPU) as (feeds, _):
        contestants = [prepare(make, feeds, CPU, steps=1).contestant for make in makers.values()]
        turns = take_turns(contestants, feeds, CPU, config, say)
    times = {name: [turn.step_ms for turn in own] for name, own in zip(makers, turns, strict=True)}
    return {
        "header": setting_header(result, speed, CPU),
        "steps_per_turn": steps,
        "times_ms": times,
        "speedups": {peer: _speedup(times["ours"], times[peer]) for peer in PEERS},
    }


def compare_losses(setting: LossSetting, rounds: int, calls: int, say: Say) -> dict[str, Any]:
    """Forward and backward of LeOCLR's loss, in one pass and as two cross entropies over concatenated logits.

    Raises RuntimeError if the two do not agree, in value or gradient.
    """
    generator = torch.Generator().manual_seed(0)
    query, first, second, queue = (
        F.normalize(torch.randn(rows, setting.D, generator=generator), dim=1)
        for rows in (setting.B, setting.B, setting.B, setting.K)
    )
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda leaf: info_nce(leaf, (first, second), queue, setting.temperature, "auto"),
        TWO: lambda leaf: sum_of_cross_entropies(leaf, (first, second), queue, setting.temperature),
    }
    outcomes = {name: _value_and_gradient(loss, query) for name, loss in losses.items()}  # the warm-up, too
    for one, two in zip(outcomes[OURS], outcomes[TWO], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds):
        for name in losses if number % 2 == 0 else reversed(losses):
            start = time.perf_counter()
            for _ in range(calls):
                _value_and_gradient(losses[name], query)
            times[name].append(1000 * (time.perf_counter() - start) / calls)
            say(f"round {number + 1}/{rounds}: {name} {times[name][-1]:.1f} ms")
    return {
        "header": f"B = {setting.B}, K = {setting.K:,}, D = {setting.D}, two positives, float32, forward + backward, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "calls_per_turn": calls,
        "times_ms": times,
        "speedups": {TWO: _speedup(times[OURS], times[TWO])},
    }


def sum_of_cross_entropies(query: Tensor, keys: tuple[Tensor, ...], queue: Tensor, temperature: float) -> Tensor:
    """Eq. 2 of the paper as one would extend MoCo-v2's loss to it: each key's logit beside logits of the queue."""
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)
    total = query.new_zeros(())
    for key in keys:
        positive = torch.einsum("bd,bd->b", query, key)[:, None]  # [B, 1]
        negative = torch.einsum("bd,kd->bk", query, queue)  # [B, K]
        total = total + F.cross_entropy(torch.cat([positive, negative], dim=1) / temperature, labels)
    return total


def _value_and_gradient(loss: Callable[[Tensor], Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    leaf = query.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def _speedup(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as fast as theirs ours is, pair by pair."""
    return median_interval([their / mine for mine, their in zip(ours, theirs, strict=True)])


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [
        "# MoCo-v2 and the loss against their peers, on CPU cores",
        "",
        f"`{document['command']}`; {where['cpu']}, {document['threads']} threads; {versions}.",
        "",
        f"Medians of {document['rounds']} interleaved rounds; of a time [20 %, 80 %], of a ratio its 95 % bootstrap "
        "interval. The step includes the augmentation, which is ours on all sides; nothing is read or decoded. Ours "
        "runs channels-last, as it does by default, the peers in NCHW, as they do.",
    ]
    for part, title in (("step", "A MoCo-v2 step"), ("loss", "LeOCLR's loss, forward + backward")):
        if part not in document:
            continue
        measured = document[part]
        rows = []
        for name, times in measured["times_ms"].items():
            time_ms = quantiles(times)
            ratio = measured["speedups"].get(name)
            cell = "" if ratio is None else f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            rows.append((name, spread(time_ms["median"], time_ms["q20"], time_ms["q80"]), cell))
        table = markdown_table(("contestant", "ms", "ours is so many times as fast"), rows)
        lines += ["", f"## {title}", "", f"{measured['header']}.", "", table.rstrip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the result files."""
    flags = _parse()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    log: list[str] = []

    def say(line: str) -> None:
        log.append(line)
        print(line, flush=True)

    flags.out.mkdir(parents=True, exist_ok=True)
    surroundings = environment(CPU, 1)
    document: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.peers_cpu", *sys.argv[1:]]),
        "rounds": flags.rounds,
        "threads": torch.get_num_threads(),
        "environment": surroundings,
        "versions": {"python": surroundings["python"]} | _versions("torch", "torchvision", "lightly", "numba", "numpy"),
    }
    setting = BenchSetting(
        recipe="mocov2_imagenet_200ep",
        arch=flags.arch,
        stem=flags.stem,
        image_size=flags.image_size,
        batch_size=flags.batch_size,
        queue_size=flags.queue_size,
        key_batchnorm=flags.key_batchnorm,
    )
    for part in flags.parts:
        if part == "step":
            document[part] = compare_steps(setting, flags.rounds, flags.steps, say)
        else:
            document[part] = compare_losses(
                LossSetting(B=flags.loss_batch_size, K=flags.loss_queue_size), flags.rounds, flags.calls, say
            )
        (flags.out / f"{flags.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (flags.out / f"{flags.name}.md").write_text(page(document))
        (flags.out / f"{flags.name}.log").write_text("\n".join([f"$ {document['command']}", *log]) + "\n")
    print(page(document))


def _versions(*packages: str) -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in packages}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers_cpu", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("step", "loss"), default=["step", "loss"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="of all contestants; torch's default if not given")
    parser.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18")
    parser.add_argument("--stem", choices=("imagenet", "small"), default="imagenet")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--queue-size", type=int, default=65_536)
    parser.add_argument(
        "--key-batchnorm",
        choices=("split", "plain"),
        default="plain",
        help="of ours; plain is what the peers compute on one device: over the whole shuffled batch",
    )
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--loss-batch-size", type=int, default=256)
    parser.add_argument("--loss-queue-size", type=int, default=65_536)
    parser.add_argument("--calls", type=int, default=3, help="of the loss, in a turn")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="peers_cpu", help="of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()

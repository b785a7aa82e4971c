"""Sections `train-time`, `step`, `loss` and `augment`: the benchmarks as `leoclr-fast bench` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig
from benchmarks.kernels import (
    AugmentBenchConfig,
    LossBenchConfig,
    augment_markdown,
    bench_augment,
    bench_loss,
    loss_markdown,
)
from benchmarks.step import StepBenchConfig, bench_step, step_table
from leoclr_fast.bench.config import RoundsConfig, TrainTimeConfig
from leoclr_fast.bench.train_time import bench_train_time, train_time_markdown
from leoclr_fast.distributed.process_group import resolve_device


def run_train_time(config: SuiteConfig, say: Say) -> Answer:
    """Our methods and the two peers in turn, on synthetic images."""
    document = bench_train_time(
        TrainTimeConfig(peers=True), rounds_of(config, rounds=9), config.setting, config.speed(), say=say
    )
    return Answer(result=document, markdown=without_title(train_time_markdown(document)))


def run_step(config: SuiteConfig, say: Say) -> Answer:
    """The parts of a step, in bf16 and in fp16 (on a CPU in fp32)."""
    precisions = ("bf16", "fp16") if _on_gpu(config) else ("fp32",)
    bench = StepBenchConfig(
        repeats=3 if config.tiny else 20,
        warmup=1 if config.tiny else 3,
        max_s=config.soft_limit_s / len(precisions),
    )
    return _of_each(
        precisions,
        lambda precision: bench_step(bench, config.setting, config.speed(precision), say),
        lambda document: f"{document['header']}\n\n{step_table(document['rows'])}",
        config,
        say,
    )


def run_loss(config: SuiteConfig, say: Say) -> Answer:
    """LeOCLR's loss at B = 256, K = 65,536: in fp32, as in training, and on a GPU in bf16 too."""
    sizes: dict[str, Any] = {"batch_size": 16, "queue_size": 507, "rounds": 3} if config.tiny else {"rounds": 30}
    return _of_each(
        ("fp32", "bf16") if _on_gpu(config) else ("fp32",),
        lambda precision: bench_loss(LossBenchConfig(precision=precision, device=config.device, **sizes)),
        lambda document: without_title(loss_markdown(document)),
        config,
        say,
    )


def run_augment(config: SuiteConfig, say: Say) -> Answer:
    """LeOCLR's three views of 256 images of 224 pixels, in the suite's precision (on a CPU in fp32)."""
    sizes: dict[str, Any] = {"batch_size": 8, "image_size": 32, "rounds": 3} if config.tiny else {"rounds": 20}
    document = bench_augment(AugmentBenchConfig(precision=config.precision, device=config.device, **sizes))
    page = without_title(augment_markdown(document))
    say(page)
    return Answer(result=document, markdown=page)


def rounds_of(config: SuiteConfig, *, rounds: int) -> RoundsConfig:
    """How long the suite trains methods in turn."""
    if config.tiny:
        return RoundsConfig(rounds=2, steps=2, lead_steps=1, warmup_steps=1, max_s=config.soft_limit_s)
    return RoundsConfig(rounds=rounds, steps=10, max_s=config.soft_limit_s)


def without_title(page: str) -> str:
    """A page without its first heading."""
    return page.split("\n", 2)[2]


def _of_each(
    precisions: Iterable[str],
    bench: Callable[[Any], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
    config: SuiteConfig,
    say: Say,
) -> Answer:
    """Precision -> document, kept after every one."""
    documents: dict[str, Any] = {}
    pages = []
    for precision in precisions:
        documents[precision] = bench(precision)
        pages.append(page(documents[precision]))
        say(pages[-1])
        answer = Answer(result=dict(documents), markdown="\n".join(pages))
        config.keep(answer)
    return answer


def _on_gpu(config: SuiteConfig) -> bool:
    return resolve_device(config.device).type == "cuda"

"""Sections `loss` and `augment`: the benchmarks of the two kernels, as `leoclr-fast bench` runs them."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig
from leoclr_fast.bench.augment import augment_markdown, bench_augment
from leoclr_fast.bench.loss import bench_loss, loss_markdown
from leoclr_fast.bench.setting import bench_device


def run_loss(config: SuiteConfig, say: Say) -> Answer:
    """LeOCLR's loss at B = 256, K = 65,536: in fp32, as in training, and on a GPU in bf16 too."""
    device = bench_device(config.speed())
    documents: dict[str, Any] = {}
    pages = []
    for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
        document = bench_loss(
            batch_size=16 if config.tiny else 256,
            queue_size=507 if config.tiny else 65_536,
            dim=128,
            positives=2,
            temperature=0.2,
            precision=precision,
            device=device,
            rounds=3 if config.tiny else 30,
        )
        documents[precision] = document
        pages.append(_without_title(loss_markdown(document)))
        say(pages[-1])
        answer = Answer(result=dict(documents), markdown="\n".join(pages))
        config.keep(answer)
    return answer


def run_augment(config: SuiteConfig, say: Say) -> Answer:
    """LeOCLR's three views of 256 images of 224 pixels, in the suite's precision (on a CPU in fp32)."""
    document = bench_augment(
        method="leoclr",
        batch_size=8 if config.tiny else 256,
        image_size=32 if config.tiny else 224,
        precision=config.precision,
        device=bench_device(config.speed()),
        rounds=3 if config.tiny else 20,
    )
    page = _without_title(augment_markdown(document))
    say(page)
    return Answer(result=document, markdown=page)


def _without_title(page: str) -> str:
    return page.split("\n", 2)[2]

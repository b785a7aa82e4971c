"""Sections `step` and `train-time`: the benchmarks of training, as `leoclr-fast bench` runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig
from leoclr_fast.bench.step import StepBenchConfig, bench_step, step_table
from leoclr_fast.bench.train_time import TrainTimeConfig, bench_train_time
from leoclr_fast.bench.train_time_report import train_time_markdown
from leoclr_fast.bench.turns_config import TurnsConfig
from leoclr_fast.distributed.process_group import resolve_device


def run_step(config: SuiteConfig, say: Say) -> Answer:
    """The parts of a step, in bf16 and in fp16 (on a CPU in fp32)."""
    on_gpu = resolve_device(config.device).type == "cuda"
    precisions = ("bf16", "fp16") if on_gpu else ("fp32",)
    documents: dict[str, Any] = {}
    parts = []
    for precision in precisions:
        document = bench_step(
            StepBenchConfig(
                setting=config.setting,
                speed=config.speed(precision),
                repeats=3 if config.tiny else 20,
                warmup=1 if config.tiny else 3,
                max_s=config.soft_limit_s / len(precisions),
            ),
            say,
        )
        documents[precision] = document
        parts += [f"{document['header']}\n\n{step_table(document['rows'])}"]
        answer = Answer(result=dict(documents), markdown="\n".join(parts))
        config.keep(answer)
    return answer


def run_train_time(config: SuiteConfig, say: Say) -> Answer:
    """LeOCLR, MoCo-v2 and the two peers in turns, on synthetic images."""
    turns = (
        TurnsConfig(rounds=2, steps=2, lead_steps=1, warmup_steps=1) if config.tiny else TurnsConfig(rounds=9, steps=10)
    )
    document = bench_train_time(
        TrainTimeConfig(
            setting=config.setting,
            speed=config.speed(),
            turns=replace(turns, max_s=config.soft_limit_s),
            peers=True,
        ),
        data=None,
        say=say,
    )
    page = train_time_markdown(document)
    return Answer(result=document, markdown=page.split("\n", 2)[2])

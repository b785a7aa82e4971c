"""The sections of the suite, what they are given, and what they answer. Nothing here needs torch, so that a section's
process starts at once.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dataset_tools.files import write_file
from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.config import ResultConfig, SpeedConfig
from leoclr_fast.recipes import get_recipe

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a section found."""

    result: dict[str, Any]
    """Plain JSON."""
    markdown: str
    """The same for people, without a heading."""


class UnavailableError(RuntimeError):
    """A section cannot run here; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteConfig:
    """The same for all sections."""

    device: str = "auto"
    tiny: bool = False
    """Sizes that a CPU gets through in seconds: to see that everything works, not to measure."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of train-time, profile and cifar10; step measures bf16 and fp16."""
    data: Path | None = None
    """CIFAR-10, in any form that pretrain reads."""
    photographs: Path | None = None
    """JPEGs as large as a view or larger, in any form that pretrain reads; `data` if not given."""
    epochs: int = 8
    """Of the pretraining on it."""
    soft_limit_s: float = 60.0
    """Within which the section should come to an end by itself."""
    keep: Callable[[Answer], None] = print
    """Is given what has been found so far, after every part: it stands if the section is stopped before its end."""

    @property
    def setting(self) -> BenchSetting:
        """ResNet-50, 224 pixels, batch 256, K = 65,536; or the tiny one."""
        if not self.tiny:
            return BenchSetting()
        return BenchSetting(recipe="leoclr_demo", batch_size=16, queue_size=256)

    @property
    def result(self) -> ResultConfig:
        """The setting for the recipe's own method."""
        return self.setting.result(get_recipe(self.setting.recipe).result.method.name)

    def speed(self, precision: Literal["fp32", "bf16", "fp16"] | None = None) -> SpeedConfig:
        """As `pretrain` would run it."""
        return SpeedConfig(device=self.device, precision=precision or self.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the suite, run in a process of its own."""

    title: str
    function: str
    """Module in this folder and function: (SuiteConfig, say) -> Answer. It is imported in the section's process only,
    so that one broken part stops no other."""
    limit_s: float
    """It is stopped then; what earlier sections left of theirs is added. All limits together, and a start of the
    machine: fifteen minutes. The first to compile a ResNet-50 has the time for it; the others find it in the cache."""


SECTIONS = {
    "machine": Section(title="Machine", function="machine.run", limit_s=15),
    "tests": Section(title="Tests that need a GPU", function="gpu_tests.run", limit_s=150),
    "decoders": Section(title="The first batches of real images", function="loaders.run_parity", limit_s=40),
    "train-time": Section(title="LeOCLR next to MoCo-v2", function="benches.run_train_time", limit_s=260),
    "profile": Section(title="Profile of a step", function="step_profile.run", limit_s=50),
    "loaders": Section(title="Real images", function="loaders.run", limit_s=80),
    "step": Section(title="A step and its parts", function="benches.run_step", limit_s=80),
    "loss": Section(title="The loss", function="benches.run_loss", limit_s=25),
    "augment": Section(title="The augmentation", function="benches.run_augment", limit_s=20),
    "cifar10": Section(title="A short pretraining on CIFAR-10", function="cifar10.run", limit_s=50),
}
"""In the order in which they run: first what is most likely to be wrong, so that four minutes already tell most."""


def run_section(name: str, config: SuiteConfig, result_file: Path, log: Path) -> None:
    """In the process of a section: write its result, whatever comes; what it says goes to the log."""
    os.setsid()
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    answer: dict[str, Any] = {}

    def keep(found: Answer) -> None:
        answer.update(status="unfinished", result=found.result, markdown=found.markdown)
        write_file(result_file, json.dumps(answer))

    try:
        module, _, function = SECTIONS[name].function.rpartition(".")
        run = getattr(importlib.import_module(f"benchmarks.gpu_suite.{module}"), function)
        keep(run(replace(config, keep=keep), lambda line: print(line, flush=True)))
        answer["status"] = "done"
    except UnavailableError as error:
        answer |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # the other sections shall still run, and the page say what happened
        traceback.print_exc()
        answer |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    write_file(result_file, json.dumps(answer))

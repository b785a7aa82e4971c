"""The sections of the suite, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu_suite import cifar10, gpu_tests, kernel_benches, machine, parity, step_profile, train_benches
from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the suite, run in a process of its own."""

    title: str
    run: Callable[[SuiteConfig, Say], Answer]
    limit_s: float
    """It is stopped then; what earlier sections left of theirs is added. All limits together: ten minutes."""


SECTIONS: dict[str, Section] = {
    "machine": Section(title="Machine", run=machine.run, limit_s=20),
    "tests": Section(title="Tests that need a GPU", run=gpu_tests.run, limit_s=95),
    "parity": Section(title="Parity of the kernels", run=parity.run, limit_s=50),
    "train-time": Section(title="LeOCLR next to MoCo-v2", run=train_benches.run_train_time, limit_s=150),
    "step": Section(title="A step and its parts", run=train_benches.run_step, limit_s=80),
    "loss": Section(title="The loss", run=kernel_benches.run_loss, limit_s=40),
    "augment": Section(title="The augmentation", run=kernel_benches.run_augment, limit_s=35),
    "profile": Section(title="Profile of a step", run=step_profile.run, limit_s=45),
    "cifar10": Section(title="A short pretraining on CIFAR-10", run=cifar10.run, limit_s=75),
}

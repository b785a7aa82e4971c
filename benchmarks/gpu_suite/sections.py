"""The sections of the suite, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the suite, run in a process of its own."""

    title: str
    function: str
    """Module in this folder and function: (SuiteConfig, say) -> Answer. It is imported in the section's process only,
    so that one broken part stops no other."""
    limit_s: float
    """It is stopped then; what earlier sections left of theirs is added. All limits together: ten minutes."""


SECTIONS: dict[str, Section] = {
    "machine": Section(title="Machine", function="machine.run", limit_s=15),
    "tests": Section(title="Tests that need a GPU", function="gpu_tests.run", limit_s=120),
    "parity": Section(title="Parity of the kernels", function="parity.run", limit_s=30),
    "train-time": Section(title="LeOCLR next to MoCo-v2", function="train_benches.run_train_time", limit_s=165),
    "step": Section(title="A step and its parts", function="train_benches.run_step", limit_s=70),
    "loss": Section(title="The loss", function="kernel_benches.run_loss", limit_s=25),
    "augment": Section(title="The augmentation", function="kernel_benches.run_augment", limit_s=20),
    "profile": Section(title="Profile of a step", function="step_profile.run", limit_s=35),
    "loaders": Section(title="Real images", function="loaders.run", limit_s=80),
    "cifar10": Section(title="A short pretraining on CIFAR-10", function="cifar10.run", limit_s=40),
}

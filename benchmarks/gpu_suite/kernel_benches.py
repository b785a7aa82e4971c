"""Sections `loss` and `augment`: the benchmarks of the two kernels, as `leoclr-fast bench` runs them."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig, UnavailableError


def run_loss(config: SuiteConfig, say: Say) -> Answer:
    """Every implementation of the loss at B = 256, K = 65,536."""
    return _run("loss", config, say)


def run_augment(config: SuiteConfig, say: Say) -> Answer:
    """Every implementation of the augmentation at 256 images of 224 pixels."""
    return _run("augment", config, say)


def _run(name: str, config: SuiteConfig, say: Say) -> Answer:
    if find_spec(f"leoclr_fast.bench.{name}") is None:
        raise UnavailableError(f"there is no leoclr_fast.bench.{name} yet")
    raise UnavailableError("not connected yet")

"""Evaluations under torchrun, two ranks on one CPU with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.leoclr_fast.evaluated import evaluated, kept_results, pretrained_run

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("evaluated") / "run", tiny_data)


def on_two_ranks(*arguments: object) -> dict[str, Any]:
    """The JSON of a command under torchrun."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "leoclr_fast",
    ]
    done = subprocess.run(
        [*torchrun, *map(str, arguments), "--device=cpu", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "another rank than the first has spoken"
    document: dict[str, Any] = json.loads(lines[0])
    return document


def test_linear_on_two_ranks_is_linear_on_one(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Every rank sees the features of all, an odd last batch too: the same classifier, up to float64's rounding."""
    arguments = ["linear", tiny_run, "--data", tiny_data, "--epochs=5", "--batch-size=13", "--precision=fp64"]
    arguments += ["--lr-grid", 0.1, 1]
    two = on_two_ranks(*arguments, "--out", tmp_path / "two")
    assert two["world_size"] == 2
    one = evaluated(capsys, *arguments, "--out", tmp_path / "one")
    assert two["backbone_sha256_after"] == one["backbone_sha256_before"]
    assert (two["lr"], two["top1"], two["top5"]) == (one["lr"], one["top1"], one["top5"])
    weights = [load_file(tmp_path / name / "classifier.safetensors")["fc.weight"] for name in ("one", "two")]
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


def test_fine_tuning_on_two_ranks(tiny_data: Path, tiny_run: Path) -> None:
    """Each rank has its own batch-norm, so it is another training than one rank's; but it repeats itself."""
    arguments = ["finetune", tiny_run, "--data", tiny_data, "--percent", 100, "--epochs=3", "--batch-size=9"]
    arguments += ["--base-lr-grid", 0.1, 1]
    (first,) = on_two_ranks(*arguments, "--out", tiny_run.parent / "first")["evaluations"]
    (again,) = on_two_ranks(*arguments, "--out", tiny_run.parent / "again")["evaluations"]
    assert again == first
    assert first["world_size"] == 2
    networks = [load_file(tiny_run.parent / name / "network.safetensors") for name in ("first", "again")]
    assert all(torch.equal(networks[0][name], tensor) for name, tensor in networks[1].items())
    assert len(kept_results(tiny_run)) >= 2

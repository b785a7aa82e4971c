"""What needs no torch starts without it, and quickly."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.conftest import write_tiny_images
from tests.leoclr_fast.written_run import end, start, step_record, written_run


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables under which `import torch` fails, also in processes that a command starts."""
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    paths = [str(tmp_path / "broken"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def leoclr_fast(environment: dict[str, str], *words: object) -> tuple[str, float]:
    """What a command prints, and the CPU seconds that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "leoclr_fast", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_poison_works(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"torch was imported" in done.stderr


def test_help(environment: dict[str, str]) -> None:
    overview, cpu_s = leoclr_fast(environment, "--help")
    assert "  import-moco      Make a file of weights, which every evaluation takes" in overview
    assert cpu_s < 1
    assert "--monitor.knn-every-epochs" in leoclr_fast(environment, "pretrain", "leoclr_demo", "--help")[0]


def test_conversion(environment: dict[str, str], tmp_path: Path) -> None:
    images, part, data = write_tiny_images(tmp_path / "images"), tmp_path / "part", tmp_path / "merged"
    leoclr_fast(environment, "convert", images, part, "--format", "webdataset", "--part", "1/1", "--workers", 2)
    leoclr_fast(environment, "merge", part, data, "--workers", 1)
    printed, _ = leoclr_fast(environment, "verify", data, "--deep", "--workers", 1)
    assert printed.splitlines()[-1] == f"{data}: whole; 52 samples"
    printed, cpu_s = leoclr_fast(environment, "inspect", data, "--json")
    assert json.loads(printed.splitlines()[-1])["splits"]["train"]["samples"] == 40
    assert cpu_s < 1
    printed, _ = leoclr_fast(environment, "subset", data, "--percent", 10, "--out", tmp_path / "list")
    assert f"{tmp_path / 'list'}: 4 of 40 images" in printed


def test_watch_report_and_compare(environment: dict[str, str], tmp_path: Path) -> None:
    facts = {"method": "LeOCLR", "num_keys": 2, "baseline": "mocov2"}
    run = written_run(tmp_path / "run", [start(**facts), step_record(10), step_record(20), end(20, "paused")])
    printed, _ = leoclr_fast(environment, "watch", run, "--once", "--json")
    document = json.loads(printed.splitlines()[-1])
    assert (document["state"], document["step"]) == ("paused", 20)
    assert "report: " in leoclr_fast(environment, "report", run)[0]
    RunFolder(run).add_evaluation("linear", {"top1": 50.0, "settings": {"epochs": 100}})
    assert "| linear, top-1 | 50.00" in leoclr_fast(environment, "compare", run)[0]

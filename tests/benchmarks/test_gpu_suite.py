"""The GPU suite on a CPU: its sections at tiny sizes, its time limits, its files, what is kept of a stopped section."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_suite import gpu_tests
from benchmarks.gpu_suite.__main__ import Suite
from benchmarks.gpu_suite.gpu_tests import run_groups
from benchmarks.gpu_suite.step_profile import kind_of
from benchmarks.gpu_suite.suite_config import SECTIONS, Answer, SuiteConfig
from benchmarks.gpu_suite.targets import compare_with_targets, targets_markdown
from tests.leoclr_fast.conftest import write_tiny_images

CHECKOUT = Path(__file__).parents[2]
BLOCKED = ("tyro", "yaml", "nvidia", "ffcv", "lightly", "pynvml", "scipy", "sklearn", "pytest_timeout", "pycocotools")


def run_suite(out: Path, *flags: str, blocked: tuple[str, ...] = ()) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and Markdown of a tiny suite whose processes cannot import what is blocked."""
    startup = out / "startup"
    startup.mkdir(parents=True)
    (startup / "sitecustomize.py").write_text(f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n")
    surroundings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(startup), os.environ.get("PYTHONPATH", "")]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # else pytest itself would ask for pytest-timeout
    }
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--device", "cpu", "--tiny", "--out", str(out), *flags]
    done = subprocess.run(command, cwd=CHECKOUT, env=surroundings, capture_output=True, text=True, check=False)
    assert (out / "gpu_suite.json").is_file(), done.stderr
    return done.returncode, json.loads((out / "gpu_suite.json").read_text()), (out / "gpu_suite.md").read_text()


@pytest.mark.long
def test_without_the_packages_that_a_gpu_machine_may_lack(tmp_path: Path):
    code, document, page = run_suite(tmp_path, "--sections", "step", "tests", blocked=BLOCKED)
    sections = document["sections"]
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(
        ("machine", "tests", "step"), "done"
    )
    assert code == 0
    tests = sections["tests"]["result"]
    assert (tests["failed"], tests["passed"]) == (0, 0), [
        test for test in tests["tests"] if test["outcome"] == "failed"
    ]
    assert tests["skipped"] > 100
    assert {file["file"]: file["status"] for file in tests["files"]} == {
        file.name: "finished" for file in (CHECKOUT / "tests" / "gpu").glob("test_*.py")
    }
    assert {test["name"].split("::")[0].split(".")[0] for test in tests["tests"]} == {
        file.stem for file in (CHECKOUT / "tests" / "gpu").glob("test_*.py")
    }
    packages = sections["machine"]["result"]["packages"]
    assert not any(packages[name] for name in ("tyro", "yaml", "nvidia.dali", "ffcv", "lightly"))
    rows = sections["step"]["result"]["fp32"]["rows"]
    assert {row["method"] for row in rows} == {"leoclr", "mocov2"}
    assert document["title"] == "GPU suite: a tiny CPU run, which says nothing of GPUs"
    assert page.startswith(f"# {document['title']}\n")
    assert "There was no GPU" in page
    assert "its figures mean nothing" in page
    assert all(target["met"] is None for target in document["targets"])
    for text in (page, (tmp_path / "gpu_suite.log").read_text()):
        assert str(CHECKOUT) not in text
        assert str(tmp_path) not in text


def test_what_outlasts_its_time_is_stopped_and_the_files_are_there(tmp_path: Path):
    code, document, page = run_suite(tmp_path, "--sections", "profile", "--limit-s", "2")
    assert code == 1
    assert {section["status"] for section in document["sections"].values()} == {"stopped"}
    assert document["seconds"] < 30
    assert "were over" in page


HALF = """
import os, sys, time, types
from benchmarks.gpu_suite.suite_config import Answer

def run_loss(config, say):
    config.keep(Answer(result={"fp32": {"rows": []}}, markdown="the first half"))
    {then}

sys.modules["benchmarks.gpu_suite.benches"] = module = types.ModuleType("benches")
module.run_loss = run_loss
"""


@pytest.mark.parametrize(
    ("then", "limit_s", "status", "reason"),
    [
        pytest.param("time.sleep(600)", 20.0, "stopped", "its 20 s were over", marks=pytest.mark.long),
        ("os._exit(3)", 200.0, "failed", "it ended with code 3 and no result"),
        ("raise RuntimeError('no memory')", 200.0, "failed", "RuntimeError: no memory"),
    ],
    ids=["too long", "crash", "error"],
)
def test_the_parts_that_were_done_are_kept(
    then: str, limit_s: float, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sitecustomize.py").write_text(HALF.replace("{then}", then))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(CHECKOUT)]))
    suite = Suite(
        Namespace(
            out=tmp_path / "out", name="suite", device="cpu", precision="fp32", epochs=1, tiny=True, limit_s=limit_s,
            data=None, photographs=None, sections=["loss"],
        )
    )  # fmt: skip
    section = suite.in_a_process("loss", limit_s)
    assert (section["status"], section["result"]) == (status, {"fp32": {"rows": []}})
    assert section["reason"].startswith(reason)
    assert "what it had found by then follows" in section["reason"]
    suite.document["sections"] = {"loss": section}
    suite.write()
    assert "the first half" in (tmp_path / "out" / "suite.md").read_text()
    written = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert written["sections"]["loss"]["result"] == {"fp32": {"rows": []}}


def test_every_section_has_its_function_and_all_together_fifteen_minutes():
    """With a minute for the start of the machine."""
    for section in SECTIONS.values():
        module, _, function = section.function.rpartition(".")
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu_suite.{module}"), function))
    assert sum(section.limit_s for section in SECTIONS.values()) <= 840


def test_our_own_kernels_are_known_by_their_names():
    ahead_of_time = pytest.importorskip("benchmarks.ahead_of_time")
    kinds: dict[str, set[str]] = {}
    for case in ahead_of_time.CASES:
        kind = "loss" if case.startswith("info_nce") else "augmentation"
        kinds.setdefault(kind, set()).update(launch.kernel.__name__ for _, launch in ahead_of_time.launches(case))
    assert kinds["loss"] == {"_share_of_the_queue", "_all_shares"}
    assert len(kinds["augmentation"]) == 7
    for kind, names in kinds.items():
        assert {kind_of(name) for name in names} == {kind}


GPU_TESTS = {
    "test_quick.py": "def test_one(): pass\ndef test_two(): assert 2 == 3",
    "test_crash.py": "import os\ndef test_ends(): os._exit(5)",
    "test_slow.py": "import time\ndef test_first(): pass\ndef test_hangs(): time.sleep(600)",
    "test_later.py": "def test_never(): pass",
}


@pytest.mark.long
def test_what_crashes_or_hangs_costs_no_finished_test(tmp_path: Path):
    files = [tmp_path / name for name in GPU_TESTS]
    for file in files:
        file.write_text(GPU_TESTS[file.name])
    kept: list[Answer] = []
    answer = run_groups([[file] for file in files], limit_s=50, say=lambda _: None, keep=kept.append)
    assert {file["file"]: file["status"] for file in answer.result["files"]} == {
        "test_quick.py": "finished", "test_crash.py": "crashed", "test_slow.py": "stopped",
        "test_later.py": "not reached",
    }  # fmt: skip
    assert [(test["name"], test["outcome"]) for test in answer.result["tests"]] == [
        ("test_quick::test_one", "passed"), ("test_quick::test_two", "failed"), ("test_crash.py", "failed"),
        ("test_slow::test_first", "passed"),
    ]  # fmt: skip
    assert answer.result["tests"][2]["reason"] == "pytest ended with code 5 and no report"
    assert "Not reached: `test_later.py`." in answer.markdown
    assert "Stopped before the end: `test_slow.py`." in answer.markdown
    assert [len(answer.result["tests"]) for answer in kept] == [2, 3, 4]
    assert [file["status"] for file in kept[0].result["files"]] == ["finished", *["not reached"] * 3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_captured_step_and_the_kernels_are_tested_first(device: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def noted(groups: Any, **_: Any) -> None:
        asked.extend([file.name for file in group] for group in groups)

    monkeypatch.setattr(gpu_tests, "run_groups", noted)
    monkeypatch.setattr(gpu_tests, "resolve_device", lambda name: Namespace(type=name))
    gpu_tests.run(SuiteConfig(device=device), lambda _: None)
    names = [name for group in asked for name in group]
    assert names[:2] == ["test_captured_step.py", "test_triton_kernels.py"]
    assert len(names) == len(set(names)) == len(list((CHECKOUT / "tests" / "gpu").glob("test_*.py")))
    assert len(asked) == (1 if device == "cpu" else len(names))


def test_targets_are_compared_only_by_what_a_gpu_measured():
    def row(method: str, rate: float) -> dict[str, Any]:
        return {"method": method, "data": "synthetic", "images_per_s": rate}

    results: dict[str, Any] = {
        "machine": {"gpu": {"name": "NVIDIA H200"}},
        "tests": {"passed": 5, "failed": 0, "files": [{"file": "test_a.py", "status": "finished"}]},
        "loaders": {"real_over_synthetic": {"leoclr": 1.02}, "jpeg_fraction": 1.0, "median_shorter_side": 334},
        "decoders": {"parity": [{"loader": "nvjpeg", "ok": False}], "too_far_off": 1},
        "train-time": {
            "rows": [row("leoclr", 3500.0), row("mocov2", 4400.0)],
            "ratio_synthetic": {"median": 1.26},
            "speedups": {"synthetic": {"published MoCo-v2 loop": {"median": 2.4}}},
        },
        "profile": {"shares": {"augmentation": 0.025}},
        "loss": {
            "fp32": {
                "rows": [
                    {"impl": "eager", "graph_ms": 0.5, "peak_extra_mib": 128.0},
                    {"impl": "compiled", "graph_ms": 0.3, "peak_extra_mib": 64.0},
                    {"impl": "triton", "graph_ms": 0.2, "peak_extra_mib": 21.0},
                ]
            }
        },
    }
    rows = compare_with_targets(results, tiny=False)
    assert [row["met"] for row in rows] == [True, True, False, True, True, False, True, False, True]
    assert rows[4]["reached"] == pytest.approx(1.5)
    assert compare_with_targets(results | {"profile": {}}, tiny=False)[3]["why_not"] == "its section has no result"
    assert "**missed**" in targets_markdown(rows)

    def changed(section: str, **changes: Any) -> list[Any]:
        """What is said of the last three targets."""
        rows = compare_with_targets(results | {section: results[section] | changes}, tiny=False)[6:]
        return [row["met"] if row["why_not"] is None else row["why_not"] for row in rows]

    cut = [{"file": "test_a.py", "status": "finished"}, {"file": "test_b.py", "status": "stopped"}]
    assert changed("tests", passed=0) == [True, False, "no test ran"]
    assert changed("tests", files=cut) == [True, False, "not run to the end: test_b.py"]
    assert changed("tests", files=cut, failed=1) == [True, False, False]
    assert changed("loaders", real_over_synthetic={"leoclr": 1.04}) == [False, False, True]
    assert changed("loaders", jpeg_fraction=0.5) == ["not all images were JPEGs", False, True]
    assert changed("decoders", parity=[], too_far_off=0) == [True, "no loader could be compared", True]
    assert "smaller than a view of 224 pixels" in changed("loaders", median_shorter_side=32)[0]
    for uncompared in (
        compare_with_targets(results, tiny=True),
        compare_with_targets(results | {"machine": {"gpu": None}}, tiny=False),
    ):
        assert {row["met"] for row in uncompared} == {None}


@pytest.mark.long
def test_every_section_at_tiny_sizes(tmp_path: Path):
    data = write_tiny_images(tmp_path / "data", num_train=96, num_val=24)
    code, document, page = run_suite(tmp_path / "out", "--data", str(data))
    assert code == 0
    assert list(document["sections"]) == list(SECTIONS)
    assert {section["status"] for section in document["sections"].values()} == {"done"}
    for section in SECTIONS.values():
        assert f"## {section.title}" in page
    results = {name: section["result"] for name, section in document["sections"].items()}
    parity_rows = results["decoders"]["parity"]
    assert (results["decoders"]["images"], results["decoders"]["jpeg_fraction"]) == (96, 0.0)  # they are PNGs
    assert all(row["ok"] and not row["unequal"] for row in parity_rows)
    assert "resident" in {row["loader"] for row in parity_rows}
    assert "- nvjpeg on data: nvJPEG decodes on a GPU, not on cpu" in page
    rows = results["loaders"]["train_time"]["rows"]
    assert {(row["method"], row["data"]) for row in rows} == set(product(("leoclr", "mocov2"), ("synthetic", "real")))
    step_ms = {row["data"]: row["step_ms"] for row in rows if row["method"] == "leoclr"}
    ratio = results["loaders"]["real_over_synthetic"]["leoclr"]
    assert ratio == pytest.approx(step_ms["real"] / step_ms["synthetic"])
    assert results["loaders"]["loader"] not in ("resident", "synthetic")
    assert set(results["cifar10"]["curves"]) == {"leoclr_cifar10", "mocov2_cifar10"}
    for curve in results["cifar10"]["curves"].values():
        assert [point["epoch"] for point in curve] == [0, 1]
        assert all(0 <= point["knn_top1"] <= 100 for point in curve)
        assert curve[1]["loss"] > 0

"""The GPU suite on a CPU: its sections at tiny sizes, its time limits, its files."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.gpu_suite import cifar10, parity
from benchmarks.gpu_suite.gpu_tests import outcomes
from benchmarks.gpu_suite.sections import SECTIONS
from benchmarks.gpu_suite.step_profile import kind_of
from benchmarks.gpu_suite.suite_config import SuiteConfig, UnavailableError
from benchmarks.gpu_suite.targets import judge, targets_markdown
from tests.leoclr_fast.conftest import write_tiny_images

CHECKOUT = Path(__file__).parents[2]
BLOCKED = ("tyro", "yaml", "nvidia", "ffcv", "lightly", "pynvml")


def run_suite(out: Path, *flags: str, blocked: tuple[str, ...] = ()) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and Markdown of a tiny suite whose processes cannot import what is blocked."""
    startup = out / "startup"
    startup.mkdir(parents=True)
    (startup / "sitecustomize.py").write_text(f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n")
    path = os.pathsep.join([str(startup), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--device", "cpu", "--tiny", "--out", str(out), *flags]
    done = subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert (out / "gpu_suite.json").is_file(), done.stderr
    return done.returncode, json.loads((out / "gpu_suite.json").read_text()), (out / "gpu_suite.md").read_text()


def test_without_the_packages_that_a_gpu_machine_may_lack(tmp_path: Path):
    code, document, page = run_suite(tmp_path, "--sections", "step", blocked=BLOCKED)
    sections = document["sections"]
    assert {name: section["status"] for name, section in sections.items()} == {"machine": "done", "step": "done"}
    assert code == 0
    packages = sections["machine"]["result"]["packages"]
    assert not any(packages[name] for name in ("tyro", "yaml", "nvidia.dali", "ffcv", "lightly"))
    rows = sections["step"]["result"]["fp32"]["rows"]
    assert {row["method"] for row in rows} == {"leoclr", "mocov2"}
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


@pytest.mark.parametrize("section", list(SECTIONS))
def test_every_section_has_its_function(section: str):
    module, _, function = SECTIONS[section].function.rpartition(".")
    assert callable(getattr(importlib.import_module(f"benchmarks.gpu_suite.{module}"), function))


def test_all_limits_together_are_ten_minutes():
    assert sum(section.limit_s for section in SECTIONS.values()) <= 600


def test_parity_catches_a_kernel_that_is_off(monkeypatch: pytest.MonkeyPatch):
    exact = parity.info_nce
    wrong_by = 0.0

    def off(query: Any, keys: Any, queue: Any, temperature: float, impl: str) -> Any:
        loss = exact(query, keys, queue, temperature, "eager")
        return loss * (1 + wrong_by) if impl == "triton" else loss

    monkeypatch.setattr(parity, "info_nce", off)
    answer = parity.run(SuiteConfig(device="cpu", tiny=True), lambda _: None)
    told = [row for row in answer.result["rows"] if "good" in row]
    assert {row["impl"] for row in told} >= {"eager", "triton", "torch", "numba"}
    assert answer.result["too_far_off"] == 0
    wrong_by = 0.05
    answer = parity.run(SuiteConfig(device="cpu", tiny=True), lambda _: None)
    assert {row["impl"] for row in answer.result["rows"] if row.get("good") is False} == {"triton"}
    assert "TOO FAR OFF" in answer.markdown


def test_a_kernel_that_breaks_is_counted(monkeypatch: pytest.MonkeyPatch):
    exact = parity.info_nce

    def broken(query: Any, keys: Any, queue: Any, temperature: float, impl: str) -> Any:
        if impl == "triton":
            raise RuntimeError("illegal memory access\nand so on")
        return exact(query, keys, queue, temperature, "eager")

    monkeypatch.setattr(parity, "info_nce", broken)
    answer = parity.run(SuiteConfig(device="cpu", tiny=True), lambda _: None)
    assert answer.result["kernels_that_did_not_run"] == 9  # 6 cases of the loss; the augmentation has no GPU here
    assert "did not run, 6 cases: loss, triton: illegal memory access" in answer.markdown


def test_the_short_pretraining_learns_and_is_watched(tmp_path: Path):
    data = write_tiny_images(tmp_path / "data", num_train=96, num_val=24)
    config = SuiteConfig(device="cpu", tiny=True, precision="fp32", data=data, epochs=2, soft_limit_s=600)
    answer = cifar10.run(config, lambda _: None)
    assert set(answer.result["curves"]) == {"leoclr_cifar10", "mocov2_cifar10"}
    for curve in answer.result["curves"].values():
        assert [point["epoch"] for point in curve["points"]] == [0, 1, 2]
        assert all(0 <= point["knn_top1"] <= 100 for point in curve["points"])
        assert curve["points"][1]["loss"] > 0
        assert not curve["stopped_early"]
    assert "not a comparison" in answer.markdown


def test_the_short_pretraining_stops_in_time_and_says_so(tmp_path: Path):
    data = write_tiny_images(tmp_path / "data", num_train=64, num_val=24)
    config = SuiteConfig(device="cpu", tiny=True, precision="fp32", data=data, epochs=50, soft_limit_s=0.01)
    answer = cifar10.run(config, lambda _: None)
    assert all(len(curve["points"]) == 2 for curve in answer.result["curves"].values())
    assert "Out of time before the last epoch: leoclr_cifar10, mocov2_cifar10" in answer.markdown
    with pytest.raises(UnavailableError, match="no data"):
        cifar10.run(SuiteConfig(), lambda _: None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "batch-norm"),
        ("triton_red_fused__native_batch_norm_legit_functional_relu_3", "batch-norm"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel", "batch-norm"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("cudnn_infer_ampere_scudnn_winograd_128x128_ldg1_ldg4", "convolution"),
        ("void cutlass_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized>", "convolution"),
        ("nvjet_hsh_128x64_64x6_2x1_v_bz_TNT", "matrix product"),
        ("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimizer"),
        ("_info_nce_forward_kernel", "loss"),
        ("_augment_kernel", "augmentation"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, relu>", "pointwise and reduction"),
        ("something_else", "other"),
    ],
)
def test_what_a_kernel_is_for(name: str, kind: str):
    assert kind_of(name) == kind


def test_outcomes_of_a_test_report():
    report = ElementTree.fromstring(
        "<testsuites><testsuite>"
        '<testcase classname="tests.gpu.test_a" name="one" time="1.5"/>'
        '<testcase classname="tests.gpu.test_a" name="two" time="0"><skipped message="no GPU"/></testcase>'
        '<testcase classname="tests.gpu.test_b" name="three" time="0"><failure message="2 != 3&#10;more"/></testcase>'
        '<testcase classname="tests.gpu.test_b" name="four" time="0"><error message=""/></testcase>'
        '<testcase classname="" name="tests.gpu.test_c" time="0"><error message="collection failure">In test_c.py\n'
        "E   ModuleNotFoundError: no scipy\n</error></testcase>"
        "</testsuite></testsuites>"
    )
    assert [(test["name"], test["outcome"], test["reason"]) for test in outcomes(report)] == [
        ("test_a::one", "passed", ""),
        ("test_a::two", "skipped", "no GPU"),
        ("test_b::three", "failed", "2 != 3"),
        ("test_b::four", "failed", "error"),
        ("tests.gpu.test_c", "failed", "E   ModuleNotFoundError: no scipy"),
    ]


def test_targets_are_judged_only_by_what_a_gpu_measured():
    def row(method: str, rate: float) -> dict[str, Any]:
        return {"method": method, "data": "synthetic", "images_per_s": rate}

    def part(name: str, ms: float) -> dict[str, Any]:
        return {"method": "leoclr", "part": name, "ms": ms}

    results: dict[str, Any] = {
        "machine": {"gpu": {"name": "NVIDIA H200"}},
        "tests": {"passed": 5, "failed": 0},
        "train-time": {
            "rows": [row("leoclr", 3500.0), row("mocov2", 4400.0)],
            "ratio_synthetic": {"median": 1.26},
            "speedups": {"synthetic": {"published MoCo-v2 loop": {"median": 2.4}}},
        },
        "step": {"bf16": {"rows": [part("augmentation", 2.0), part("whole step", 80.0)]}},
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
    verdicts = judge(results, tiny=False)
    assert [verdict["met"] for verdict in verdicts] == [True, True, False, True, True, False, None, True]
    assert verdicts[4]["reached"] == pytest.approx(1.5)
    assert verdicts[6]["why_not"] == "its section has no result"
    assert "**missed**" in targets_markdown(verdicts)
    assert judge(results | {"tests": {"passed": 0, "failed": 0}}, tiny=False)[7]["met"] is None
    for unjudged in (judge(results, tiny=True), judge(results | {"machine": {"gpu": None}}, tiny=False)):
        assert {verdict["met"] for verdict in unjudged} == {None}


@pytest.mark.long
def test_every_section_at_tiny_sizes(tmp_path: Path):
    data = write_tiny_images(tmp_path / "data", num_train=96, num_val=24)
    code, document, page = run_suite(tmp_path / "out", "--data", str(data))
    assert code == 0
    assert list(document["sections"]) == list(SECTIONS)
    assert {section["status"] for section in document["sections"].values()} == {"done"}
    for section in SECTIONS.values():
        assert f"## {section.title}" in page

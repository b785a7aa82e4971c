"""Training steps on a GPU that computes nothing and allows what CUDA allows: no step waits, or breaks a capture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from pipelines.loader import is_installed
from tests.fake_gpu.build import environment, what_it_lacks
from tests.leoclr_fast.conftest import write_tiny_images

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(what_it_lacks() is not None, reason=f"the fake GPU cannot be built: {what_it_lacks()}"),
]

STEPS = [f"captured {method} {precision}" for method in ("leoclr", "mocov2") for precision in ("fp32", "bf16", "fp16")]
RANKS = ["two_ranks on shuffle plain", "two_ranks auto shuffle plain 0"]
CONTROLS = {  # what is done -> synchronisations, pageable copies
    "nothing": (0, 0), "pinned": (0, 0), "item": (1, 0), "nonzero": (1, 0), "event": (1, 0), "pageable": (0, 1),
    "to_pageable": (0, 1),
}  # fmt: skip
CAPTURES = {  # what is done in a capture -> illegal calls
    "nothing": 0, "joined": 0, "item": 1, "nonzero": 1, "event_from_outside": 1, "unjoined": 1, "synchronize": 1,
}  # fmt: skip
STEM = "generated of_the_stem bf16"
LONG = [
    *(f"captured {method} {precision} result__method__key_batchnorm={batchnorm!r}".replace("'", '"')
      for method in ("leoclr", "mocov2") for precision in ("fp32", "bf16", "fp16")
      for batchnorm in ("plain", "ema", "sync", "shuffle")),
    *(f"captured leoclr bf16 {change}" for change in (
        "result__micro_batches=3", 'result__method__enqueue="all"', 'result__method__key_passes="joint"',
        'speed__loss_impl="eager"', "speed__channels_last=false", "result__optimizer__momentum=0.0",
        'result__backbone__stem="imagenet"', "result__views__image_size=33")),
    "captured leoclr fp16 result__micro_batches=5",
    *(f"eager {method} {precision}" for method in ("leoclr", "mocov2") for precision in ("fp32", "fp16", "fp64")),
]  # fmt: skip
LONG_RANKS = [
    "two_ranks on sync sync", "two_ranks on ema plain", "two_ranks off shuffle sync",
    "two_ranks on shuffle plain none compiled",
]  # fmt: skip


def ran(*cases: str) -> dict[str, Any]:
    """What `tests.fake_gpu.program` says of each case."""
    command = [sys.executable, "-m", "tests.fake_gpu.program", *cases]
    done = subprocess.run(command, env=environment(devices=2), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (line.partition("\t") for line in done.stdout.splitlines() if "\t" in line)
    return {case: json.loads(result) for case, _, result in lines}


def assert_free(happened: Mapping[str, Any], *, replayed: bool) -> None:
    """Neither wait nor pageable copy nor illegal call in a step, which is one launch of a graph if it is replayed."""
    waits = ("synchronisations", "pageable_copies", "illegal_calls", "illegal_before")
    assert {name: happened[name] for name in waits} == dict.fromkeys(waits, 0)
    assert happened["graph_launches"] == replayed
    assert (happened["launches"] <= 3) == replayed


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    controls = [f"control {name}" for name in CONTROLS] + [f"control_in_capture {name}" for name in CAPTURES]
    others = ["eager leoclr bf16", "other_sizes", "memory_for_no_graph", "capture_that_is_refused", "launches"]
    return ran(*RANKS, *STEPS, *others, *controls, STEM)


def test_no_step_waits(seen: Mapping[str, Any]) -> None:
    for case in STEPS:
        assert_free(seen[case], replayed=True)
        assert 300 < seen[case]["graph_nodes"] < 1000, case
        assert seen[case]["means"] == "not compiled, captured as a CUDA graph"
    assert_free(seen["eager leoclr bf16"], replayed=False)
    of_two = seen["other_sizes"]
    assert of_two["graph_launches"] == 0.5
    assert of_two["synchronisations"] == of_two["illegal_calls"] == of_two["pageable_copies"] == 0


def test_a_step_goes_on_where_its_capture_fails(seen: Mapping[str, Any]) -> None:
    failed = "the step is not captured as a CUDA graph, and slower, since that failed here: "
    short = seen["memory_for_no_graph"]
    assert_free(short, replayed=False)
    assert short["asked_for"].startswith("a batch of 12 images does not fit the memory of cuda:0. Give a smaller")
    (warning,) = short["warnings"]
    assert warning.startswith(f"{failed}CUDA out of memory")
    (warning,) = seen["capture_that_is_refused"]["warnings"]
    assert warning == f"{failed}CUDA error: operation not permitted when stream is capturing"
    for rank, reason in enumerate(("this rank cannot capture", "another rank could not capture it")):
        ours = seen["two_ranks auto shuffle plain 0"][rank]
        assert_free(ours, replayed=False)
        assert ours["warnings"] == [failed + reason]


def test_two_ranks(seen: Mapping[str, Any]) -> None:
    """The exchange of crops stands before the graph; gradients travel while others are computed."""
    for happened in seen["two_ranks on shuffle plain"]:
        assert_free(happened | {"launches": 0}, replayed=True)
        assert happened["launches"] < 20
        assert happened["sent_early"] > 0
    (automatic, _) = seen["two_ranks auto shuffle plain 0"]
    assert automatic["sent_early"] > 0
    assert automatic["means"].endswith("no CUDA graph (none was ever tried with several ranks; --cuda-graph on does)")


def test_loaders_stay_on_their_device() -> None:
    """On the second of two GPUs. Only who decodes on the GPU waits for it: once a batch, for what has been cut."""
    optional = {"nvidia.dali": ["loader dali"], "ffcv": ["loader ffcv"]}
    cases = [case for package, own in optional.items() if is_installed(package) for case in own]
    controls = [f"{case} never" for case in cases[:1]]  # first: pinned memory of a thread on the first GPU is kept
    found = ran(*controls, *cases, "loader nvjpeg", "loader torchvision", "loader resident", "loader synthetic")
    for control in controls:
        assert found.pop(control)["used"][0] > 0
    for case, happened in found.items():
        assert happened["places"] == ["cuda:1"], case
        assert happened["used"][0] == 0 < happened["used"][1], case
        assert happened["pageable_copies"] == happened["illegal_calls"] == 0, case
        waits_for_cuts = case in ("loader nvjpeg", "loader dali")
        assert happened["waits"] == (happened["steps"] if waits_for_cuts else 0) * ["SYNC event"], case


def test_all_weights_at_once(seen: Mapping[str, Any]) -> None:
    """A ResNet-50's 163 tensors, 53 counters of batches, and gradients in four buckets of 25 MiB."""
    assert seen["launches"] == {"moving average": 1, "rounding": 1, "counters": 1, "gradients": 4}


def test_what_is_forbidden_is_seen(seen: Mapping[str, Any]) -> None:
    for name, expected in CONTROLS.items():
        happened = seen[f"control {name}"]
        assert (happened["synchronisations"], happened["pageable_copies"]) == expected, name
    for name, illegal in CAPTURES.items():
        happened = seen[f"control_in_capture {name}"]
        assert happened["illegal_calls"] == illegal, name
        assert bool(happened["refused"]) == bool(illegal), name


def assert_fast_code(found: Mapping[str, Any], most_gb: float) -> None:
    """No atomic addition, which is slow and repeats nothing bit for bit; activations in NHWC and half precision."""
    assert found["atomics"] == found["nchw"] == found["float32"] == []
    assert 0.5 * most_gb < found["gb"] < most_gb


def test_code_of_the_stem(seen: Mapping[str, Any]) -> None:
    assert_fast_code(seen[STEM], most_gb=3.4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_code_of_a_step() -> None:
    """64 images, and 128 keys in one pass, through a ResNet of one bottleneck in each stage, and through ResNet-50;
    torch's own max-pooling is what the guard would see (torch 2.12 to 2.15; before, it makes the same code as ours)."""
    ours, half, torchs = "of_a_step bf16 1111", "of_a_step fp16 1111", "of_the_stem bf16 torchs"
    resnet50 = "of_a_step bf16 3463"
    found = ran(*(f"generated {case}" for case in (ours, half, resnet50, torchs)))
    assert_fast_code(found[f"generated {ours}"], most_gb=9.9)
    assert_fast_code(found[f"generated {half}"], most_gb=9.9)
    assert_fast_code(found[f"generated {resnet50}"], most_gb=17.2)
    seen = found[f"generated {torchs}"]
    has_the_fault = (2, 12) <= tuple(map(int, version("torch").split(".")[:2])) <= (2, 15)
    for fault in ("atomics", "nchw", "float32"):
        assert bool(seen[fault]) == has_the_fault, fault


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_with_the_default_flags(tmp_path: Path) -> None:
    """ImageNet's recipe, but for its size: bf16, compiled, captured, and nothing waits once that is done."""
    data = write_tiny_images(tmp_path / "data", num_train=64, num_val=8)
    size = "--backbone.arch resnet18 --batch-size 16 --method.queue-size 64 --views.image-size 64 --monitor.knn-k 2"
    run = f"pretrain leoclr_imagenet_200ep --data {data} --out {tmp_path / 'run'} --device cuda --max-steps 5"
    case = f"command {run} {size} --method.key-batchnorm-group 4"
    result = ran(case)[case]
    assert result["code"] == 0
    assert "cuda:0, bf16 (auto: the GPU computes it), compiled, captured as a CUDA graph" in result["said"]
    assert len(result["steps"]) == 5
    for step in result["steps"][1:]:
        assert_free(step | {"illegal_before": 0}, replayed=True)


@pytest.mark.long
def test_memory_for_a_step_and_not_for_its_graph() -> None:
    """Of a wider network in less and less memory: captured, then eager, then told what would fit."""
    free_mib = (1000, 500, 440, 420, 400, 380, 340, 300)
    found = ran(*(f"in_memory {mib}" for mib in free_mib)).values()
    outcomes = [outcome for outcome, _ in found]
    assert [outcome for outcome, _ in groupby(outcomes)] == ["captured as a CUDA graph", "no CUDA graph", "too small"]
    for outcome, said in found:
        assert ("CUDA out of memory" in said) == (outcome == "no CUDA graph")
        assert ("a batch of 64 images does not fit" in said) == (outcome == "too small")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_sections_of_the_gpu_suite(real_data: Path, tmp_path: Path) -> None:
    """At tiny sizes, each to its end. Left out: `tests`, which look at numbers; `profile` and `loaders`, as CUPTI and
    DALI want a driver."""
    sections = ["machine", "decoders", "train-time", "step", "loss", "augment", "cifar10"]
    data = ["--data", real_data / "cifar10-jpeg.tar.xz", "--photographs", real_data / "imagenet-sample-400.tar"]
    flags = ["--tiny", "--device", "cuda", "--limit-s", "3500", "--out", tmp_path]
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--sections", *sections, *map(str, (*data, *flags))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "gpu_suite.json").read_text())["sections"]
    assert {name: section["status"] for name, section in found.items()} == dict.fromkeys(sections, "done"), done.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_mode() -> None:
    for case, happened in ran(*LONG_RANKS, *LONG).items():
        replayed = not case.startswith(("eager", "two_ranks off"))
        if case in LONG:
            assert_free(happened, replayed=replayed)
            continue
        for of_rank in happened:  # the exchange of crops is no part of the graph
            assert_free(of_rank | {"launches": 0 if replayed else of_rank["launches"]}, replayed=replayed)
            assert of_rank["sent_early"] > 0, case

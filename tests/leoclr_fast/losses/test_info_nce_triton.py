"""The fused loss against float64, in Triton's interpreter, and compiled for GPUs that are not here.

What the interpreter cannot show is in tests/gpu: the tensor cores' products, and the hardware's exponential.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leoclr_fast.losses.info_nce import info_nce
from tests.leoclr_fast.losses.test_info_nce import cross_entropies, unit_vectors
from tests.tolerances import INFO_NCE_TRITON
from tests.triton_processes import assert_compiles_and_fits, compilations

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

ROOT = Path(__file__).parents[3]
HALVES_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def case(
    B: int,
    K: int,
    D: int,
    P: int,
    temperature: float = 0.2,
    dtype: torch.dtype = torch.float32,
    *,
    length: float = 1.0,
    loss_scale: float = 1.0,
) -> dict[str, Any]:
    query, queue, *keys = (length * unit_vectors(rows, D, seed).to(dtype) for seed, rows in enumerate([B, K, *[B] * P]))
    return {"query": query, "keys": keys, "queue": queue, "temperature": temperature, "loss_scale": loss_scale}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accurate_cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for dtype in HALVES_AND_SINGLE:
        cases |= {
            f"{name} {name_of(dtype)}": case(*sizes, dtype=dtype)
            for name, sizes in {
                "no multiples of any tile": (7, 123, 33, 2),
                "one positive": (32, 128, 128, 1, 0.07),
                "temperature 0.01": (20, 300, 64, 2, 0.01),
            }.items()
        }
        cases[f"logits of 1e4 {name_of(dtype)}"] = case(9, 100, 16, 2, dtype=dtype, length=45.0)
    cases |= {f"wide {name_of(dtype)}": case(5, 70, 300, 3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    cases["one query"] = case(1, 507, 16, 2)
    cases["many shares of the queue"] = case(3, 64 * 19 + 5, 8, 2, 0.1)
    cases["many queries"] = case(70, 70, 16, 2)
    cases["one of everything"] = case(1, 1, 2, 1)
    cases["many positives"] = case(3, 50, 8, 11)
    cases["scaled as by a scaler"] = case(64, 100, 32, 2, dtype=torch.float16, loss_scale=2.0**14)
    mixed = case(12, 100, 32, 2)
    cases["queue of bfloat16"] = mixed | {"queue": mixed["queue"].bfloat16()}
    cases["keys of float16"] = mixed | {"keys": [key.half() for key in mixed["keys"]]}
    strided = case(12, 100, 64, 2)
    cases["strided rows"] = {
        "query": strided["query"][:, 5:38],
        "keys": [key.T.contiguous().T[:, 5:38] for key in strided["keys"]],
        "queue": strided["queue"][::2, 5:38],
    } | {name: strided[name] for name in ("temperature", "loss_scale")}
    certain = case(4, 30, 64, 2, 0.1)
    for name in ("no multiples of any tile float32", "many shares of the queue", "many queries"):
        cases[name]["twice"] = True
    cases["nearly no loss"] = certain | {"keys": [certain["query"].clone()] * 2, "queue": -certain["query"]}
    return cases


def other_cases() -> dict[str, dict[str, Any]]:
    broken = case(6, 40, 8, 2)
    broken["query"][3, 5] = torch.nan
    infinite = case(6, 40, 8, 2)
    infinite["queue"][7, 2] = torch.inf
    return {
        "a NaN": broken,
        "an infinity": infinite,
        "float64": case(4, 9, 8, 1, dtype=torch.float64),
        "no negatives": case(4, 0, 8, 1),
    }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(accurate_cases() | other_cases(), folder / "cases.pt")
    module = "tests.leoclr_fast.interpreted_info_nce"
    command = [sys.executable, "-m", module, str(folder / "cases.pt"), str(folder / "results.pt")]
    subprocess.run(command, check=True, timeout=280, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"})
    results: dict[str, dict[str, Any]] = torch.load(folder / "results.pt")
    return results


def value_and_gradient(case: dict[str, Any], loss: Any) -> tuple[Tensor, Tensor]:
    """In float64, from the inputs as they were rounded."""
    query, queue, *keys = (tensor.detach().double() for tensor in (case["query"], case["queue"], *case["keys"]))
    value = loss(query.requires_grad_(), keys, queue, case["temperature"])
    (gradient,) = torch.autograd.grad(value * case["loss_scale"], query)
    return value.detach(), gradient


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", accurate_cases())
def test_value_and_gradient_in_the_interpreter(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    given, ours = accurate_cases()[name], interpreted[name]
    dtype = given["query"].dtype
    loss, gradient = value_and_gradient(given, cross_entropies)
    assert ours["loss"].dtype == torch.float32
    assert ours["gradient"].dtype == dtype
    assert ours["gradient"].shape == given["query"].shape
    assert relative_error(ours["loss"], loss) <= INFO_NCE_TRITON[dtype].loss
    assert relative_error(ours["gradient"], gradient) <= INFO_NCE_TRITON[dtype].gradient


def test_every_run_gives_the_same_bits(interpreted: dict[str, dict[str, Any]]) -> None:
    repeatable = [interpreted[name]["repeatable"] for name in accurate_cases()]
    assert repeatable.count(True) >= 3
    assert False not in repeatable


def test_keys_and_queue_get_no_gradient(interpreted: dict[str, dict[str, Any]]) -> None:
    assert all(interpreted[name]["others_got_none"] for name in accurate_cases())


def test_what_is_not_finite_shows(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["a NaN"]["loss"].isnan()
    rows_are_finite = interpreted["a NaN"]["gradient"].isfinite().all(dim=1)
    assert rows_are_finite.tolist() == [True, True, True, False, True, True]
    assert not interpreted["an infinity"]["loss"].isfinite()


def test_what_the_kernel_cannot_take(interpreted: dict[str, dict[str, Any]]) -> None:
    assert "takes float32, float16 and bfloat16, and here is float64" in interpreted["float64"]["error"]
    assert "4 queries and 0 negatives" in interpreted["no negatives"]["error"]


def test_a_cpu_without_the_interpreter() -> None:
    given = case(4, 9, 8, 1)
    with pytest.raises(ValueError, match=r"tensors are on cpu: it needs a CUDA device .* loss_impl auto or eager"):
        info_nce(given["query"], given["keys"], given["queue"], 0.2, "triton")


@pytest.mark.parametrize(("sizes", "targets"), compilations("info_nce"))
def test_it_compiles_ahead_of_time_and_fits(sizes: str, targets: tuple[int, ...], tmp_path: Path) -> None:
    assert_compiles_and_fits(sizes, {"share_of_the_queue", "all_shares"}, tmp_path, targets)

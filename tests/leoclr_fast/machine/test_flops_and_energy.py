from __future__ import annotations

import sys
import types

import pytest
import torch

from leoclr_fast.config import BackboneConfig
from leoclr_fast.machine.energy import EnergyMeter, energy_between, energy_kwh
from leoclr_fast.machine.gpu_state import sharing_warnings
from leoclr_fast.method.flops import (
    encoder_macs,
    mfu,
    peak_flops_per_s,
    peak_of_gpu,
    training_flops_per_image,
)
from leoclr_fast.recipes import get_recipe


def test_resnet50_at_224_is_what_everybody_counts():
    macs = encoder_macs(BackboneConfig(), projection_dim=128, image_size=224)
    torchvision_with_classifier = 4_089_184_256
    head = 2048 * 2048 + 2048 * 128
    assert macs == torchvision_with_classifier - 2048 * 1000 + head


@pytest.mark.parametrize(("recipe", "passes"), [("leoclr_imagenet_200ep", 5), ("mocov2_imagenet_200ep", 4)])
def test_a_step_is_five_forward_passes_or_four(recipe: str, passes: int):
    result = get_recipe(recipe).result
    assert training_flops_per_image(result) == passes * 2 * encoder_macs(result.backbone, 128, 224)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("Tesla V100-PCIE-16GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_in_bf16_by_name(name: str, tera: float | None):
    peak, remark = peak_of_gpu(name, "bf16")
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))
    assert remark


def test_a_cpu_has_no_known_peak_and_so_no_mfu():
    peak, why = peak_flops_per_s(torch.device("cpu"), "fp32")
    assert peak is None
    assert "CPU" in why
    assert mfu(10**9, 100.0, peak) is None
    assert mfu(40_000_000_000, 5_000.0, 1e15) == pytest.approx(0.2)


def test_no_counter_is_none_and_never_zero():
    meter = EnergyMeter.of(torch.device("cpu"))
    assert meter.read_j() is None
    assert "CPU" in str(meter.missing)
    assert energy_between(None, 5.0) is None
    assert energy_between(5.0, None) is None
    assert energy_between(7.0, 5.0) is None
    assert energy_between(5.0, 7.5) == 2.5


class _NVMLError(Exception):
    pass


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, counter: list[int]) -> None:
    """A GPU of that name, and an NVML whose counter gives these millijoules and then fails."""

    def energy(handle: str) -> int:
        assert handle == "handle of GPU-1234"
        if not counter:
            raise _NVMLError("gone")
        return counter.pop(0)

    nvml = types.SimpleNamespace(
        NVMLError=_NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))


def test_the_counter_is_in_millijoules(monkeypatch: pytest.MonkeyPatch):
    _pretend_gpu(monkeypatch, "NVIDIA H200", [0, 2_000, 5_500])
    meter = EnergyMeter.of(torch.device("cuda"))
    assert meter.missing is None
    assert energy_between(meter.read_j(), meter.read_j()) == 3.5
    assert meter.read_j() is None
    assert "gone" in str(meter.missing)


def test_energy_of_a_run() -> None:
    assert energy_kwh([{"gpu_energy_j": 1.8e6}, {"gpu_energy_j": 5.4e6}]) == 2.0
    assert energy_kwh([]) is None
    assert energy_kwh([{"gpu_energy_j": 1.8e6}, {"loss": 1.0}]) is None  # an unknown energy is not zero


def test_shared_and_sliced_gpus_are_told():
    quiet = {"name": "NVIDIA H200", "mig": False, "memory_used_elsewhere_gib": 0.0, "utilization_percent": "0"}
    assert sharing_warnings(quiet) == []
    (mig,) = sharing_warnings(quiet | {"name": "NVIDIA A100 MIG 1g.10gb", "mig": True})
    assert "MIG slice" in mig
    shared, busy = sharing_warnings(quiet | {"memory_used_elsewhere_gib": 12.5, "utilization_percent": "97"})
    assert "12.5 GiB" in shared
    assert "97 % busy" in busy
    assert sharing_warnings(quiet | {"utilization_percent": None}) == []

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import choose_loader, make_loader, settle_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder
from pipelines.resident_loader import ResidentLoader, estimate_decoded_bytes
from pipelines.torchvision_loader import TorchvisionLoader
from pipelines.views import MOCOV2_VIEWS


def make(split: Split, config: LoaderConfig) -> Loader:
    order = TrainOrder(num_images=len(split), batch_size=4, seed=0)
    device = torch.device("cpu")
    return make_loader(split, MOCOV2_VIEWS, ViewConfig(image_size=16), config, order, seed=0, device=device)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "residnt",
            "there is no loader 'residnt'. Did you mean resident? "
            "Allowed: auto, resident, dali, ffcv, nvjpeg, torchvision, synthetic.",
        ),
        ("xyz", "there is no loader 'xyz'. Allowed: auto, resident, dali, ffcv, nvjpeg, torchvision, synthetic."),
    ],
)
def test_an_unknown_name(name: str, message: str, split: Split) -> None:
    with pytest.raises(ValueError, match=f"^{message.replace('?', '[?]')}"):
        make(split, LoaderConfig(name=name))


class TestAuto:
    def test_small_data_stay_resident(self, split: Split, package_log: pytest.LogCaptureFixture) -> None:
        gib = estimate_decoded_bytes(split) / 2**30
        config = LoaderConfig(workers=0, resident_limit_gib=gib)
        assert isinstance(make(split, config), ResidentLoader)
        message = f"loader resident: the decoded images take about 0.00 GiB (resident up to {gib:g} GiB)"
        assert f"{message}; the others decode in every epoch" in package_log.messages

    @pytest.mark.parametrize("has_dali", [True, False])
    def test_large_data_do_not(
        self, has_dali: bool, split: Split, package_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipelines.loader.is_installed", lambda package: has_dali and package == "nvidia.dali")
        gib = estimate_decoded_bytes(split) / 2**30
        config = LoaderConfig(workers=0, resident_limit_gib=gib / 2)
        chosen = choose_loader(split, config, torch.device("cpu"))
        assert chosen == ("dali" if has_dali else "torchvision")
        dali = "" if has_dali else "dali (not installed: pip install 'leoclr-fast[dali]'), "
        slower = ", torchvision (slower)" if has_dali else ""
        why_not = f"not ffcv (it reads .betons alone), {dali}nvjpeg (it needs a GPU){slower}"
        size = f"the decoded images would take about 0 GiB (resident up to {gib / 2:g} GiB)"
        assert package_log.messages == [f"loader {chosen}: {size}; {why_not}"]
        if not has_dali:
            assert isinstance(make(split, config), TorchvisionLoader)

    @pytest.mark.parametrize(
        ("has_dali", "nvjpeg_obstacle", "expected", "others"),
        [
            (True, "not looked at", "dali", "nvjpeg (for machines without DALI), ffcv (it decodes on the CPU), "
             "torchvision (it decodes on the CPU)"),
            (False, None, "nvjpeg", "dali (not installed: pip install 'leoclr-fast[dali]'), "
             "ffcv (it decodes on the CPU), torchvision (it decodes on the CPU)"),
            (False, "no driver", "torchvision", "dali (not installed: pip install 'leoclr-fast[dali]'), "
             "nvjpeg (no driver), ffcv (it reads .betons alone)"),
        ],
    )  # fmt: skip
    def test_large_data_on_a_gpu(
        self, has_dali: bool, nvjpeg_obstacle: str | None, expected: str, others: str, split: Split,
        package_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("pipelines.loader.is_installed", lambda _: has_dali)
        monkeypatch.setattr("pipelines.nvjpeg_loader.nvjpeg_obstacle", lambda _: nvjpeg_obstacle)
        config = LoaderConfig(resident_limit_gib=0.0)
        assert choose_loader(split, config, torch.device("cuda")) == expected
        assert settle_loader(split, config, torch.device("cuda")).name == expected
        line = f"loader {expected}: the decoded images would take about 0 GiB (resident up to 0 GiB); not {others}"
        assert package_log.messages == [line] * 2

    @pytest.mark.parametrize("has_ffcv", [True, False])
    def test_a_large_beton_on_a_cpu(
        self,
        has_ffcv: bool,
        split: Split,
        tmp_path: Path,
        package_log: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        convert(split.root, tmp_path / "beton", ConvertOptions(format="ffcv"), workers=1)  # type: ignore[attr-defined]
        beton = open_source(tmp_path / "beton").splits["train"].subset([3, 1, 2])
        monkeypatch.setattr("pipelines.loader.is_installed", lambda package: has_ffcv or package != "ffcv")
        config = LoaderConfig(resident_limit_gib=0.0)
        assert choose_loader(beton, config, torch.device("cpu")) == ("ffcv" if has_ffcv else "dali")
        why_not = "dali (slower on a .beton), nvjpeg (" if has_ffcv else "ffcv (not installed: make ffcv), nvjpeg ("
        assert f"(resident up to 0 GiB); not {why_not}" in package_log.messages[-1]
        assert choose_loader(split, config, torch.device("cpu")) == "dali"


def test_optional_packages_are_not_imported_by_the_way() -> None:
    code = "import sys, pipelines.factory; print([name for name in ('nvidia.dali', 'ffcv') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

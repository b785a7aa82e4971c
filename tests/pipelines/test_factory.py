from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dataset_tools.sources import Split
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import LOADERS, choose_loader, make_loader, settle_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder
from pipelines.resident_images import estimate_decoded_bytes
from pipelines.resident_loader import ResidentLoader
from pipelines.synthetic_loader import SyntheticLoader
from pipelines.torchvision_loader import TorchvisionLoader
from pipelines.views import MOCOV2_VIEWS


def make(split: Split, config: LoaderConfig) -> Loader:
    order = TrainOrder(num_images=len(split), batch_size=4, seed=0)
    device = torch.device("cpu")
    return make_loader(split, MOCOV2_VIEWS, ViewConfig(image_size=16), config, order, seed=0, device=device)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("resident", ResidentLoader), ("torchvision", TorchvisionLoader), ("synthetic", SyntheticLoader)],
)
def test_by_name(name: str, kind: type[Loader], split: Split) -> None:
    with make(split, LoaderConfig(name=name, workers=0)) as loader:
        assert type(loader) is kind
        assert loader.name == name
        assert LOADERS[name] is kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "residnt",
            "there is no loader 'residnt'; did you mean resident? Allowed: auto, resident, torchvision, synthetic.",
        ),
        ("Torchvision", "there is no loader 'Torchvision'; did you mean torchvision?"),
        ("xyz", "there is no loader 'xyz'; Allowed: auto, resident, torchvision, synthetic."),
        ("", "there is no loader ''; Allowed: auto"),
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
        assert message in package_log.messages

    def test_large_data_do_not(self, split: Split, package_log: pytest.LogCaptureFixture) -> None:
        gib = estimate_decoded_bytes(split) / 2**30
        config = LoaderConfig(workers=0, resident_limit_gib=gib / 2)
        assert isinstance(make(split, config), TorchvisionLoader)
        message = f"loader torchvision: the decoded images would take about 0 GiB (resident up to {gib / 2:g} GiB)"
        assert message in package_log.messages

    def test_never_synthetic_and_never_silent(self, split: Split, package_log: pytest.LogCaptureFixture) -> None:
        for limit in (0.0, 1e-6, 8.0):
            package_log.clear()
            name = choose_loader(split, LoaderConfig(resident_limit_gib=limit))
            assert name in ("resident", "torchvision")
            assert [message.split(":")[0] for message in package_log.messages] == [f"loader {name}"]

    def test_data_of_which_nothing_can_be_read(self, split: Split, damage: Callable[..., None]) -> None:
        damage(split, *range(23))
        with pytest.raises(ValueError, match="none of the 23 images can be read"):
            make(split, LoaderConfig())


def test_settling_replaces_auto_alone(split: Split) -> None:
    auto = LoaderConfig(workers=3, prefetch_batches=5, resident_limit_gib=0.0)
    settled = settle_loader(split, auto)
    assert settled == LoaderConfig(name="torchvision", workers=3, prefetch_batches=5, resident_limit_gib=0.0)
    for name in ("resident", "synthetic", "no such loader"):
        named = LoaderConfig(name=name)
        assert settle_loader(split, named) is named

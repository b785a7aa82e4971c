"""Exported weights give the same features in the library they are for, or are not exported."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from leoclr_fast.config import BackboneConfig
from leoclr_fast.method.backbone import build_backbone
from leoclr_fast.weights.backbone_file import Description, backbone_bytes, read_backbone_file, weights_sha256
from leoclr_fast.weights.detectron2 import detectron2_bytes, detectron2_name, read_detectron2
from leoclr_fast.weights.export import FORMATS, SafetensorsFormat, TorchvisionFormat, export
from leoclr_fast.weights.pretrained import load_pretrained
from pipelines.config import ViewConfig
from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.training.test_bad_input import refused
from tests.leoclr_fast.weights_files import lively_resnet, write_weights

NARROW = BackboneConfig(arch="resnet18", width_multiplier=0.125)


def need(to: str) -> None:
    if to == "timm":
        pytest.importorskip("timm", reason="timm is not installed (extra `export`)")


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """A file of weights, images, and the features that torchvision's network has with the same tensors, in float64."""
    network = lively_resnet("resnet50")
    path = write_weights(tmp_path_factory.mktemp("resnet50") / "weights.safetensors", network, BackboneConfig())
    network.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        truth = network.double().eval()(images.double())
    return path, images, truth


@pytest.mark.parametrize("to", FORMATS)
def test_resnet50_has_the_same_features_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet50: tuple[Path, Tensor, Tensor], to: str
) -> None:
    """On images that the export did not use, by the lines of code that it gives."""
    need(to)
    weights, images, truth = resnet50
    out = tmp_path / f"exported{FORMATS[to].ending}"
    result = export(weights, to, out)
    assert result["difference"] <= result["tolerance"] <= 1e-5
    assert result["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    code = result["usage"]
    if to == "detectron2":
        assert "PIXEL_MEAN: [123.675, 116.280, 103.530]\n  PIXEL_STD: [58.395, 57.120, 57.375]" in code
        backbone = build_backbone(BackboneConfig())
        backbone.load_state_dict(read_detectron2(out, list(backbone.state_dict())))
        features = backbone.eval()(images)
    else:
        names: dict[str, object] = {"images": images.numpy()}
        monkeypatch.chdir(tmp_path)
        exec(code, names)
        features = names["backbone"].eval()(images)  # type: ignore[attr-defined]
    difference = float((features.detach().double() - truth).abs().max() / truth.abs().max())
    assert difference < 1e-5
    assert len(os.listdir(tmp_path)) == 1  # no temporary file stays


def test_detectron2_names() -> None:
    """As facebookresearch/moco's convert-pretrain-to-detectron2 gives them."""
    assert {name: detectron2_name(name) for name in (
        "conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.3.bn2.bias", "layer4.2.bn3.weight",
        "layer3.0.downsample.0.weight", "layer3.0.downsample.1.running_mean",
    )} == {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer2.3.bn2.bias": "res3.3.conv2.norm.bias",
        "layer4.2.bn3.weight": "res5.2.conv3.norm.weight",
        "layer3.0.downsample.0.weight": "res4.0.shortcut.weight",
        "layer3.0.downsample.1.running_mean": "res4.0.shortcut.norm.running_mean",
    }  # fmt: skip


def test_a_detectron2_file_is_a_plain_pickle_of_arrays(tmp_path: Path) -> None:
    """As detectron2 opens it; and our own reader takes no tensor that it does not know."""
    state = lively_resnet("resnet18").state_dict()
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    path = tmp_path / "weights.pkl"
    path.write_bytes(detectron2_bytes(tensors))
    document = pickle.loads(path.read_bytes(), encoding="latin1")
    assert (document["__author__"], document["matching_heuristics"]) == ("leoclr-fast", True)
    assert len(document["model"]) == len(tensors)
    for name, tensor in tensors.items():
        array = document["model"][detectron2_name(name)]
        assert array.flags.writeable
        assert array.dtype == tensor.numpy().dtype
        assert np.array_equal(array, tensor.numpy())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_detectron2(path, list(tensors)).items())
    with pytest.raises(KeyError, match=r"stem\.conv1\.weight"):
        read_detectron2(path, [name for name in tensors if name != "conv1.weight"])


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_small_narrow_network_can_be_exported_to(tmp_path: Path, to: str) -> None:
    need(to)
    config = BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.125)
    weights = write_weights(tmp_path / "weights.safetensors", build_backbone(config), config, image_size=32)
    out = tmp_path / f"exported{FORMATS[to].ending}"
    if to == "safetensors":
        assert export(weights, to, out)["difference"] < 1e-5
        return
    with pytest.raises(ValueError, match=f"{to}'s resnet18 has a 7x7 stem .* the small stem and width 0.125;"):
        export(weights, to, out)
    assert not out.exists()


def test_a_run_is_exported(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    """Its final weights, else those of its newest checkpoint; weights of another network are refused."""
    out = tmp_path / "weights.safetensors"
    result, text = succeeded(capsys, "export", run, "--to", "safetensors", "--out", out)
    assert result["difference"] == 0
    assert "its features differ by 0.0e+00 of the largest (allowed 0.0e+00)" in text
    assert out.read_bytes() == (run / "final.safetensors").read_bytes()
    (run / "final.safetensors").unlink()
    result, _ = succeeded(capsys, "export", run, "--to", "safetensors", "--out", tmp_path / "again.safetensors")
    assert result["weights"].endswith("step-00000003")
    assert result["weights_sha256"] == load_pretrained(out).sha256
    write_weights(run / "final.safetensors", build_backbone(NARROW), NARROW)
    message = refused(capsys, "export", run, "--to", "safetensors", "--out", tmp_path / "other.safetensors")
    assert "does not hold exactly a resnet18 with the small stem of width 0.0625: of another shape: " in message


def test_weights_and_their_description_come_back(tmp_path: Path) -> None:
    backbone = build_backbone(NARROW)
    pretrained = load_pretrained(write_weights(tmp_path / "weights.safetensors", backbone, NARROW, image_size=96))
    assert pretrained.description == Description(recipe="somehow", backbone=NARROW, views=ViewConfig(image_size=96))
    assert pretrained.run is None
    sha256 = weights_sha256(backbone.state_dict())
    assert pretrained.sha256 == weights_sha256(pretrained.backbone.state_dict()) == sha256


def test_safetensors_of_others_are_recognised_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = models.resnet34(weights=None).state_dict()
    save_file(state, path)
    with pytest.raises(ValueError, match=r"exactly a resnet34: left over: fc\.bias \[1000\], fc\.weight \[1000, 512\]"):
        read_backbone_file(path)
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, path)
    assert read_backbone_file(path)[1].backbone == BackboneConfig(arch="resnet34")
    save_file({"0.weight": torch.zeros(8, 8), "2.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(ValueError, match="holds no backbone: it has 2 tensors"):
        read_backbone_file(path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    backbone = build_backbone(NARROW)
    path = write_weights(tmp_path / "weights.safetensors", backbone, NARROW)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_pretrained(path)
    with torch.no_grad():
        backbone.layer2[0].bn1.bias[3] = float("nan")
    write_weights(path, backbone, NARROW)
    with pytest.raises(ValueError, match=r"with NaN or infinite values: layer2\.0\.bn1\.bias\."):
        load_pretrained(path)
    path.write_bytes(backbone_bytes({"conv1.weight": torch.zeros(8)}, Description(recipe="x", backbone=NARROW)))
    with pytest.raises(ValueError, match=r"missing: bn1\.weight \[8\].* in all\); of another shape: conv1\.weight"):
        load_pretrained(path)


def test_an_export_that_changes_the_features_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackboneConfig(arch="resnet18")
    weights = write_weights(tmp_path / "weights.safetensors", lively_resnet("resnet18"), config)
    right = TorchvisionFormat.features
    monkeypatch.setattr(TorchvisionFormat, "features", lambda *given: right(*given) * 1.0001)
    with pytest.raises(RuntimeError, match=r"they differ by 1\.0e-04 of the largest, allowed are 1e-05; nothing was"):
        export(weights, "torchvision", tmp_path / "out.pth")
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_misuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_weights(tmp_path / "weights.safetensors", build_backbone(NARROW), NARROW)
    line = ["export", weights, "--to"]
    assert "does not end in .pkl" in refused(capsys, *line, "detectron2", "--out", tmp_path / "out.pth")
    assert "exists already" in refused(capsys, *line, "safetensors", "--out", weights)
    assert "there is no file of weights" in refused(
        capsys, "export", tmp_path / "nothing", "--to", "safetensors", "--out", tmp_path / "a.safetensors"
    )
    assert "is not a run folder" in refused(
        capsys, "export", tmp_path, "--to", "safetensors", "--out", tmp_path / "a.safetensors"
    )
    monkeypatch.setattr(SafetensorsFormat, "package", "no-such-package")
    message = refused(capsys, *line, "safetensors", "--out", tmp_path / "a.safetensors")
    assert "needs no-such-package; install it with: pip install 'leoclr-fast[export]'" in message

"""MoCo's checkpoints come in whole or not at all, and nothing in them is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leoclr_fast.config import BackboneConfig
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.weights.moco import import_moco
from leoclr_fast.weights.pretrained import load_pretrained
from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.training.test_bad_input import refused
from tests.leoclr_fast.weights_files import lively_resnet, moco_state, narrow_moco_state, write_moco


@pytest.mark.parametrize(("arch", "version"), [("resnet50", 2), ("resnet18", 1)])
def test_features_are_those_of_torchvisions_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arch: str, version: int
) -> None:
    network = lively_resnet(arch)
    checkpoint = write_moco(tmp_path / "moco.pth.tar", moco_state(network, version), arch, zipped=version == 2)
    out = tmp_path / "moco.safetensors"
    result, text = succeeded(capsys, "import-moco", checkpoint, "--out", out)
    assert (result["arch"], result["stem"], result["width_multiplier"], result["epoch"]) == (arch, "imagenet", 1.0, 200)
    num_tensors = len(network.state_dict()) - 2
    assert result["tensors"] == num_tensors
    assert result["head_tensors_left_behind"] == (2 if version == 1 else 4)
    assert result["other_tensors_left_behind"] == num_tensors + result["head_tensors_left_behind"] + 2
    assert f"MoCo-v{version}'s" in text

    pretrained = load_pretrained(out)
    network.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(pretrained.backbone.eval()(images), network.eval()(images))
    assert pretrained.sha256 == result["weights_sha256"]
    assert f"moco.pth.tar after epoch 200, sha256 {result['source_sha256']}" in pretrained.description.source


@pytest.mark.parametrize("config", [
    BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.125),
    BackboneConfig(arch="resnet50", width_multiplier=0.25),
])  # fmt: skip
def test_stem_and_width_are_recognised(tmp_path: Path, config: BackboneConfig) -> None:
    """As of our own encoders, under MoCo's names."""
    encoder = Encoder(config, 16)
    state = {f"encoder_q.{name}": tensor for name, tensor in encoder.backbone.state_dict().items()}
    head = encoder.projection_head.state_dict()
    state |= {f"encoder_q.fc.{name}": tensor for name, tensor in head.items()}
    moco = import_moco(write_moco(tmp_path / "moco.pth.tar", state), tmp_path / "moco.safetensors")
    assert load_pretrained(tmp_path / "moco.safetensors").description.backbone == config
    assert (moco["head_tensors_left_behind"], moco["other_tensors_left_behind"]) == (4, 0)


Q = "module.encoder_q."


def with_a_deeper_head(state: dict[str, Tensor]) -> None:
    for encoder in ("q", "k"):
        state[f"module.encoder_{encoder}.fc.4.weight"] = torch.zeros(4, 4)


def with_the_head_alone(state: dict[str, Tensor]) -> None:
    head = {name.replace("fc.", "head."): tensor for name, tensor in state.items() if f"{Q}fc." in name}
    state.clear()
    state.update(head)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda s: s.update({f"{Q}layer2.1.convolution.weight": s.pop(f"{Q}layer2.1.conv2.weight")}),
         r"missing: layer2\.1\.conv2\.weight \[16, 16, 3, 3\]; "
         r"left over: layer2\.1\.convolution\.weight \[16, 16, 3, 3\]"),
        (lambda s: s.pop(f"{Q}layer1.0.bn1.running_mean"), r"missing: layer1\.0\.bn1\.running_mean \[8\]\."),
        (lambda s: s.update({f"{Q}conv1.weight": torch.zeros(8, 3, 5, 5)}),
         r"of another shape: conv1\.weight \[8, 3, 5, 5\] where \[8, 3, "),
        (lambda s: s[f"{Q}layer3.0.conv1.weight"].fill_(torch.nan),
         r"with NaN or infinite values: layer3\.0\.conv1\.weight\."),
        (lambda s: s.update({f"{Q}bn1.weight": torch.ones(8, dtype=torch.int64)}),
         r"of another kind of number: bn1\.weight\."),
        (lambda s: s.pop("module.encoder_k.layer4.1.bn2.bias"),
         r"not mirror the query encoder: missing, left over or of another shape are layer4\.1\.bn2\.bias$"),
        (lambda s: s.update({"module.predictor.weight": torch.zeros(7, 5)}),
         r"1 tensors left over that belong to no MoCo checkpoint: predictor\.weight \[7, 5\]"),
        (with_a_deeper_head, r"neither MoCo-v1's .* nor MoCo-v2's .*fc\.4\.weight \[4, 4\]"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith(Q)],
         r"has no query encoder: none of its 126 tensors"),
        (with_the_head_alone, r"holds no backbone: .* A projection head alone cannot be evaluated"),
        (lambda s: s.update({"encoder_q.conv1.weight": s[f"{Q}conv1.weight"]}), r"holds tensors twice"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_named(tmp_path: Path, harm: Callable[[dict[str, Tensor]], Any], expected: str) -> None:
    state = narrow_moco_state()
    harm(state)
    checkpoint = write_moco(tmp_path / "moco.pth.tar", state)
    with pytest.raises(ValueError, match=expected):
        import_moco(checkpoint, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "it holds a list, not a dict with a state_dict"),
        ({"model": {}}, "it holds a dict with model, not a dict with a state_dict"),
        ({"state_dict": {"module.encoder_q.conv1.weight": 3}}, "is no plain tensor"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match=expected):
        import_moco(tmp_path / "other.pth.tar", tmp_path / "out.safetensors")


def test_files_that_are_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    good = write_moco(tmp_path / "moco.pth.tar", narrow_moco_state())
    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes(good.read_bytes()[:20_000])
    assert "cut.pth.tar" in refused(capsys, "import-moco", cut, "--out", out)
    assert "there is no checkpoint" in refused(capsys, "import-moco", tmp_path / "none.pth.tar", "--out", out)
    assert "does not end in .safetensors" in refused(capsys, "import-moco", good, "--out", tmp_path / "out.pth")
    assert "does not exist" in refused(capsys, "import-moco", good, "--out", tmp_path / "no" / "out.safetensors")
    assert not out.exists()
    succeeded(capsys, "import-moco", good, "--out", out)
    assert "exists already and is not overwritten" in refused(capsys, "import-moco", good, "--out", out)

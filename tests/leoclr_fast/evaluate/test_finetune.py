"""Fine-tuning on a part of the labels: against plain torch, by published lists, with a grid, and kills."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from dataset_tools.sources import open_source
from leoclr_fast.cli import run_command
from leoclr_fast.config import BackboneConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, fine_tune
from leoclr_fast.evaluate.protocols import FineTuneProtocol
from leoclr_fast.method.backbone import build_backbone
from leoclr_fast.run.checkpoint import list_checkpoints
from pipelines.augment import augmented_views
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import make_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder
from pipelines.views import LINEAR_TRAIN_VIEWS
from tests.leoclr_fast.evaluated import copy_of, evaluated, kept_results, killed, steps_of
from tests.leoclr_fast.training.test_bad_input import refused

SMALL = ["--epochs=3", "--batch-size=8", "--loader=resident"]
NARROW = BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.0625)


def train_loader(data: Path) -> Loader:
    split = open_source(data).splits["train"]
    order = TrainOrder(num_images=len(split), batch_size=8, seed=2)
    views = ViewConfig(image_size=16, crop_scale=(0.08, 1.0))
    config = LoaderConfig(name="resident", workers=1)
    return make_loader(split, LINEAR_TRAIN_VIEWS, views, config, order, seed=2, device=torch.device("cpu"))


def backbone_of_seed(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(NARROW)


def fine_tuned(
    backbone: nn.Module, loader: Loader, parameters: Hyperparameters, folder: Path, steps: int, precision: str = "fp64"
) -> nn.Module:
    stepper, display = steps_of(folder, steps)
    network = fine_tune(backbone, 3, loader, parameters, stepper, precision=precision, ranks=Ranks(), display=display)
    assert network is not None
    return network


def test_a_training_is_torchs(tiny_data: Path, tmp_path: Path) -> None:
    """Twelve steps against torch alone: Nesterov momentum, cosine decay, no weight decay on batch-norm, float64."""
    loader, backbone = train_loader(tiny_data), backbone_of_seed(0)
    parameters = Hyperparameters(lr=0.2, weight_decay=0.01, momentum=0.9, batch_size=8, batchnorm_momentum=0.05)
    ours = fine_tuned(backbone, loader, parameters, tmp_path / "none", 12)

    theirs = build_backbone(NARROW)
    theirs.load_state_dict(backbone.state_dict())
    theirs.fc = nn.Linear(32, 3)
    nn.init.normal_(theirs.fc.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(theirs.fc.bias)
    theirs.double()
    norms = [module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.05
    norm_names = {name for name, _ in theirs.named_parameters() if "bn" in name or "downsample.1" in name}
    assert len(norm_names) == 2 * len(norms)
    optimizer = torch.optim.SGD(
        [
            {"params": [parameter], "weight_decay": 0.0 if name in norm_names else 0.01}
            for name, parameter in theirs.named_parameters()
        ],
        lr=0.2,
        momentum=0.9,
        nesterov=True,
    )
    for step in range(12):
        epoch, step_in_epoch = divmod(step, 5)
        batch = next(iter(loader.batches(epoch, step_in_epoch)))
        (images,) = augmented_views(batch, loader.views, loader.view_config, seed=2, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * 0.5 * (1 + math.cos(math.pi * step / 12))
        optimizer.zero_grad()
        F.cross_entropy(theirs(images), batch.labels).backward()
        optimizer.step()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-11, msg=name)


def test_the_protocol_is_simclrs_with_the_papers_epochs() -> None:
    protocol = FineTuneProtocol(percent=(1,))
    assert (protocol.base_lr, protocol.momentum, protocol.weight_decay, protocol.batch_size) == (0.05, 0.9, 0.0, 256)
    published = 100 * np.array([12_811, 128_116]) / 1_281_167  # SimCLR's lists of 1 % and 10 %
    assert [protocol.num_epochs(percent) for percent in (1, *published, 10, 2, 100)] == [60, 60, 30, 30, 60, 30]
    assert FineTuneProtocol(percent=(1,), epochs=7).num_epochs(1) == 7


def test_a_share_of_the_labels_is_what_subset_lists(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """By --percent and by --list: the same labels, the same checksum, the same network."""
    run = copy_of(tiny_run, tmp_path)
    listed = evaluated_subset(capsys, tiny_data, tmp_path / "half.txt", percent=50)
    document = evaluated(capsys, "finetune", run, "--data", tiny_data, "--percent", 25, 50, *SMALL)
    quarter, half = document["evaluations"]
    assert (quarter["labels"], half["labels"], half["percent"], half["epochs"]) == (10, 20, 50, 3)
    assert half["labels_sha256"] == listed
    folders = {
        json.loads((folder / "settings.json").read_text())["percent"]: folder
        for folder in (run / "evaluations").iterdir()
    }
    names = {percent: set((folder / "labels.txt").read_text().split()) for percent, folder in folders.items()}
    assert names[25.0] < names[50.0]
    (by_list,) = evaluated(
        capsys, "finetune", run, "--data", tiny_data, "--list", tmp_path / "half.txt", *SMALL, "--out", tmp_path / "o"
    )["evaluations"]
    same = ("top1", "top5", "mean_per_class", "labels_sha256", "lr", "steps")
    assert {name: by_list[name] for name in same} == {name: half[name] for name in same}
    network = load_file(folders[50.0] / "network.safetensors")
    assert torch.equal(network["fc.weight"], load_file(tmp_path / "o" / "network.safetensors")["fc.weight"])
    assert network["fc.weight"].shape == (3, 32)
    assert half["lr"] == pytest.approx(0.05 * 8 / 256)
    assert [record["percent"] for record in kept_results(run)] == [25, 50, 50]


def evaluated_subset(capsys: pytest.CaptureFixture[str], data: Path, out: Path, percent: float) -> str:
    assert run_command(["subset", str(data), "--percent", str(percent), "--out", str(out)]) == 0
    capsys.readouterr()
    return hashlib.sha256(out.read_bytes()).hexdigest()


def test_a_grid_is_tried_on_held_out_labels_and_then_all_are_learned_from(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    arguments = ["finetune", tiny_run, "--data", tiny_data, "--percent", 100, *SMALL]
    (found,) = evaluated(capsys, *arguments, "--base-lr-grid", 0.001, 3, 1e38, "--out", tmp_path / "grid")[
        "evaluations"
    ]
    scores = [entry["holdout_top1"] for entry in found["grid"]]
    assert [entry["lr"] for entry in found["grid"]] == pytest.approx([lr * 8 / 256 for lr in (0.001, 3, 1e38)])
    assert scores[2] is None
    assert found["lr"] == found["grid"][scores.index(max(scores[:2]))]["lr"]
    assert (found["holdout_images"], found["steps"]) == (4, 15)
    assert list_checkpoints(tmp_path / "grid" / "trial-001") == []
    base_lr = found["lr"] * 256 / 8
    (alone,) = evaluated(capsys, *arguments, "--base-lr", base_lr, "--out", tmp_path / "one")["evaluations"]
    networks = [load_file(tmp_path / name / "network.safetensors") for name in ("grid", "one")]
    assert all(torch.equal(networks[0][name], tensor) for name, tensor in networks[1].items())
    assert alone["grid"] is None
    message = refused(capsys, *arguments, "--base-lr", 1e38, "--out", tmp_path / "nan", "--device=cpu")
    assert "infinite or NaN" in message


def test_killed_anywhere_it_ends_the_same(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """In the first trial, in the second, in the final training: what was finished is not done again."""
    arguments = ["finetune", tiny_run, "--data", tiny_data, "--percent", 100, *SMALL, "--base-lr-grid", 0.1, 1]
    arguments.append("--checkpoint-every-s=0")
    whole = evaluated(capsys, *arguments, "--out", tmp_path / "whole")
    folder = tmp_path / "killed"
    for after, steps in ((2, [4, 8]), (3, [12, 4, 8]), (2, [12, 5])):  # 4 steps an epoch in trials, then 5
        with killed(after) as saved:
            evaluated(capsys, *arguments, "--out", folder)
        assert saved == steps  # no epoch twice
    assert [path.name for path in sorted(folder.glob("trial-*.json"))] == ["trial-001.json", "trial-002.json"]
    assert list_checkpoints(folder / "final")
    assert not (folder / "result.json").exists()
    assert evaluated(capsys, *arguments, "--out", folder) == whole
    networks = [load_file(path / "network.safetensors") for path in (folder, tmp_path / "whole")]
    assert all(torch.equal(networks[0][name], tensor) for name, tensor in networks[1].items())
    assert not list_checkpoints(folder / "final")


def test_lists_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    def message(*flags: object) -> str:
        return refused(capsys, "finetune", tiny_run, "--data", tiny_data, *SMALL, "--device=cpu", *flags)

    assert "give either --percent P … or --list FILE" in message()
    assert "give either --percent" in message("--percent", 10, "--list", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("train/class0/000.png\ntrain/class0/nobody.png\n")
    assert "1 of the 2 images" in (text := message("--list", tmp_path / "a.txt"))
    assert "'train/class0/nobody.png'" in text
    (tmp_path / "b.txt").write_text("train/class0/000.png\ntrain/class1/001.png\n")
    assert "has no image of 1 of the 3 classes: class2" in (text := message("--list", tmp_path / "b.txt"))
    assert "Learn from more images" in text
    assert "no list" in message("--list", tmp_path / "nowhere.txt")
    assert "--percent 0 is not allowed" in message("--percent", 0)
    assert "fewer than one batch of 8" in message("--percent", 10)
    assert "--out is for one share" in message("--percent", 50, 100, "--out", tmp_path / "o")

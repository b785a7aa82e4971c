"""Fine-tuning on a part of the labels: against plain torch, by published lists, with a grid, and kills."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataset_tools.sources import open_source
from leoclr_fast.cli import run_command
from leoclr_fast.config import BackboneConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.data import EvaluationLoaders
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, fine_tune
from leoclr_fast.evaluate.protocols import FineTuneProtocol
from leoclr_fast.method.backbone import build_backbone
from pipelines.augment import augmented_views
from tests.leoclr_fast.evaluate.conftest import Commands
from tests.leoclr_fast.evaluated import kept_results, killed, same_files, steps_of
from tests.leoclr_fast.evaluation_rank_program import CPU, RESIDENT, VIEWS
from tests.leoclr_fast.weights_files import drawn_backbone

SMALL = ["--epochs=3", "--batch-size=8", "--loader=resident"]
NARROW = BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.0625)


def test_a_training_is_torchs(tiny_data: Path, tmp_path: Path) -> None:
    """Twelve steps against torch alone: Nesterov momentum, cosine decay, no weight decay on batch-norm, float64."""
    split, backbone = open_source(tiny_data).splits["train"], drawn_backbone(NARROW)
    loaders = EvaluationLoaders(VIEWS, RESIDENT, 8, 2, CPU, Ranks())
    loader = loaders.random_crops(split, loaders.train_order(split))
    parameters = Hyperparameters(lr=0.2, weight_decay=0.01, batch_size=8, batchnorm_momentum=0.05)
    ours = fine_tune(backbone, 3, loader, parameters, steps_of(tmp_path, 12), "fp64")
    assert ours is not None

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
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)


def test_the_protocol_is_simclrs_with_the_papers_epochs() -> None:
    protocol = FineTuneProtocol(percent=(1,))
    assert (protocol.base_lr, protocol.weight_decay, protocol.batch_size) == (0.05, 0.0, 256)
    published = 100 * np.array([12_811, 128_116]) / 1_281_167  # SimCLR's lists of 1 % and 10 %
    assert [protocol.num_epochs(percent) for percent in (1, *published, 10, 2, 100)] == [60, 60, 30, 30, 60, 30]
    assert FineTuneProtocol(percent=(1,), epochs=7).num_epochs(1) == 7


def test_a_share_of_the_labels_is_what_subset_lists(
    capsys: pytest.CaptureFixture[str], evaluate: Commands, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    """By --percent and by --list: the same labels, the same checksum, the same network."""
    listed = tmp_path / "half.txt"
    assert run_command(["subset", str(tiny_data), "--percent", "50", "--out", str(listed)]) == 0
    capsys.readouterr()
    quarter, half = evaluate("finetune", run, "--percent", 25, 50, *SMALL)["evaluations"]
    assert (quarter["labels"], half["labels"], half["percent"], half["epochs"]) == (10, 20, 50, 3)
    assert half["labels_sha256"] == hashlib.sha256(listed.read_bytes()).hexdigest()
    folders = {
        json.loads((folder / "settings.json").read_text())["percent"]: folder
        for folder in (run / "evaluations").iterdir()
    }
    names = {percent: set((folder / "labels.txt").read_text().split()) for percent, folder in folders.items()}
    assert names[25.0] < names[50.0]
    (by_list,) = evaluate("finetune", run, "--list", listed, *SMALL, "--out", tmp_path / "o")["evaluations"]
    same = ("top1", "top5", "mean_per_class", "labels_sha256", "lr", "steps")
    assert {name: by_list[name] for name in same} == {name: half[name] for name in same}
    assert same_files("network.safetensors", folders[50.0], tmp_path / "o")
    assert half["lr"] == pytest.approx(0.05 * 8 / 256)
    assert [record["percent"] for record in kept_results(run)] == [25, 50, 50]


def test_a_grid_is_tried_on_held_out_labels_and_then_all_are_learned_from(
    evaluate: Commands, tiny_run: Path, tmp_path: Path
) -> None:
    arguments = [tiny_run, "--percent", 100, *SMALL, "--out"]
    grid = ["--base-lr-grid", 0.001, 3, 1e38]
    (found,) = evaluate("finetune", *arguments, tmp_path / "grid", *grid)["evaluations"]
    scores = [entry["holdout_top1"] for entry in found["grid"]]
    assert [entry["lr"] for entry in found["grid"]] == pytest.approx([lr * 8 / 256 for lr in (0.001, 3, 1e38)])
    assert scores[2] is None
    assert found["lr"] == found["grid"][scores.index(max(scores[:2]))]["lr"]
    assert (found["holdout_images"], found["steps"]) == (4, 15)
    assert not (tmp_path / "grid" / "checkpoints").exists()
    (alone,) = evaluate("finetune", *arguments, tmp_path / "one", "--base-lr", found["lr"] * 256 / 8)["evaluations"]
    assert same_files("network.safetensors", tmp_path / "grid", tmp_path / "one")
    assert alone["grid"] is None
    assert "infinite or NaN" in evaluate.refused("finetune", *arguments, tmp_path / "nan", "--base-lr", 1e38)


def test_killed_anywhere_it_ends_the_same(evaluate: Commands, tiny_run: Path, tmp_path: Path) -> None:
    """In the first trial, in the second, in the final training: what was finished is not done again."""
    arguments = [tiny_run, "--percent", 100, *SMALL, "--base-lr-grid", 0.1, 1, "--checkpoint-every-s=0", "--out"]
    whole = evaluate("finetune", *arguments, tmp_path / "whole")
    folder = tmp_path / "killed"
    for after, steps in ((2, [4, 8]), (3, [12, 4, 8]), (2, [12, 5])):  # 4 steps an epoch in trials, then 5
        with killed(after) as saved:
            evaluate("finetune", *arguments, folder)
        assert saved == steps  # no epoch twice
    assert [path.name for path in sorted(folder.glob("trial-*.json"))] == ["trial-001.json", "trial-002.json"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["final"]  # finished trials leave none
    assert evaluate("finetune", *arguments, folder) == whole
    assert same_files("network.safetensors", folder, tmp_path / "whole")
    assert not (folder / "checkpoints").exists()


def test_lists_that_do_not_fit_are_refused(evaluate: Commands, tiny_run: Path, tmp_path: Path) -> None:
    def message(*flags: object) -> str:
        return evaluate.refused("finetune", tiny_run, *SMALL, *flags)

    assert "give either --percent P … or --list FILE" in message()
    assert "give either --percent" in message("--percent", 10, "--list", tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("train/class0/000.png\ntrain/class1/001.png\n")
    assert "has no image of 1 of the 3 classes: class2" in (text := message("--list", tmp_path / "b.txt"))
    assert "Learn from more images" in text
    assert "no list" in message("--list", tmp_path / "nowhere.txt")
    assert "--percent 0 is not allowed" in message("--percent", 0)
    assert "fewer than one batch of 8" in message("--percent", 10)
    assert "--out is for one share" in message("--percent", 50, 100, "--out", tmp_path / "o")

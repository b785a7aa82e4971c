"""Linear classification: against SGD that is written out, with a frozen backbone, a grid, and kills."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from dataset_tools.stop_signals import StoppedAtOnce, StoppedBySignalError
from leoclr_fast.evaluate import linear
from leoclr_fast.evaluate.accuracy import accuracy
from leoclr_fast.evaluate.evaluation import Evaluation
from leoclr_fast.evaluate.fine_tuning import new_classifier
from leoclr_fast.evaluate.linear import train_heads
from leoclr_fast.evaluate.protocols import LinearProtocol, TrainingOptions
from leoclr_fast.run.checkpoint import list_checkpoints
from tests.leoclr_fast.evaluate.conftest import Commands
from tests.leoclr_fast.evaluated import kept_results, killed, same_files, steps_of
from tests.leoclr_fast.long_call import LONG_S, long_call

SMALL = ["--epochs=6", "--batch-size=16", "--loader=resident"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_each_classifier_is_trained_as_if_alone(weight_decay: float, tmp_path: Path) -> None:
    """Three learning rates at once: momentum 0.9 written out, falling rates, a smaller last batch; they begin alike."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(22, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (22,), generator=generator)
    parts = list(zip(features.split(9), labels.split(9), strict=True))
    protocol = LinearProtocol(epochs=4, lr_grid=(0.01, 0.5, 30.0), weight_decay=weight_decay, milestones=(2,))
    heads = [new_classifier(7, 5, seed=0).double() for _ in protocol.lrs]
    before = new_classifier(7, 5, seed=0).double()
    steps = steps_of(tmp_path, 4 * len(parts))
    losses = train_heads(heads, lambda _, start: parts[start:], lambda part: part, len(parts), protocol, steps)
    for number, lr in enumerate(protocol.lrs):
        weight, bias = (tensor.detach().clone().requires_grad_() for tensor in before.parameters())
        velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for epoch in range(4):
            epoch_losses = []
            for part, own_labels in parts:
                loss = F.cross_entropy(part @ weight.T + bias, own_labels)
                gradients = torch.autograd.grad(loss, (weight, bias))
                for tensor, speed, gradient in zip((weight, bias), velocity, gradients, strict=True):
                    speed.mul_(0.9).add_(gradient + weight_decay * tensor.detach())
                    tensor.data -= lr * (0.1 if epoch >= 2 else 1.0) * speed
                epoch_losses.append(loss.item())
        assert losses[number] == pytest.approx(sum(epoch_losses) / 3, rel=1e-9)
        torch.testing.assert_close(heads[number].weight.data, weight.data, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(heads[number].bias.data, bias.data, rtol=1e-9, atol=1e-12)


def test_accuracies_by_hand() -> None:
    """Four images of class 0, one of class 2, none of class 1."""
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3], [1, 2, 3]])
    found = accuracy(scores, torch.tensor([0, 0, 0, 0, 2]))
    assert (found.top1, found.top5) == (pytest.approx(80), 100)
    assert found.mean_per_class == pytest.approx((75 + 100) / 2)
    six = torch.arange(6.0).repeat(2, 1)
    assert accuracy(six, torch.tensor([0, 1])).top5 == pytest.approx(50)  # class 0 is the sixth


def test_the_protocol_is_mocos() -> None:
    protocol = LinearProtocol()
    assert (protocol.epochs, protocol.batch_size, protocol.lrs) == (100, 256, (30.0,))
    assert protocol.weight_decay == 0.0
    assert [round(30 * protocol.lr_factor(epoch), 6) for epoch in (0, 59, 60, 79, 80, 99)] == [30, 30, 3, 3, 0.3, 0.3]
    assert LinearProtocol(epochs=10).lr_drops == (6, 8)
    assert LinearProtocol(epochs=10, milestones=()).lr_factor(9) == 1
    for wrong in ({"lr": 0.0}, {"lr_grid": (1.0, 1.0)}, {"epochs": 0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=r"not allowed|twice"):
            LinearProtocol(**wrong)


def test_linear_and_what_it_leaves(evaluate: Commands, run: Path) -> None:
    """The backbone is bit-identical, statistics included; the result is in the run, the classifier beside it."""
    weights = (run / "final.safetensors").read_bytes()
    result = evaluate("linear", run, *SMALL)
    assert (run / "final.safetensors").read_bytes() == weights
    assert result["backbone_sha256_before"] == result["backbone_sha256_after"] == result["weights_sha256"]
    assert (result["evaluator"], result["estimate"], result["lr"], result["grid"]) == ("linear", False, 30.0, None)
    assert (result["train_images"], result["val_images"], result["classes"]) == (40, 12, 3)
    assert result["settings"]["lr_drops"] == [4, 5]
    (kept,) = kept_results(run)
    assert {key: kept[key] for key in result} == result
    (folder,) = (run / "evaluations").iterdir()
    assert load_file(folder / "classifier.safetensors")["fc.weight"].shape == (3, 32)
    assert not (folder / "checkpoints").exists()

    assert evaluate("linear", run, *SMALL) == result
    assert len(kept_results(run)) == 1
    untrained = evaluate("linear", run, *SMALL, "--untrained")
    assert untrained["weights_sha256"] != result["weights_sha256"]
    assert [record["untrained"] for record in kept_results(run)] == [False, True]


def test_a_backbone_that_changes_is_noticed(monkeypatch: pytest.MonkeyPatch, tiny_data: Path, run: Path) -> None:
    """Batch-norm left in training mode: its statistics move, without any gradient."""
    monkeypatch.setattr(Evaluation, "frozen_backbone", lambda own: own.pretrained.backbone.requires_grad_(False))
    protocol, options = LinearProtocol(epochs=1, batch_size=16), TrainingOptions(device="cpu")
    with pytest.raises(RuntimeError, match="changed during linear evaluation"):
        linear.run(run, tiny_data, protocol, options)


def test_the_grid_is_chosen_without_a_look_at_val(
    evaluate: Commands, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    """With the classes of val changed round the grid and the choice stay; a learning rate that diverges is reported."""
    turned = tmp_path / "turned"
    shutil.copytree(tiny_data / "train", turned / "train")
    for number in range(3):
        shutil.copytree(tiny_data / "val" / f"class{number}", turned / "val" / f"class{(number + 1) % 3}")
    grid = ["--lr-grid", 0.01, 1, 1e38]
    straight, other = (evaluate("linear", run, "--data", data, *SMALL, *grid) for data in (tiny_data, turned))
    assert straight["grid"] == other["grid"]
    assert straight["lr"] == other["lr"]
    assert straight["settings"]["data_fingerprint"] != other["settings"]["data_fingerprint"]
    assert straight["holdout_images"] == 4
    by_lr = {entry["lr"]: entry["holdout_top1"] for entry in straight["grid"]}
    assert by_lr[1e38] is None
    assert by_lr[straight["lr"]] == max(score for score in by_lr.values() if score is not None)
    message = evaluate.refused("linear", run, *SMALL, "--lr", 1e38)
    assert "every learning rate (1e+38); give a lower --lr" in message


@pytest.mark.parametrize("extra", [["--lr-grid", "0.1", "3"], ["--cached-features"]])
def test_killed_after_any_epoch_it_ends_the_same(
    evaluate: Commands, tiny_run: Path, tmp_path: Path, extra: list[str]
) -> None:
    arguments = [tiny_run, *SMALL, *extra, "--checkpoint-every-s=0", "--out"]
    whole = evaluate("linear", *arguments, tmp_path / "whole")
    name = "linear_cached_features" if whole["estimate"] else "linear"
    assert (whole["evaluator"], whole["estimate"]) == (name, "--cached-features" in extra)
    for epochs in (1, 2, 1):
        with killed(after=epochs):
            evaluate("linear", *arguments, tmp_path / "killed")
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints" / "training")] == [
        f"step-{epochs * 3:08d}" for epochs in (3, 4)
    ]
    assert evaluate("linear", *arguments, tmp_path / "killed") == whole
    assert same_files("classifier.safetensors", tmp_path / "whole", tmp_path / "killed")


def test_sigterm_saves_in_the_middle_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    """After five steps of three an epoch, of a file and without --out: nothing is learned twice, nothing left out."""
    protocol, options = LinearProtocol(epochs=4, batch_size=16), TrainingOptions(device="cpu", precision="fp64")
    weights = run / "final.safetensors"
    whole = linear.run(weights, tiny_data, protocol, replace(options, out=tmp_path / "whole"))
    steps = Mock(side_effect=lambda: steps.call_count == 5 and os.kill(os.getpid(), signal.SIGTERM))
    encode = linear.encode_batch
    monkeypatch.setattr(linear, "encode_batch", lambda *given: (steps(), encode(*given))[1])
    with pytest.raises(StoppedBySignalError, match="stopped by SIGTERM after step 5 of 12"):
        linear.run(weights, tiny_data, protocol, options)
    (folder,) = weights.with_name("final.safetensors.evaluations").iterdir()
    assert [path.name for path in list_checkpoints(folder / "checkpoints" / "training")] == ["step-00000005"]
    for _ in range(2):
        assert linear.run(weights, tiny_data, protocol, options) == whole
        assert steps.call_count == 12


def test_a_signal_while_it_is_tested_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    """The training is kept: the same call goes on with the test."""
    protocol, options = LinearProtocol(epochs=2, lr=3.0), TrainingOptions(device="cpu", out=tmp_path / "linear")
    with monkeypatch.context() as changed:
        changed.setattr(linear, "extract_features", long_call(linear.extract_features, 1))
        start = time.monotonic()
        with pytest.raises(StoppedAtOnce, match=r"stopped by SIGTERM; what was saved before is kept"):
            linear.run(run, tiny_data, protocol, options)
        assert time.monotonic() - start < LONG_S
    monkeypatch.setattr(linear, "encode_batch", None)
    assert linear.run(run, tiny_data, protocol, options)["lr"] == 3.0


def test_folders_that_are_anothers_are_refused(evaluate: Commands, tiny_run: Path, tmp_path: Path) -> None:
    evaluate("linear", tiny_run, *SMALL, "--out", tmp_path / "out")
    message = evaluate.refused("linear", tiny_run, *SMALL, "--out", tmp_path / "out", "--lr=3")
    assert "holds another evaluation: lr: 30.0 there, 3.0 here" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    message = evaluate.refused("linear", tiny_run, *SMALL, "--out", tmp_path / "mine")
    assert "holds other files (thesis.txt…) and no evaluation" in message


def test_a_file_of_weights_needs_no_run(evaluate: Commands, run: Path) -> None:
    """But a place beside it, or another by --out."""
    weights, beside = run / "final.safetensors", run / "final.safetensors.evaluations"
    beside.write_text("no folder")
    message = evaluate.refused("linear", weights, *SMALL)
    assert f"cannot write to {beside}/linear-" in message
    assert "give --out a folder that the evaluation can work in" in message
    beside.unlink()
    of_run, of_file = evaluate("linear", run, *SMALL), evaluate("linear", weights, *SMALL)
    for name in ("top1", "train_loss", "settings"):
        assert of_file[name] == of_run[name]
    assert len(kept_results(run)) == 1
    assert [folder.name for folder in beside.iterdir()] == [folder.name for folder in (run / "evaluations").iterdir()]
    assert evaluate("linear", weights, *SMALL) == of_file
    assert "--untrained needs a run folder" in evaluate.refused("linear", weights, "--untrained")


def test_what_is_not_whole_in_val_stands_in_the_result(
    evaluate: Commands, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """An image that cannot be read, and a class without images."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "val" / "class1" / "004.png").write_bytes(b"no image")
    shutil.rmtree(data / "val" / "class2")
    result = evaluate("linear", tiny_run, "--data", data, *SMALL, "--out", tmp_path / "out")
    assert list(result["unreadable_images"]) == ["val/class1/004.png"]
    assert result["note"] == "val has no image of 1 of the 3 classes."


def test_noise_has_no_accuracy(evaluate: Commands, tiny_run: Path) -> None:
    message = evaluate.refused("linear", tiny_run, "--loader=synthetic")
    assert "the synthetic loader hands out noise" in message

"""Linear classification: against torch's SGD and scikit-learn, with a frozen backbone, a grid, and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from dataset_tools.stop_signals import StoppedAtOnce, StoppedBySignalError
from leoclr_fast.cli import run_command
from leoclr_fast.evaluate import linear
from leoclr_fast.evaluate.accuracy import accuracy
from leoclr_fast.evaluate.data import open_labelled_data
from leoclr_fast.evaluate.linear import BackboneChangedError
from leoclr_fast.evaluate.linear_classifiers import LinearClassifiers
from leoclr_fast.evaluate.protocols import LinearProtocol, TrainingOptions
from leoclr_fast.run.checkpoint import list_checkpoints
from tests.leoclr_fast.evaluate.test_knn import clusters
from tests.leoclr_fast.evaluated import copy_of, evaluated, kept_results, killed
from tests.leoclr_fast.long_call import LONG_S, long_call
from tests.leoclr_fast.training.test_bad_input import refused

SMALL = ["--epochs=6", "--batch-size=16", "--loader=resident"]
CPU = torch.device("cpu")


def classifiers(lrs: tuple[float, ...], dim: int, num_classes: int, **changes: Any) -> LinearClassifiers:
    settings = {"momentum": 0.9, "weight_decay": 0.0, "seed": 0, "device": CPU, "dtype": torch.float64, **changes}
    return LinearClassifiers(lrs, dim, num_classes, **settings)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_each_classifier_steps_as_torchs_sgd(weight_decay: float) -> None:
    """Three learning rates at once are three trainings alone, to float64's rounding; a falling learning rate too."""
    lrs = (0.01, 0.5, 30.0)
    ours = classifiers(lrs, 7, 5, weight_decay=weight_decay)
    theirs = [nn.Linear(7, 5, dtype=torch.float64) for _ in lrs]
    for head in theirs:
        head.weight.data.copy_(ours.weight[0])
        head.bias.data.zero_()
    optimizers = [
        torch.optim.SGD(head.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
        for head, lr in zip(theirs, lrs, strict=True)
    ]
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        factor = 1.0 if step < 8 else 0.1
        features = torch.randn(9 if step % 2 else 4, 7, dtype=torch.float64, generator=generator)
        labels = torch.randint(0, 5, (len(features),), generator=generator)
        losses = ours.step(features, labels, factor)
        for place, (head, optimizer, lr) in enumerate(zip(theirs, optimizers, lrs, strict=True)):
            optimizer.param_groups[0]["lr"] = lr * factor
            loss = F.cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert losses[place].item() == pytest.approx(loss.item(), rel=1e-12)
            torch.testing.assert_close(ours.weight[place], head.weight.data, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(ours.bias[place], head.bias.data, rtol=1e-11, atol=1e-13)
    assert ours.logits(features).shape == (3, len(features), 5)
    torch.testing.assert_close(ours.logits(features)[1], theirs[1](features).detach(), rtol=1e-11, atol=1e-12)


def test_at_convergence_it_is_scikit_learns_logistic_regression() -> None:
    """The same features, no penalty, float64: accuracies within a point, and the same probabilities."""
    features, labels = clusters(1500, 5)
    labels = torch.where(torch.arange(1500) % 4 == 0, torch.arange(1500) % 7, labels)  # else they could be separated
    queries, query_labels = clusters(500, 6)
    theirs = LogisticRegression(C=np.inf, max_iter=2000, tol=1e-8).fit(features.numpy(), labels.numpy())
    ours = classifiers((10.0,), 16, 7)
    for step in range(1500):
        ours.step(features, labels, 0.1 ** (step // 1000))
    scores = ours.logits(queries)[0]
    their_accuracy = 100 * theirs.score(queries.numpy(), query_labels.numpy())
    assert 30 < their_accuracy < 99
    assert abs(accuracy(scores, query_labels).top1 - their_accuracy) < 1
    difference = F.softmax(scores, dim=1) - torch.from_numpy(theirs.predict_proba(queries.numpy()))
    assert difference.abs().max() < 1e-4


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
    assert (protocol.momentum, protocol.weight_decay, protocol.crop_scale) == (0.9, 0.0, (0.08, 1.0))
    assert [round(30 * protocol.lr_factor(epoch), 6) for epoch in (0, 59, 60, 79, 80, 99)] == [30, 30, 3, 3, 0.3, 0.3]
    assert LinearProtocol(epochs=10).lr_drops == (6, 8)
    assert LinearProtocol(epochs=10, milestones=()).lr_factor(9) == 1
    for wrong in ({"lr": 0.0}, {"lr_grid": (1.0, 1.0)}, {"epochs": 0}, {"holdout_images": 0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=r"not allowed|twice"):
            LinearProtocol(**wrong)


def test_linear_and_what_it_leaves(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """The backbone is bit-identical, statistics included; the result is in the run, the classifier beside it."""
    run = copy_of(tiny_run, tmp_path)
    weights = (run / "final.safetensors").read_bytes()
    result = evaluated(capsys, "linear", run, "--data", tiny_data, *SMALL)
    assert (run / "final.safetensors").read_bytes() == weights
    assert result["backbone_sha256_before"] == result["backbone_sha256_after"] == result["weights_sha256"]
    assert (result["evaluator"], result["estimate"], result["lr"], result["grid"]) == ("linear", False, 30.0, None)
    assert (result["train_images"], result["val_images"], result["classes"]) == (40, 12, 3)
    assert result["settings"]["lr_drops"] == [4, 5]
    (kept,) = kept_results(run)
    assert {key: kept[key] for key in result} == result
    (folder,) = (run / "evaluations").iterdir()
    assert load_file(folder / "classifier.safetensors")["fc.weight"].shape == (3, 32)
    assert not list(folder.glob("*/step-*"))

    again = evaluated(capsys, "linear", run, "--data", tiny_data, *SMALL)
    assert again == result
    assert len(kept_results(run)) == 1
    untrained = evaluated(capsys, "linear", run, "--data", tiny_data, *SMALL, "--untrained")
    assert untrained["weights_sha256"] != result["weights_sha256"]
    assert [record["untrained"] for record in kept_results(run)] == [False, True]


def on_cpu(out: Path | None, precision: Any = "fp32") -> TrainingOptions:
    return TrainingOptions(device="cpu", precision=precision, out=out)


def test_a_backbone_that_changes_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Batch-norm left in training mode: its statistics move, without any gradient."""
    monkeypatch.setattr(linear, "freeze", lambda backbone: backbone.requires_grad_(False).train())
    protocol = LinearProtocol(epochs=1, batch_size=16)
    with pytest.raises(BackboneChangedError, match="changed during linear evaluation"):
        linear.run(tiny_run, tiny_data, protocol, on_cpu(tmp_path / "out"))


def test_the_grid_is_chosen_without_a_look_at_val(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """With the classes of val changed round the grid and the choice stay; a learning rate that diverges is reported."""
    turned = tmp_path / "turned"
    shutil.copytree(tiny_data, turned)
    for number in range(3):
        os.rename(turned / "val" / f"class{number}", turned / "val" / f"moved{number}")
    for number in range(3):
        os.rename(turned / "val" / f"moved{number}", turned / "val" / f"class{(number + 1) % 3}")
    run = copy_of(tiny_run, tmp_path)
    grid = ["--lr-grid", 0.01, 1, 1e38]
    straight, other = (evaluated(capsys, "linear", run, "--data", data, *SMALL, *grid) for data in (tiny_data, turned))
    assert straight["grid"] == other["grid"]
    assert straight["lr"] == other["lr"]
    assert straight["settings"]["data_fingerprint"] != other["settings"]["data_fingerprint"]
    assert straight["holdout_images"] == 4
    by_lr = {entry["lr"]: entry["holdout_top1"] for entry in straight["grid"]}
    assert by_lr[1e38] is None
    assert by_lr[straight["lr"]] == max(score for score in by_lr.values() if score is not None)
    message = refused(capsys, "linear", run, "--data", tiny_data, *SMALL, "--lr", 1e38, "--device=cpu")
    assert "every learning rate (1e+38); give a lower --lr" in message


def test_a_grid_of_one_pass_is_each_learning_rate_alone(tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    """The same held-out images, the same features: what a classifier becomes does not depend on its neighbours."""
    both = LinearProtocol(epochs=2, batch_size=16, lr_grid=(0.1, 2.0))
    together = linear.run(tiny_run, tiny_data, both, on_cpu(tmp_path / "both", "fp64")).values
    for entry in together["grid"]:
        one = LinearProtocol(epochs=2, batch_size=16, lr_grid=(entry["lr"],))
        alone = linear.run(tiny_run, tiny_data, one, on_cpu(tmp_path / f"{entry['lr']}", "fp64")).values
        assert alone["grid"][0]["holdout_top1"] == entry["holdout_top1"]
        assert alone["grid"][0]["train_loss"] == pytest.approx(entry["train_loss"], rel=1e-12)


@pytest.mark.parametrize("extra", [[], ["--lr-grid", "0.1", "3"], ["--cached-features"]])
def test_killed_after_any_epoch_it_ends_the_same(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path, extra: list[str]
) -> None:
    arguments = ["linear", tiny_run, "--data", tiny_data, *SMALL, *extra, "--checkpoint-every-s=0"]
    whole = evaluated(capsys, *arguments, "--out", tmp_path / "whole")
    name = "linear_cached_features" if whole["estimate"] else "linear"
    assert (whole["evaluator"], whole["estimate"]) == (name, "--cached-features" in extra)
    assert whole["backbone_sha256_before"] == whole["backbone_sha256_after"]
    for epochs in (1, 2, 1):
        with killed(after=epochs):
            evaluated(capsys, *arguments, "--out", tmp_path / "killed")
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "training")] == [
        f"step-{epochs * 3:08d}" for epochs in (3, 4)
    ]
    assert evaluated(capsys, *arguments, "--out", tmp_path / "killed") == whole
    files = [load_file(tmp_path / name / "classifier.safetensors")["fc.weight"] for name in ("whole", "killed")]
    assert torch.equal(*files)


def test_sigterm_saves_in_the_middle_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """After five steps of three an epoch, of a file and without --out: nothing is learned twice, nothing left out."""
    protocol, stopped = LinearProtocol(epochs=4, batch_size=16), on_cpu(None, "fp64")
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny_run / "final.safetensors", weights)
    whole = linear.run(weights, tiny_data, protocol, on_cpu(tmp_path / "whole", "fp64")).values
    step = LinearClassifiers.step

    def terminated(self: LinearClassifiers, *args: Any) -> torch.Tensor:
        terminated.steps += 1  # type: ignore[attr-defined]
        if terminated.steps == 5:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    terminated.steps = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(LinearClassifiers, "step", terminated)
    with pytest.raises(StoppedBySignalError, match="stopped by SIGTERM after step 5 of 12"):
        linear.run(weights, tiny_data, protocol, stopped)
    (folder,) = weights.with_name("weights.safetensors.evaluations").iterdir()
    assert [path.name for path in list_checkpoints(folder / "training")] == ["step-00000005"]
    assert linear.run(weights, tiny_data, protocol, stopped).values == whole
    assert terminated.steps == 12  # type: ignore[attr-defined]
    assert linear.run(weights, tiny_data, protocol, stopped).values == whole
    assert terminated.steps == 12  # type: ignore[attr-defined]


def test_a_signal_while_it_is_tested_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """The training is kept: the same call goes on with the test."""
    weights = copy_of(tiny_run, tmp_path)
    protocol, options = LinearProtocol(epochs=2, lr=3.0), TrainingOptions(device="cpu", out=tmp_path / "linear")
    with monkeypatch.context() as changed:
        changed.setattr(linear, "extract_features", long_call(linear.extract_features, 1))
        start = time.monotonic()
        with pytest.raises(StoppedAtOnce, match=r"stopped by SIGTERM; what was saved before is kept"):
            linear.run(weights, tiny_data, protocol, options)
        assert time.monotonic() - start < LONG_S
    monkeypatch.setattr(LinearClassifiers, "step", None)
    assert linear.run(weights, tiny_data, protocol, options).values["lr"] == 3.0


def test_max_steps_pauses(capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    """Steps are counted in all, in the middle of an epoch too; a pause leaves no result, and the end is the same."""
    run = copy_of(tiny_run, tmp_path)
    arguments = ["linear", run, "--data", tiny_data, *SMALL]
    for asked, step in ((4, 4), (7, 7), (2, 7)):
        paused = evaluated(capsys, *arguments, "--max-steps", asked)
        assert (paused["complete"], paused["step"], paused["training"]) == (False, step, "training")
        assert paused["out"] == str(next((run / "evaluations").iterdir()))
        assert kept_results(run) == []
    assert run_command([*map(str, arguments), "--device=cpu", "--max-steps=7"]) == 0
    said = capsys.readouterr().out
    assert "paused after step 7, as --max-steps asks" in said
    assert "the same command without --max-steps continues" in said
    ended = evaluated(capsys, *arguments, "--max-steps=18")
    assert ended == evaluated(capsys, *arguments[:4], *SMALL, "--out", tmp_path / "whole")
    assert "max steps 0 is not allowed" in refused(capsys, *arguments, "--max-steps=0", "--device=cpu")


def test_damaged_checkpoints_name_their_folder(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """The newest damaged: the one before is taken. All damaged: the evaluation's folder is to go, not the run."""
    run = copy_of(tiny_run, tmp_path)
    arguments = ["linear", run, "--data", tiny_data, *SMALL]
    for steps in (4, 7):
        evaluated(capsys, *arguments, "--max-steps", steps)
    training = next((run / "evaluations").iterdir()) / "training"
    assert len(list_checkpoints(training)) == 2
    (list_checkpoints(training)[-1] / "state.pt").write_bytes(b"cut short")
    assert evaluated(capsys, *arguments, "--max-steps=5")["step"] == 5
    for checkpoint in list_checkpoints(training):
        (checkpoint / "state.pt").write_bytes(b"cut short")
    assert run_command([*map(str, arguments), "--device=cpu"]) == 1
    message = capsys.readouterr().err
    assert f"every checkpoint in {training} is damaged (" in message
    assert "delete this folder, and no other" in message
    shutil.rmtree(training)
    whole = evaluated(capsys, *arguments, "--out", tmp_path / "whole")
    assert evaluated(capsys, *arguments) == whole


def test_another_evaluation_in_the_same_folder_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    arguments = ["linear", tiny_run, "--data", tiny_data, *SMALL, "--out", tmp_path / "out"]
    evaluated(capsys, *arguments)
    message = refused(capsys, *arguments, "--lr=3", "--device=cpu")
    assert "holds another evaluation: lr: 30.0 there, 3.0 here" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    message = refused(capsys, *arguments[:-1], tmp_path / "mine", "--device=cpu")
    assert "holds other files (thesis.txt…) and no evaluation" in message


def test_a_file_of_weights_needs_no_run(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run = copy_of(tiny_run, tmp_path)
    of_run = evaluated(capsys, "linear", run, "--data", tiny_data, *SMALL)
    weights = run / "final.safetensors"
    of_file = evaluated(capsys, "linear", weights, "--data", tiny_data, *SMALL)
    assert {name: of_file[name] for name in ("top1", "train_loss", "settings")} == {
        name: of_run[name] for name in ("top1", "train_loss", "settings")
    }
    assert len(kept_results(run)) == 1
    (folder,) = (run / "final.safetensors.evaluations").iterdir()
    assert folder.name == next((run / "evaluations").iterdir()).name
    assert json.loads((folder / "result.json").read_text())["top1"] == of_file["top1"]
    assert evaluated(capsys, "linear", weights, "--data", tiny_data, *SMALL) == of_file
    message = refused(capsys, "linear", weights, "--data", tiny_data, "--untrained", "--device=cpu")
    assert "--untrained needs a run folder" in message


def test_beside_a_file_that_has_no_room_beside_it(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny_run / "final.safetensors", weights)
    (tmp_path / "weights.safetensors.evaluations").write_text("no folder")
    message = refused(capsys, "linear", weights, "--data", tiny_data, *SMALL, "--device=cpu")
    assert f"cannot write to {weights}.evaluations/linear-" in message
    assert "give --out a folder that the evaluation can work in" in message
    evaluated(capsys, "linear", weights, "--data", tiny_data, *SMALL, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "result.json").is_file()


def test_splits_with_other_classes_are_refused(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """val with a stranger, a class of train without an image, no labels at all; val may lack one of train's classes."""

    def message(change: str) -> str:
        data = tmp_path / change
        shutil.copytree(tiny_data, data)
        if change == "stranger":
            os.rename(data / "val" / "class2", data / "val" / "class9")
        elif change == "lacking":
            shutil.rmtree(data / "val" / "class2")
        elif change == "empty":
            for image in (data / "train" / "class1").iterdir():
                image.unlink()
        else:
            for image in sorted(data.rglob("*.png")):
                image.rename(data / f"{image.parent.parent.name}-{image.name}")
            shutil.rmtree(data / "train")
            shutil.rmtree(data / "val")
        if change == "lacking":
            return open_labelled_data(data, holdout_seed=0).note
        return refused(capsys, "linear", tiny_run, "--data", data, *SMALL, "--device=cpu")

    assert "val has 1 class(es) that train lacks: class9" in message("stranger")
    assert message("lacking") == "val has no image of 1 of the 3 classes."
    assert "train in" in (text := message("empty"))
    assert "has no image of 1 of the 3 classes: class1" in text
    assert "needs labelled train images" in message("unlabelled")


def test_an_image_that_cannot_be_read_stands_in_the_result(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "val" / "class1" / "004.png").write_bytes(b"no image")
    result = evaluated(capsys, "linear", tiny_run, "--data", data, *SMALL, "--out", tmp_path / "out")
    assert list(result["unreadable_images"]) == ["val/class1/004.png"]
    assert result["val_images"] == 12


def test_noise_has_no_accuracy(capsys: pytest.CaptureFixture[str], tiny_data: Path, tiny_run: Path) -> None:
    for command, *flags in (["linear"], ["knn"], ["finetune", "--percent=100"]):
        common = [tiny_run, "--data", tiny_data, "--loader=synthetic", "--device=cpu"]
        message = refused(capsys, command, *common, *flags)
        assert "the synthetic loader hands out noise" in message

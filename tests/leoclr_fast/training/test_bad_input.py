"""A user's mistake gets one clear error: what was given, what is allowed, what to do. And nothing is lost."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import leoclr_fast.run.checkpoint
import leoclr_fast.training.loop
from leoclr_fast.cli import run_command
from leoclr_fast.commands.pretrain import parse_pretrain
from leoclr_fast.run.checkpoint import DamagedCheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.run.telemetry import NonFiniteLossError
from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.tiny_flags import TINY_FLAGS


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command line that must fail; returns the one line it says."""
    code = run_command([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 1, captured
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def pretrain_line(data: Path, out: Path, *flags: str) -> list[object]:
    return ["pretrain", "leoclr_demo", "--data", data, "--out", out, *TINY_FLAGS, "--epochs=2", *flags]


def test_missing_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, *pretrain_line(tmp_path / "nowhere", tmp_path / "run"))
    assert str(tmp_path / "nowhere") in message
    assert not (tmp_path / "run").exists()


def test_no_readable_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for index in range(15):
        path = tmp_path / "data" / "a" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a JPEG")
    message = refused(capsys, *pretrain_line(tmp_path / "data", tmp_path / "run"))
    assert "can be read" in message


def test_fewer_images_than_a_batch(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    message = refused(capsys, *pretrain_line(tiny_data, tmp_path / "run", "--batch-size=41", "--method.queue-size=64"))
    assert "40 images" in message
    assert "batch of 41" in message
    assert "--batch-size of at most 40" in message


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--batch-size=0", "batch size 0 is not allowed"),
        ("--batch-size=-4", "batch size -4 is not allowed"),
        ("--epochs=0", "epochs 0 is not allowed"),
        ("--max-images=0", "max images 0 is not allowed"),
        ("--max-steps=0", "--max-steps 0 is not allowed"),
        ("--method.queue-size=11", "a queue of 11 keys is smaller than the 12 keys of one step"),
        ("--device=tpu", "tpu"),
        ("--device=cuda:99", "choose --device cpu"),
        ("--cuda-graph=on", "a CUDA GPU is needed and the device is cpu"),
        ("--loader=residant", "Did you mean resident"),
        ("--monitor.knn-k=9999", "k = 9999 needs at least as many"),
        ("--resume=nowhere", "there is no checkpoint nowhere"),
    ],
)
def test_impossible_values(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path, flag: str, expected: str
) -> None:
    assert expected in refused(capsys, *pretrain_line(tiny_data, tmp_path / "run", flag))


def test_impossible_nested_value(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    """What a nested part of the configuration refuses is shown by the command line parser, as misuse."""
    line = pretrain_line(tiny_data, tmp_path / "run", "--method.temperature=0")
    assert run_command([str(argument) for argument in line]) == 2
    assert "temperature 0.0 is not allowed" in capsys.readouterr().err


def test_unknown_names_offer_the_nearest(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    message = refused(capsys, "pretrain", "leoclr_cifar", "--data", tiny_data, "--out", tmp_path / "run")
    assert "Did you mean leoclr_cifar10" in message
    assert "Did you mean pretrain" in refused(capsys, "pretrian")
    suggested = f"leoclr-fast pretrain RECIPE …; leoclr_cifar10 fits the 40 images of about 23 pixels at {tiny_data}"
    assert suggested in refused(capsys, "pretrain", "--data", tiny_data)
    assert run_command(["pretrain", "leoclr_demo", "--data", str(tiny_data), "--out", "x", "--epoks", "3"]) == 2


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    good = tiny_config(monitor__checkpoint_every_steps=1, monitor__log_every_steps=100)
    pretrain(good, tiny_data, tmp_path / "run", max_steps=2)
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002")
    state["method"]["query_encoder.projection_head.0.weight"].fill_(float("nan"))
    save_checkpoint(tmp_path / "run" / "checkpoints", 2, state, keep=9)
    with pytest.raises(NonFiniteLossError, match=r"step 3 \(loss nan\), in epoch 0; nothing was saved.* Lower --opt"):
        pretrain(good, tiny_data, tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000001",
        "step-00000002",
    ]


@pytest.fixture
def finished_run(tiny_data: Path, tmp_path: Path) -> Path:
    """Two checkpoints, at steps 3 and 5, of a run that was stopped early."""
    pretrain(tiny_config(), tiny_data, tmp_path / "run", max_steps=5)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000003",
        "step-00000005",
    ]
    return tmp_path / "run"


def truncate(checkpoint: Path) -> None:
    with open(checkpoint / "state.pt", "r+b") as file:
        file.truncate(1000)


def test_truncated_checkpoint_falls_back_loudly(
    finished_run: Path, tiny_data: Path, package_log: pytest.LogCaptureFixture
) -> None:
    before = RunFolder(finished_run).read_metrics("step")
    older, newest = list_checkpoints(finished_run / "checkpoints")
    truncate(newest)
    pretrain(tiny_config(), tiny_data, finished_run, max_steps=5)
    assert f"checkpoint {newest} is damaged" in package_log.text
    assert "Trying the one before" in package_log.text
    after = RunFolder(finished_run).read_metrics("step")
    assert [(r["step"], r["loss"]) for r in after] == [(r["step"], r["loss"]) for r in before]

    truncate(older)
    truncate(newest)
    with pytest.raises(DamagedCheckpointError, match=r"every checkpoint in .* is damaged"):
        pretrain(tiny_config(), tiny_data, finished_run)


def test_another_configuration_names_the_fields(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    other = tiny_config(result__method__temperature=0.1, result__epochs=9)
    before = sorted(path.name for path in finished_run.rglob("*"))
    with pytest.raises(ValueError, match=r"epochs: 4 there, 9 here; method.temperature: 0.2 there, 0.1 here"):
        pretrain(other, tiny_data, finished_run)
    newest = list_checkpoints(finished_run / "checkpoints")[-1]
    with pytest.raises(ValueError, match=r"belongs to another configuration: epochs: 4 there, 9 here"):
        pretrain(other, tiny_data, tmp_path / "other", resume=str(newest))
    assert sorted(path.name for path in finished_run.rglob("*")) == before


def test_other_data_is_refused(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    next((tmp_path / "data" / "train").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="was made on other data"):
        pretrain(tiny_config(), tmp_path / "data", finished_run)


def test_resuming_by_path_never_damages_a_run(finished_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Not another run in --out, and not the later checkpoints of the same one; a fresh folder is welcome."""
    older, newest = list_checkpoints(finished_run / "checkpoints")
    other = tmp_path / "other"
    pretrain(tiny_config(result__seed=5), tiny_data, other, max_steps=2)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="seed: 5 there, 0 here"):
        pretrain(tiny_config(), tiny_data, other, resume=str(newest))
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match=r"holds later checkpoints than .*step-00000003 \(step-00000005\)"):
        pretrain(tiny_config(), tiny_data, finished_run, resume=str(older))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        pretrain(tiny_config(), tiny_data, tmp_path / "third", resume=str(finished_run))
    pretrain(tiny_config(), tiny_data, tmp_path / "branch", resume=str(older), max_steps=5)
    branch, original = (RunFolder(folder).read_metrics("step") for folder in (tmp_path / "branch", finished_run))
    assert [record["loss"] for record in branch] == [record["loss"] for record in original[3:]]


def test_a_run_without_its_last_evaluation_gets_it(
    finished_run: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation fails: the weights are already saved, and the same command evaluates them."""

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(leoclr_fast.training.loop, "_evaluate", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            pretrain(tiny_config(monitor__knn_every_epochs=0), tiny_data, finished_run)
    assert list_checkpoints(finished_run / "checkpoints")[-1].name == "step-00000012"
    summary = pretrain(tiny_config(), tiny_data, finished_run)
    assert (summary["complete"], summary["steps"]) == (True, 12)
    assert RunFolder(finished_run).read_metrics("knn")[-1]["step"] == 12


def test_fewer_max_steps_than_are_done_changes_nothing(finished_run: Path, tiny_data: Path) -> None:
    summary = pretrain(tiny_config(), tiny_data, finished_run, max_steps=3)
    assert summary["steps"] == 5
    assert len(RunFolder(finished_run).read_metrics("step")) == 5


def test_synthetic_images_give_no_accuracy_and_no_real_run(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(speed__loader__name="synthetic")
    summary = pretrain(config, tiny_data, tmp_path / "run", max_steps=3)
    assert summary["knn_top1"] is None
    assert summary["images_per_s"] > 0
    with pytest.raises(ValueError, match="is of a run on synthetic images"):
        pretrain(tiny_config(), tiny_data, tmp_path / "run")


def test_resume_never_protects_a_run(finished_run: Path, tiny_data: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(tiny_config(), tiny_data, finished_run, resume="never")


def test_a_finished_run_is_left_alone(tiny_data: Path, tmp_path: Path) -> None:
    first = pretrain(tiny_config(), tiny_data, tmp_path / "run")
    assert first["complete"]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert pretrain(tiny_config(), tiny_data, tmp_path / "run") == first
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_output_folder_with_other_files(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    message = refused(capsys, *pretrain_line(tiny_data, tmp_path / "thesis"))
    assert "holds other files (chapter1.tex" in message
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_output_that_is_a_file_or_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to the output folder" in refused(capsys, *pretrain_line(tiny_data, tmp_path / "file"))
    assert "cannot write to the output folder" in refused(capsys, *pretrain_line(tiny_data, Path("/proc/run")))


def test_output_in_use_by_another_process(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    with folder.locked():
        assert "another process is writing to" in refused(capsys, *pretrain_line(tiny_data, tmp_path / "run"))


def test_full_disk_keeps_the_last_good_checkpoint(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the second checkpoint is written: one error, the first one stays whole."""
    written = []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > 2:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(content)

    monkeypatch.setattr(leoclr_fast.run.checkpoint, "write_file", full)
    with pytest.raises(OSError, match=r"step-00000006: No space left on device; the last good checkpoint is .*00003"):
        pretrain(tiny_config(), tiny_data, tmp_path / "run")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000003"]
    monkeypatch.undo()
    assert pretrain(tiny_config(), tiny_data, tmp_path / "run")["complete"]


def test_preview_misuse(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    assert "ends in .png" in refused(capsys, "preview", "--data", tiny_data, "--out", tmp_path / "views.jpg")
    assert "--rows 0 is not allowed" in refused(
        capsys, "preview", "--data", tiny_data, "--out", tmp_path / "views.png", "--rows", "0"
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_an_fp32_run_may_continue_in_it(
    precision: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Near float32's losses; a step that overflows in fp16 is skipped while the loss scale settles, not an error."""
    single = tiny_config(speed__precision="fp32")
    half = tiny_config(speed__precision=precision)
    pretrain(single, tiny_data, tmp_path / "single", max_steps=1)
    pretrain(half, tiny_data, tmp_path / "half", max_steps=3)
    first = [RunFolder(tmp_path / run).read_metrics("step")[0]["loss"] for run in ("single", "half")]
    assert first[1] == pytest.approx(first[0], rel=0.05)
    pretrain(half, tiny_data, tmp_path / "single", max_steps=3)
    losses = [record["loss"] for record in RunFolder(tmp_path / "single").read_metrics("step")]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)


def test_a_run_keeps_the_precision_that_it_began_with(tiny_data: Path, tmp_path: Path) -> None:
    automatic, said = tiny_config(speed__precision="auto"), io.StringIO()
    console = Console(file=said, width=400)
    pretrain(automatic, tiny_data, tmp_path / "new", max_steps=1, console=console)
    assert RunFolder(tmp_path / "new").read_config().speed.precision == "fp32"
    pretrain(tiny_config(speed__precision="bf16"), tiny_data, tmp_path / "old", max_steps=1)
    pretrain(automatic, tiny_data, tmp_path / "old", max_steps=2, console=console)
    assert RunFolder(tmp_path / "old").read_config().speed.precision == "bf16"
    headlines = [line for line in said.getvalue().splitlines() if line.startswith("tiny: ")]
    assert [line.partition("batch 12, ")[2] for line in headlines] == [
        "cpu, fp32 (auto on a CPU)",
        "cpu, bf16 (auto: as the run began)",
    ]


def test_precision_of_float64_differs_from_float32_only_by_rounding(tiny_data: Path, tmp_path: Path) -> None:
    """`speed` options change the loss curve by no more than rounding."""
    losses = {}
    variants = {
        "fp64": {},
        "fp32": {"speed__precision": "fp32"},
        "contiguous": {"speed__precision": "fp32", "speed__channels_last": False},
        "torchvision": {"speed__loader__name": "torchvision", "speed__loader__workers": 1},
    }
    for name, changes in variants.items():
        pretrain(tiny_config(**changes), tiny_data, tmp_path / name, max_steps=3)
        losses[name] = torch.tensor([r["loss"] for r in RunFolder(tmp_path / name).read_metrics("step")])
    for name in ("fp32", "contiguous"):
        torch.testing.assert_close(losses[name], losses["fp64"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["torchvision"], losses["fp64"], rtol=1e-12, atol=0)


def test_flags_of_earlier_versions_are_passed_over(tiny_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--monitor.phase-limit-s=100", "--monitor.hang-limit-s", "9", "--monitor.keep-best", "--seed", "3"]
    command = parse_pretrain(["leoclr_demo", "--data", str(tiny_data), "--out", "x", *flags])
    assert command.result.seed == 3
    assert [message.split()[0] for message in caplog.messages] == [
        "--monitor.phase-limit-s", "--monitor.hang-limit-s", "--monitor.keep-best",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--monitor\.hang-limit-s nan is not allowed"):
        parse_pretrain(["leoclr_demo", "--monitor.hang-limit-s=nan"])

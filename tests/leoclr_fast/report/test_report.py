"""The report of real runs: what `pretrain` writes by itself, and what `leoclr-fast report` makes of run folders."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import leoclr_fast.report.page
import leoclr_fast.training.loop
import leoclr_fast.training.run_log
from benchmarks.reference_curves import reference_curves
from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.recipes import get_recipe
from leoclr_fast.report.page import page_of
from leoclr_fast.report.reference import REFERENCE_FILE, find_reference
from leoclr_fast.report.reproduce import reproducing_command
from leoclr_fast.report.run_record import RunRecord, read_run
from leoclr_fast.report.sentence import summary_sentence
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.run.telemetry import NonFiniteLossError
from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config, write_tiny_images
from tests.leoclr_fast.test_cli import succeeded
from tests.leoclr_fast.training.test_bad_input import pretrain_line, refused
from tests.leoclr_fast.written_run import knn, start, step_record, written_run


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return RunFolder(run).read_metrics(kind)


def plot_data(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="plot-data">(.*?)</script>', page)
    data: dict[str, Any] = json.loads(text)
    return data


def without_markup(page: str) -> str:
    return re.sub(r"<[^>]+>", "", page)


def test_pretraining_leaves_a_report_whose_figures_are_its_own(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary, _ = succeeded(capsys, *pretrain_line(tiny_data, run))
    page = (run / "report.html").read_text()
    assert f"kNN top-1 is {summary['knn_top1']:.2f} %" in page
    assert f"untrained {summary['knn_top1_untrained']:.2f} %" in page
    assert "on 40 images of" in page
    assert "for 2 epochs" in page
    assert "Finished after step 6 of 6 (epoch 2 of 2)." in page
    assert f"{summary['images_per_s']:,.1f} images/s" in page
    loss = plot_data(page)["loss"]["curves"][0]
    steps = records(run, "step")
    assert loss["x"] == pytest.approx([record["step"] / 3 for record in steps], rel=1e-6)
    assert loss["y"] == pytest.approx([record["loss"] for record in steps], rel=1e-6)
    assert re.findall(r"<li>(train/class\d/\d+\.png \(class class\d\))</li>", page)
    assert page.count("data:image/jpeg;base64,") == 1
    assert len(page) < 300_000
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert records(run, "end")[0]["status"] == "finished"


def test_text_of_users_stays_text_and_the_page_asks_for_nothing(tmp_path: Path) -> None:
    """Class names, paths and messages that are markup appear as they are."""
    evil = "<img src=x onerror=alert(1)>"
    data = write_tiny_images(tmp_path / "a&b <i>data")
    (data / "train" / "class1").rename(data / "train" / evil)
    (data / "val" / "class1").rename(data / "val" / evil)
    run, other = tmp_path / "</script><script>alert(2)</script>", tmp_path / "\"onclick=alert(4) '<!--\u2028"
    pretrain(tiny_config(monitor__knn_every_epochs=1), data, run, max_steps=4)
    records = [start(metrics=[f"x_{evil}", '\\g<7>"']), step_record(10)]
    written_run(other, [*records, {"kind": "warning", "step": 10, "text": "<b>warned"}])
    RunFolder(run).add_evaluation("<b>probe</b>", {"top1": 12.5, "weights": "</td><script>alert(3)</script>"})
    single, both = page_of([read_run(run)]), page_of([read_run(run), read_run(other)])
    for page in (single, both):
        assert not re.findall(r"<img src=x|<i>data|<b>(?:probe|warned)|<!--|onclick=alert\(4\) '", page)
        assert (page.count("<script"), page.count("</script")) == (2, 2)
        assert "alert(1)&gt;" in page
        assert not re.findall(r"https?://|//[a-z]+\.", page)
        assert re.findall(r'(?:src|href)="((?!#|data:)[^"]*)"', page) == []
        assert "default-src 'none'; img-src data:;" in page
        assert "url(" not in re.sub(r"url\(#[\w.-]+\)", "", page)
    assert "&lt;b&gt;warned" in both
    labels = [curve["label"] for curve in plot_data(both)["loss"]["curves"]]
    assert labels == ["</script><script>alert(2)</script>", other.name]
    assert json.loads((run / "data.json").read_text())["classes"] == [evil, "class0", "class2"]


def test_a_crash_and_a_signal_tell_where_and_why(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, page = tmp_path / "run", tmp_path / "run" / "report.html"

    def ended_by(error: Exception) -> str:
        def broken(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(leoclr_fast.training.loop, "_log_metrics", broken)
            with pytest.raises(type(error)):
                pretrain(tiny_config(), tiny_data, run)
        return page.read_text()

    pretrain(tiny_config(), tiny_data, run, max_steps=3)
    failed = ended_by(NonFiniteLossError("the training became non-finite at step 5 <loss nan>"))
    assert "Failed after step 4 of 12" in failed
    assert "the training became non-finite at step 5 &lt;loss nan&gt;" in failed
    assert re.search(r"In _between_steps, leoclr_fast/training/loop.py line \d+\.", failed)
    stopped = ended_by(StoppedBySignalError("stopped by SIGTERM after step 4"))
    assert "Stopped after step 4 of 12 (epoch 1.333 of 4): stopped by SIGTERM after step 4." in stopped
    assert pretrain(tiny_config(), tiny_data, run)["complete"]
    assert "Finished after step 12 of 12" in page.read_text()
    assert "Started 4 times" in page.read_text()
    assert [record["status"] for record in records(run, "end")] == ["paused", "failed", "stopped", "finished"]


def test_a_report_that_cannot_be_written_harms_no_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pretrain(tiny_config(), tiny_data, tmp_path / "well")

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leoclr_fast.report.page, "write_file", broken)
    monkeypatch.setattr("leoclr_fast.training.run_log.write_preview", broken)
    summary = pretrain(tiny_config(), tiny_data, tmp_path / "ill")
    assert summary["final_loss"] == expected["final_loss"]
    assert not (tmp_path / "ill" / "report.html").exists()
    warned = [record["text"] for record in records(tmp_path / "ill", "warning")]
    assert any("cannot write the report: OSError" in text for text in warned)
    assert any("cannot describe the data for the report" in text for text in warned)


def test_warnings_and_unreadable_images_are_in_the_report(tmp_path: Path) -> None:
    data = write_tiny_images(tmp_path / "data")
    victim = sorted((data / "train").rglob("*.png"))[7]
    victim.write_bytes(victim.read_bytes()[:60])
    (data / "quarantine.jsonl").write_text(json.dumps({"name": "train/a<b.jpg", "reason": "cut off"}) + "\n")
    pretrain(tiny_config(), data, tmp_path / "run", max_steps=4)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"cannot read train/{victim.parent.name}/{victim.name}" in page
    assert "Images that could not be read, each replaced by the next: 1" in page
    assert "Images that the conversion left out (quarantine.jsonl): 1" in page
    assert "train/a&lt;b.jpg: cut off" in page


@pytest.mark.parametrize(("share", "num_reports"), [(1e-9, 2), (1e9, 4)])
def test_a_checkpoint_writes_the_report_unless_that_takes_too_long(
    share: float, num_reports: int, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the three checkpoints on the way the first writes it, then none or all; and the end does."""
    states: list[str] = []
    original = leoclr_fast.report.page.write_report

    def noted(paths: list[Path], out: Path) -> dict[str, Any]:
        document = original(paths, out)
        states.append(document["runs"][0]["state"])
        assert out == tmp_path / "run" / "report.html"
        return document

    monkeypatch.setattr(leoclr_fast.report.page, "write_report", noted)
    monkeypatch.setattr(leoclr_fast.training.run_log, "_MAX_REPORT_SHARE", share)
    pretrain(tiny_config(monitor__checkpoint_every_steps=2), tiny_data, tmp_path / "run", max_steps=5)
    assert states == [*["running"] * (num_reports - 1), "paused"]


def test_reference_curves_are_those_of_the_committed_logs() -> None:
    assert json.loads(REFERENCE_FILE.read_text()) == reference_curves()
    demo = json.loads((REFERENCE_FILE.parents[2] / "benchmarks/results/demo_cpu.json").read_text())
    ours = [run for run in demo["runs"] if run["recipe"] == "leoclr_demo"]
    (entry,) = [entry for entry in reference_curves() if entry["recipe"] == "leoclr_demo"]
    final = [run["summary"]["knn_top1"] for run in ours]
    assert entry["knn_top1"][-1] == pytest.approx([12.0, sum(final) / 3, min(final), max(final)])
    assert [point[0] for point in entry["loss"]][:5] == [10, 20, 30, 40, 46]
    assert entry["loss"][0][1] == pytest.approx(sum(run["loss"][0][1] for run in ours) / 3, abs=6e-4)


def test_the_expected_curve_is_drawn_only_under_a_run_like_it(tmp_path: Path) -> None:
    demo = get_recipe("leoclr_demo")
    made = [start(), step_record(10), knn(46, 20.0)]
    seeded = replace(demo, result=replace(demo.result, seed=5))
    reference, why = find_reference(
        read_run(written_run(tmp_path / "same", made, config=seeded, data={"images": 3000}))
    )
    assert reference is not None
    assert why == ""
    assert "benchmarks/results/demo_cpu.json" in reference.source
    page = page_of([read_run(tmp_path / "same")])
    assert "expected top-1 (mean and range of 3 seeds)" in page
    assert plot_data(page)["knn"]["curves"][-1]["y"] == pytest.approx(reference.knn_top1[:, 1].tolist(), rel=1e-6)

    def reason(name: str, **given: Any) -> str:
        found, text = find_reference(read_run(written_run(tmp_path / name, made, **given)))
        assert found is None
        assert text in page_of([read_run(tmp_path / name)])
        return text

    longer = replace(demo, result=replace(demo.result, epochs=20))
    assert "epochs: 12 there, 20 here" in reason("longer", config=longer)
    assert "images: 3,000 there, 2,000 here" in reason("fewer", data={"images": 2000})
    assert "ranks: 1 there, 2 here" in reason("ranks", environment={"world_size": 2})
    assert "has other settings: " in reason("cifar", config=get_recipe("mocov2_cifar10"))
    assert "no run of leoclr_imagenet_200ep" in reason("imagenet", config=get_recipe("leoclr_imagenet_200ep"))


def test_the_command_makes_the_same_run_again(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path
) -> None:
    flags = ["--views.crop-scale", "0.3", "0.9", "--no-channels-last", "--method.enqueue=all", "--seed=4"]
    flags += ["--monitor.log-every-steps=1"]
    succeeded(capsys, *pretrain_line(tiny_data, tmp_path / "first", *flags))
    words = reproducing_command(read_run(tmp_path / "first")) or []
    assert "--max-steps" not in words
    assert shlex.join(words) in without_markup((tmp_path / "first" / "report.html").read_text())
    words[words.index("--out") + 1] = str(tmp_path / "again")
    succeeded(capsys, *words[1:])
    assert (tmp_path / "again" / "config.yaml").read_text() == (tmp_path / "first" / "config.yaml").read_text()
    losses = [[record["loss"] for record in records(tmp_path / name, "step")] for name in ("first", "again")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("world_size", "per_node", "expected"),
    [
        (1, 1, "leoclr-fast pretrain"),
        (8, 8, "torchrun --nproc-per-node 8 -m leoclr_fast pretrain"),
        (8, None, "torchrun --nproc-per-node 8 -m leoclr_fast pretrain"),
        (16, 8, "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 "
         "-m leoclr_fast pretrain"),
    ],
)  # fmt: skip
def test_the_command_has_its_ranks_and_machines(
    world_size: int, per_node: int | None, expected: str, tmp_path: Path
) -> None:
    environment = {"world_size": world_size, "local_world_size": per_node}
    run = written_run(tmp_path / "run", [start(last_step=552), step_record(10)], environment=environment)
    assert reproducing_command(read_run(run)) == [*expected.split(), "leoclr_demo", "--data", "PATH", "--out", "RUN"]
    paused = written_run(tmp_path / "paused", [start(last_step=20), step_record(10)])
    assert (reproducing_command(read_run(paused)) or [])[-2:] == ["--max-steps", "20"]


def test_misuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written_run(tmp_path / "run", [start(), step_record(10)])

    def forbidden(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(leoclr_fast.report.page, "write_file", forbidden)
        assert "report.html: Read-only file system; give --out FILE.html, elsewhere" in refused(capsys, "report", run)
    assert "not an HTML file" in refused(capsys, "report", run, "--out", tmp_path / "page.pdf")
    assert "give --out FILE.html" in refused(capsys, "report", run, run)
    assert "there is no such folder" in refused(capsys, "report", tmp_path / "nowhere")
    assert "neither config.yaml nor metrics.jsonl" in refused(capsys, "watch", tmp_path)
    assert "needs a run folder" in refused(capsys, "report")
    assert "--every-s 0 is not allowed" in refused(capsys, "watch", run, "--every-s", 0)
    assert os.listdir(tmp_path) == ["run"]


def test_the_summary_is_one_sentence(tmp_path: Path) -> None:
    made = [start(), knn(0, 10.0), *(step_record(step, data_wait_fraction=0.6) for step in (10, 46)), knn(46, 43.8)]
    run: RunRecord = read_run(
        written_run(
            tmp_path / "run",
            made,
            data={"path": "imagenet", "images": 2944},
            environment={"gpu": "H100", "world_size": 8, "device": "cuda"},
        )
    )
    assert summary_sentence(run) == (
        "LeOCLR pretrained a ResNet-18 (width × 0.125) on 2,944 images of imagenet for 1 of 12 epochs: kNN top-1 is "
        "43.80 % (k = 20, temperature 0.1, untrained 10.00 %); it took 46 seconds on 8 × H100; it was data-bound (its "
        "steps waited for data 60 % of the time, so that loading could speed it up at most 2.50 times)."
    )


def test_the_contact_sheet_is_small(tiny_data: Path, tmp_path: Path) -> None:
    """Noise is what compresses worst."""
    run = written_run(tmp_path / "run", [start(), step_record(10)], data={"preview": [{"name": "a.jpg", "class": "b"}]})
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(RunFolder(run).preview_file)
    page = page_of([read_run(run)])
    (encoded,) = re.findall(r"data:image/jpeg;base64,([^\"]*)", page) or [""]
    assert len(encoded) < 350_000

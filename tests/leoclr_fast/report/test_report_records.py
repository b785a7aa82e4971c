"""What is read from run folders that are unfinished, damaged, newer, huge, or still being written."""

from __future__ import annotations

import io
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from leoclr_fast.recipes import get_recipe
from leoclr_fast.report.comparison import time_ratio
from leoclr_fast.report.evaluation_table import Cell, table_of
from leoclr_fast.report.metrics_file import MetricsFile
from leoclr_fast.report.page import page_of
from leoclr_fast.report.plots import thinned
from leoclr_fast.report.run_record import RunRecord, read_run
from leoclr_fast.report.sentence import summary_sentence
from leoclr_fast.report.watch import watch
from leoclr_fast.run.environment import boot_id
from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.written_run import START_UNIX_S, end, knn, start, step_record, written_run

SOME_STEPS = [step_record(step) for step in range(10, 101, 10)]


def notes(path: Path) -> str:
    run = read_run(path)
    assert page_of([run]).startswith("<!doctype html>")
    return "\n".join(run.notes())


def test_folders_without_metrics(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", [])
    assert "No step is logged yet" in notes(run)
    RunFolder(run).metrics_file.unlink()
    assert "no metrics.jsonl" in notes(run)
    assert read_run(run).state.kind == "empty"
    assert "LeOCLR" in summary_sentence(read_run(run))


def test_a_half_written_last_line_is_left_out_and_read_when_it_is_whole(tmp_path: Path) -> None:
    line = json.dumps(step_record(110))
    run = written_run(tmp_path / "run", SOME_STEPS, tail=line[:70])
    assert "last line of metrics.jsonl is cut off" in notes(run)
    metrics = MetricsFile(path=RunFolder(run).metrics_file)
    metrics.update()
    assert (metrics.last_step, metrics.half_line) == (100, True)
    with open(metrics.path, "a") as file:
        file.write(line[70:] + "\n")
    assert metrics.update()
    assert (metrics.last_step, metrics.half_line) == (110, False)
    assert metrics.column("loss")[-1] == 5.11
    assert not metrics.update()


def test_damaged_lines_are_counted_and_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    no_norm = {key: value for key, value in step_record(10).items() if key != "gradient_norm"}
    damaged = '{"kind": "step", "st\n[1]\n\x00\x00\n\n{"kind": "knn", "top1": 3}\n{"kind": "step", "step": "x"}\n'
    losses = [step_record(110, loss=math.nan), step_record(120, loss=math.inf), step_record(130, loss="high")]
    run = written_run(tmp_path / "run", [no_norm, *SOME_STEPS[1:], *losses, step_record(140)], tail=damaged)
    assert "5 lines of metrics.jsonl could not be read" in notes(run)
    assert "loss is missing or not finite in 3 records, first at step 110" in notes(run)
    assert "gradient_norm is missing or not finite in 1 record, first at step 10" in notes(run)
    assert read_run(run).metrics.num_steps == 14
    page = page_of([read_run(run)])
    assert not re.search("NaN|Infinity", page)
    assert 'id="plot-loss"' in page
    assert 'id="plot-knn"' not in page


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", [start(format=7), *SOME_STEPS, {"kind": "energy", "step": 100, "kwh": 1}])
    config = RunFolder(run).config_file
    config.write_text(config.read_text().replace("name: leoclr", "name: leoclr_v3\n    rotation: 45"))
    text = notes(run)
    assert "A newer version wrote this log (format 7, this program reads 1)" in text
    assert "kinds this program does not know: energy" in text
    assert "leoclr_v3" in page_of([read_run(run)])


def test_a_log_names_what_its_method_measures(tmp_path: Path) -> None:
    """A method of which this program knows nothing else."""
    logged = start(method="Sim<Siam>", metrics=["output_std"])
    path = written_run(tmp_path / "run", [logged, *(step_record(step, output_std=step / 100) for step in (10, 20))])
    config = RunFolder(path).config_file
    config.write_text(config.read_text().replace("name: leoclr", "name: simsiam"))
    run = read_run(path)
    page = page_of([run])
    assert "Sim&lt;Siam&gt; pretrained a ResNet-18" in page
    assert "Output std over epochs. this run: from 0.1 at 0.217 to 0.2 at 0.435" in page
    assert 'id="plot-similarity"' not in page
    output = Console(file=io.StringIO(), width=100)
    watch(run.path, output, once=True)
    assert isinstance(output.file, io.StringIO)
    assert re.search(r"output std +0\.2000", output.file.getvalue())


def test_a_replaced_log_is_read_again(tmp_path: Path) -> None:
    """A resumed run writes its log anew, without the steps after its checkpoint."""
    run = written_run(tmp_path / "run", [start(), *SOME_STEPS])
    record = read_run(run)
    RunFolder(run).keep_metrics_until(50)
    assert record.metrics.update()
    assert record.metrics.last_step == 50
    assert record.metrics.num_steps == 5
    assert len(record.metrics.starts) == 1


@pytest.mark.parametrize(
    ("record", "kind", "sentence"),
    [
        (end(552, "finished"), "finished", "Finished after step 552 of 552 (epoch 12 of 12)."),
        (end(100, "paused", reason="--max-steps 100"), "paused", "Paused after step 100 of 552"),
        (end(100, "stopped", reason="stopped by SIGTERM"), "stopped", "stopped by SIGTERM."),
        (end(103, "failed", reason="no space", where="_save, train.py line 3"), "failed", "after step 103 of 552"),
        (end(103, "failed", reason="no space", where="_save, train.py line 3"), "failed", "In _save, train.py line 3."),
        (end(103, "evicted"), "failed", "Ended (evicted) after step 103"),
        (None, "killed", "Killed in the middle, after step 100 of 552 (epoch 2.174 of 12): it left no word of its end"),
    ],
)  # fmt: skip
def test_states(tmp_path: Path, record: dict[str, object] | None, kind: str, sentence: str) -> None:
    run = written_run(tmp_path / "run", [start(), *SOME_STEPS, *([record] if record else [])])
    state = read_run(run).state
    assert state.kind == kind
    assert sentence in state.sentence
    assert f"state {kind}" in page_of([read_run(run)])


def test_a_locked_run_is_running(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", [start(), *SOME_STEPS])
    with RunFolder(run).locked():
        page = page_of([read_run(run)])
    assert "Running, after step 100" in page
    assert "a run that was killed since could not say so" in page
    assert "it left no word of its end" in page_of([read_run(run)])


def test_a_run_elsewhere_is_given_some_minutes(tmp_path: Path) -> None:
    """Whether the lock of another machine is seen depends on the file system: only its silence tells."""
    now = time.time()
    recent = written_run(tmp_path / "recent", [start(unix_s=now - 60), step_record(10, unix_s=now - 30)])
    assert read_run(recent).state.kind == "unsure"
    here = written_run(tmp_path / "here", [start(unix_s=now - 60, boot_id=boot_id()), step_record(10, unix_s=now - 30)])
    assert read_run(here).state.kind == "killed"


def test_an_end_before_the_last_start_is_history(tmp_path: Path) -> None:
    stopped = end(100, "stopped", reason="stopped by SIGTERM")
    run = read_run(
        written_run(tmp_path / "run", [start(), *SOME_STEPS, stopped, start(100, unix_s=START_UNIX_S + 500)])
    )
    assert run.state.kind == "killed"
    assert run.metrics.wall_s == pytest.approx(101)
    assert "Started 2 times" in page_of([run])


def test_speeds_of_stretches_are_taken_out_of_the_means_since_the_start(tmp_path: Path) -> None:
    """64 images a step: ten steps in 10 s, ten in 20 s; after a new start ten in 5 s."""
    records = [
        start(),
        step_record(10, images_per_s=640 / 10, data_wait_fraction=0.1),
        step_record(20, images_per_s=1280 / 30, data_wait_fraction=0.4),
        start(20),
        step_record(30, images_per_s=640 / 5, data_wait_fraction=0.2),
    ]
    run = read_run(written_run(tmp_path / "run", records))
    np.testing.assert_allclose(run.windows.seconds, [10, 20, 5])
    np.testing.assert_allclose(run.windows.images, [640, 640, 640])
    np.testing.assert_allclose(run.windows.wait_fraction, [0.1, 11 / 20, 0.2])
    assert run.training_s == pytest.approx(35)
    assert run.images_per_s == 128


def test_the_queue_fills_until_k_over_b(tmp_path: Path) -> None:
    run = read_run(written_run(tmp_path / "run", [start(), step_record(10)]))
    assert run.queue_full_at_step == 2048 / 64
    page = page_of([run])
    assert "K/B = 2,048/64 = 32 (epoch 0.696), shaded" in page
    assert "This run is not there yet." in page
    assert "This run is not there yet." not in page_of([read_run(written_run(tmp_path / "on", [start(), *SOME_STEPS]))])


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    x = np.arange(100_000, dtype=np.float64)
    y = np.sin(x / 5000)
    y[12_345], y[50_000], y[77_777] = 9.0, -9.0, math.nan
    thin_x, thin_y = thinned(x, y, 400)
    assert len(thin_x) <= 600
    assert (thin_x[0], thin_x[-1]) == (0, 99_999)
    assert {12_345, 50_000, 77_777} <= set(thin_x.tolist())
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])


def test_the_time_of_an_image_is_taken_over_the_baseline_of_the_same_seed(tmp_path: Path) -> None:
    def run(name: str, recipe: str, seed: int, rate: float) -> RunRecord:
        config = get_recipe(recipe)
        config = replace(config, result=replace(config.result, seed=seed))
        steps = [step_record(step, images_per_s=rate) for step in range(10, 201, 10)]
        return read_run(written_run(tmp_path / name, [start(), *steps, knn(200, rate / 2)], config=config))

    first, second = run("a", "leoclr_demo", 0, 60.0), run("b", "leoclr_demo", 1, 60.0)
    other, baseline = run("c", "mocov2_demo", 1, 90.0), run("d", "mocov2_demo", 0, 75.0)

    def ratios(*runs: RunRecord) -> Cell:
        return table_of(runs).costs[-1].cells[0]

    assert (ratios(first, second, other, baseline).by_seed, ratios(second, baseline).by_seed) == (
        {"0": 1.25, "1": 1.5},
        {"1": 1.25},  # there is no baseline of its seed
    )
    assert ratios(first, baseline).interval == pytest.approx((1.25, 1.25))
    page = page_of([first, baseline])
    assert "1.250 [1.250, 1.250]" in page
    for top1, rate in (("30.00 %", "60.0"), ("37.50 %", "75.0")):
        assert f"<td>{top1}</td>" in page
        assert f"<td>{rate}</td><td>5.0 %</td>" in page
    assert '<th scope="row">result.method.name</th>' in page
    assert '<th scope="row">result.seed</th>' not in page  # the same in both


def test_the_interval_of_the_ratio_holds_how_unevenly_the_runs_went(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)

    def uneven(name: str, scale: float) -> Path:
        seconds = np.cumsum(scale * rng.lognormal(0, 0.3, 60) * 10)
        records = [
            step_record(10 * (i + 1), images_per_s=64 * 10 * (i + 1) / total)
            for i, total in enumerate(seconds.tolist())
        ]
        return written_run(tmp_path / name, [start(), *records])

    ratio, interval = time_ratio(read_run(uneven("a", 1.3)), read_run(uneven("b", 1.0)))
    assert interval is not None
    low, high = interval
    assert low < ratio < high
    assert 0.1 < high - low < 0.5  # two means of 60 windows with 30 % spread: ± 2 * 0.055 * 1.3
    few = read_run(written_run(tmp_path / "few", [start(), *SOME_STEPS[:3]]))
    assert time_ratio(few, read_run(tmp_path / "b"))[1] is None


def test_two_recipes_and_measured_energy(tmp_path: Path) -> None:
    demo = written_run(tmp_path / "one" / "run", SOME_STEPS, summary={"steps": 100, "energy_kwh": 0.125})
    other = written_run(tmp_path / "two" / "run", SOME_STEPS, config=get_recipe("leoclr_cifar10"))
    page = page_of([read_run(demo), read_run(other)])
    assert '<th scope="col">kWh</th>' in page
    assert "0.125" in page
    assert "one/run" in page  # what tells them apart
    assert "result.batch_size" in page
    assert "kWh" not in page_of([read_run(other), read_run(other)])

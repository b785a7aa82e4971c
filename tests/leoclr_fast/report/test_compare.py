"""One table over runs and seeds: means and deviations by hand, and nothing averaged that should not be."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t

from leoclr_fast.cli import run_command
from leoclr_fast.config import BackboneConfig, RunConfig
from leoclr_fast.recipes import get_recipe
from leoclr_fast.report.evaluation_table import EvaluationTable, Row, evaluation_table, student_t_975
from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.training.test_bad_input import refused
from tests.leoclr_fast.written_run import end, knn, start, step_record, written_run

LINEAR = {"epochs": 100, "batch_size": 256, "lr": 30.0, "seed": 0, "data_fingerprint": "d", "max_images": None}
CIFAR10 = {"classes": 10, "train_images": 50_000, "val_images": 10_000}
RESNET50 = BackboneConfig(arch="resnet50", stem="small")
ENDED = {"complete": True, "steps": 552, "epochs": 12}


def config(recipe: str, seed: int, **changes: Any) -> RunConfig:
    found = get_recipe(recipe)
    return replace(found, result=replace(found.result, seed=seed, **changes))


def run_of(
    path: Path,
    recipe: str = "leoclr_cifar10",
    seed: int = 0,
    summary: Any = ENDED,
    fingerprint: str = "d",
    images: int | None = None,
    **changes: Any,
) -> Path:
    """A finished run without a kNN of its own."""
    records = [start(), step_record(552), end(552, "finished")]
    data = {"fingerprint": fingerprint} | ({} if images is None else {"images": images})
    return written_run(path, records, config=config(recipe, seed, **changes), summary=summary, data=data)


def add(run: Path, evaluator: str, settings: dict[str, Any], **values: Any) -> None:
    record = {"weights": f"{run}/final.safetensors", "weights_sha256": run.name, "untrained": False, **values}
    settings = {"weights_sha256": run.name, **settings}
    RunFolder(run).add_evaluation(evaluator, record | {"settings": settings})


def row(table: EvaluationTable, label: str) -> Row:
    (found,) = [row for row in table.rows if row.label == label]
    return found


def test_means_deviations_and_differences_by_hand(tmp_path: Path) -> None:
    ours, theirs = (80.0, 82.0, 87.0), (75.0, 78.0, 76.0)
    runs = []
    for recipe, scores in (("mocov2_cifar10", theirs), ("leoclr_cifar10", ours)):
        for seed, top1 in enumerate(scores):
            run = run_of(tmp_path / f"{recipe}-{seed}", recipe, seed)
            add(run, "linear", LINEAR, top1=top1, top5=99.0, mean_per_class=top1, **CIFAR10)
            runs.append(run)
    add(runs[0], "finetune", {"percent": 10.0, "data_fingerprint": "d"}, top1=60.0)
    table = evaluation_table(runs)
    assert [(column.title, column.seeds) for column in table.columns] == [
        ("LeOCLR", ("0", "1", "2")),
        ("MoCo-v2", ("0", "1", "2")),
    ]
    linear = row(table, "linear, top-1")
    left, right = linear.cells
    assert (left.n, left.mean, left.std) == (3, pytest.approx(83), pytest.approx(statistics.stdev(ours)))
    assert (right.n, right.mean, right.std) == (3, pytest.approx(229 / 3), pytest.approx(statistics.stdev(theirs)))
    assert left.by_seed == {"0": 80, "1": 82, "2": 87}
    difference = linear.differences[0]
    assert difference is not None
    assert linear.differences[1] is None
    assert difference.mean == pytest.approx(83 - 229 / 3)
    assert difference.std == pytest.approx(statistics.stdev([5, 4, 11]))
    half = t.ppf(0.975, df=2) * statistics.stdev([5, 4, 11]) / math.sqrt(3)
    assert difference.interval == pytest.approx((20 / 3 - half, 20 / 3 + half), rel=2e-3)
    finetune = row(table, "finetune 10 %, top-1")
    assert [cell.n for cell in finetune.cells] == [0, 1]
    assert finetune.differences == (None, None)
    assert [row.label for row in table.rows] == ["linear, top-1", "linear, top-5", "finetune 10 %, top-1"]
    lines = table.as_markdown().splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert "83.00 ± 3.61" in lines[2]
    assert "+6.67 ± 3.79" in lines[2]


def test_every_variant_stands_beside_the_baseline(tmp_path: Path) -> None:
    """The sum and the mean of LeOCLR's losses: a column each, called by what sets them apart, and what they took."""
    method, runs = get_recipe("leoclr_cifar10").result.method, []
    for reduction, top1 in (("sum", 70.0), ("mean", 75.0)):
        changed = replace(method, loss_reduction=reduction)
        runs.append(run_of(tmp_path / reduction, summary={**ENDED, "images_per_s": 100.0}, method=changed))
        add(runs[-1], "linear", LINEAR, top1=top1)
    runs.append(
        run_of(tmp_path / "moco", "mocov2_cifar10", summary={**ENDED, "images_per_s": 150.0, "energy_kwh": 2.0})
    )
    add(runs[-1], "linear", LINEAR, top1=72.0)
    table = evaluation_table(runs)
    titles = ["LeOCLR loss_reduction sum", "LeOCLR loss_reduction mean", "MoCo-v2"]
    assert [column.title for column in table.columns] == titles
    found = [difference and difference.mean for difference in row(table, "linear, top-1").differences]
    assert found == [-2, 3, None]
    costs = {row.label: [cell.mean for cell in row.cells] for row in table.costs}
    assert costs["images/s"] == [100, 100, 150]
    assert costs["time per image, ratio"] == [1.5, 1.5, 1]
    assert costs["kWh"] == [None, None, 2]
    head = table.as_markdown().splitlines()[0]
    assert f"difference of {titles[0]}" in head
    assert f"difference of {titles[1]}" in head


def test_only_what_is_alike_is_averaged(tmp_path: Path) -> None:
    """Another learning rate is another row, an untrained network too; other settings of the run are another column."""
    run, short = run_of(tmp_path / "a"), run_of(tmp_path / "b", epochs=20)
    add(run, "linear", LINEAR, top1=80.0)
    add(run, "linear", {**LINEAR, "epochs": 10}, top1=70.0)
    add(run, "linear", LINEAR, top1=30.0, untrained=True)
    add(short, "linear", LINEAR, top1=60.0)
    add(short, "transfer", {"dataset": "pets"}, top1=50.0, mean_per_class=40.0, metric="mean_per_class")
    table = evaluation_table([run, short])
    assert [column.title for column in table.columns] == ["LeOCLR epochs 200", "LeOCLR epochs 20"]
    found = {row.label: [cell.mean for cell in row.cells] for row in table.rows}
    assert found == {
        "linear [epochs 100], top-1": [80.0, 60.0],
        "linear [epochs 10], top-1": [70.0, None],
        "linear, untrained, top-1": [30.0, None],
        "transfer pets, mean per class": [None, 40.0],
    }
    assert all(not any(row.differences) for row in table.rows)


def test_the_newest_of_each_seed_counts_and_seeds_of_an_evaluation_are_one_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a")
    add(run, "linear", LINEAR, top1=10.0)
    add(run, "linear", LINEAR, top1=80.0)
    add(run, "linear", {**LINEAR, "seed": 1}, top1=82.0)
    (cell,) = row(evaluation_table([run]), "linear, top-1").cells
    assert (cell.n, cell.mean, cell.std) == (1, 81.0, None)


def test_knn_of_the_training_stands_in_where_there_is_no_other(tmp_path: Path) -> None:
    records = [start(), knn(0, 13.0), step_record(552), knn(552, 40.0), end(552, "finished")]
    run = written_run(tmp_path / "a", records, config=config("leoclr_cifar10", 0), summary=ENDED)
    table = evaluation_table([run])
    assert row(table, "kNN (k 20, temperature 0.1) in training, top-1").cells[0].mean == 40
    assert row(table, "kNN (k 20, temperature 0.1) in training, untrained, top-1").cells[0].mean == 13
    add(run, "knn", {"k": 20, "temperature": 0.1, "data_fingerprint": "d"}, top1=41.0)
    labels = [row.label for row in evaluation_table([run]).rows]
    assert labels[0] == "kNN (k 20, temperature 0.1), top-1"
    assert "kNN (k 20, temperature 0.1) in training, top-1" not in labels


def test_notes_say_what_a_number_is_of(tmp_path: Path) -> None:
    unfinished = {"complete": False, "steps": 552, "epochs": 12}
    ours, theirs = run_of(tmp_path / "ours"), run_of(tmp_path / "theirs", "mocov2_cifar10", summary=unfinished)
    twin = run_of(tmp_path / "twin", "mocov2_cifar10")
    checkpoint = "checkpoints/step-00000007"
    add(ours, "finetune", {"percent": 1.0}, top1=20.0, weights=f"{ours}/{checkpoint}")
    notes = "\n".join(evaluation_table([ours, theirs, twin]).notes)
    assert f"{theirs} is not finished" in notes
    assert "several runs have the same seed" in notes
    assert "finetune is of the checkpoint step-00000007" in notes


IMAGENET = {"classes": 1000, "train_images": 1_281_167, "val_images": 50_000}


@pytest.mark.parametrize(
    ("data", "changes", "sizes", "learned_from", "note"),
    [
        ("imagenet_200ep", {}, IMAGENET, "d", r"\+5\.1 in linear evaluation for imagenet, .* after how many"),
        ("imagenet_200ep", {}, CIFAR10, "d", ""),
        ("cifar10", {"backbone": RESNET50}, CIFAR10, "d", r"\+5\.71 for cifar10, and does not state by which protocol"),
        ("cifar10", {}, CIFAR10, "d", ""),
        ("cifar10", {"backbone": RESNET50}, {**CIFAR10, "val_images": 500}, "d", ""),
        ("cifar10", {"backbone": RESNET50}, CIFAR10, "another", ""),
        ("cifar10", {"backbone": RESNET50, "epochs": 15}, CIFAR10, "d", ""),
    ],
    ids=["whole", "other images", "whole CIFAR-10", "other network", "fewer images", "learned from others", "shorter"],
)
def test_the_papers_gain_is_told_where_an_evaluation_is_on_its_images(
    tmp_path: Path, data: str, changes: dict[str, Any], sizes: dict[str, Any], learned_from: str, note: str
) -> None:
    """It is for ResNet-50 on whole data sets; and even there the paper leaves epochs or protocol open."""
    runs = [
        run_of(tmp_path / "a", f"leoclr_{data}", **changes),
        run_of(tmp_path / "b", f"mocov2_{data}", fingerprint=learned_from, **changes),
    ]
    for run, top1 in zip(runs, (80.0, 75.0), strict=True):
        add(run, "linear", LINEAR, top1=top1, **sizes)
    table = evaluation_table(runs)
    differences = row(table, "linear, top-1").differences
    assert [difference and difference.mean for difference in differences] == [5, None]
    found = [line for line in table.notes if "the paper" in line]
    assert len(found) == bool(note)
    assert re.search(note, table.as_markdown())


VOC = {"train_images": 16_551, "test_images": 4952, "AP_11point": 56.0, "AP50_11point": 81.0, "AP75_11point": 62.0}


@pytest.mark.parametrize(
    ("recipe", "changes", "evaluator", "settings", "values", "expected"),
    [
        ("mocov2_imagenet_200ep", {}, "linear", LINEAR, IMAGENET, {"top1": 67.5}),
        ("mocov2_imagenet_800ep", {}, "linear", LINEAR, IMAGENET, {"top1": 71.1}),
        ("mocov2_imagenet_200ep", {"epochs": 800}, "linear", LINEAR, IMAGENET, {"top1": 71.1}),
        ("mocov2_imagenet_200ep", {"epochs": 100}, "linear", LINEAR, IMAGENET, "epochs: 200 there, 100 here"),
        ("mocov2_imagenet_200ep", {}, "linear", {**LINEAR, "epochs": 90}, IMAGENET, "epochs: 100 there, 90 here"),
        ("mocov2_imagenet_200ep", {}, "linear", LINEAR, CIFAR10, "1000 classes|1,281,167 images learned from"),
        ("mocov2_imagenet_200ep", {"backbone": BackboneConfig(arch="resnet18")}, "linear", LINEAR, IMAGENET, "arch"),
        ("leoclr_imagenet_200ep", {}, "linear", LINEAR, IMAGENET, ""),
        (
            *("mocov2_imagenet_200ep", {}, "detect-voc", {"iterations": 24_000, "published_rounding": True}, VOC),
            {"ap_11point": 57.0, "ap50_11point": 82.4, "ap75_11point": 63.6},
        ),
        (
            *("mocov2_imagenet_200ep", {}, "detect-voc", {"iterations": 24_000, "published_rounding": False}, VOC),
            "published_rounding: True there, False here",
        ),
    ],
)
def test_a_published_figure_stands_beside_what_it_is_for_alone(
    tmp_path: Path, recipe: str, changes: dict[str, Any], evaluator: str, settings: dict[str, Any],
    values: dict[str, Any], expected: dict[str, float] | str,
) -> None:  # fmt: skip
    run = run_of(tmp_path / "a", recipe, images=1_281_167, **changes)
    add(run, evaluator, settings, **({"top1": 66.0} if evaluator == "linear" else {}), **values)
    table = evaluation_table([run])
    found = {row.metric: row.cells[0].published for row in table.rows if row.cells[0].published is not None}
    page = table.as_markdown()
    if isinstance(expected, dict):
        assert found == expected
        assert all(f"(published: {value})" in page for value in expected.values())
    else:
        assert found == {}
        assert re.search(expected, page)


@pytest.mark.parametrize(("recipe", "published"), [("mocov2_cifar10_demo", 82.6), ("mocov2_cifar10", None)])
def test_mocos_demo_is_compared_by_its_own_knn(tmp_path: Path, recipe: str, published: float | None) -> None:
    """Of the projection, in training; an evaluation of the backbone by the same k is another row."""
    found = knn(552, 80.0) | {"k": 200}
    data = {"fingerprint": "d", "images": 50_000}
    run = written_run(
        tmp_path / "a", [start(), found, end(552, "finished")], config=config(recipe, 0), summary=ENDED, data=data
    )
    table = evaluation_table([run])
    assert row(table, "kNN (k 200, temperature 0.1) in training, top-1").cells[0].published == published
    add(run, "knn", {"k": 200, "temperature": 0.1, "data_fingerprint": "d", "features": "backbone"}, top1=70.0)
    labels = [row.label for row in evaluation_table([run]).rows]
    assert labels.count("kNN (k 200, temperature 0.1) in training, top-1") == (published is not None)
    assert row(evaluation_table([run]), "kNN (k 200, temperature 0.1), top-1").cells[0].published is None


def test_detections_on_other_data_or_of_another_precision_are_other_rows(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a")
    detector = {"dataset": "voc", "iterations": 24_000}
    fp32 = {"precision": "fp32", "train_fingerprint": "one", "test_fingerprint": "one"}
    others = [{}, {"test_fingerprint": "other"}, {"train_fingerprint": "other"}, {"precision": "bf16"}]
    for number, change in enumerate(others):
        add(run, "detect-voc", {**detector, **fp32, **change}, AP=50.0 + number, config=detector)
    values = {row.label: row.cells[0].mean for row in evaluation_table([run]).rows}
    assert sorted(values.values()) == [50, 51, 52, 53]
    label = "detect-voc [precision fp32, train_fingerprint one, test_fingerprint other], AP"
    assert values[label] == 51


def test_results_of_other_programs_and_damaged_lines(tmp_path: Path) -> None:
    """A metric that is no number, a result that does not say what it depends on, a cut line."""
    run = run_of(tmp_path / "a")
    add(run, "detect-voc", {"dataset": "voc", "iterations": 24_000}, AP=50.1, AP50=80.0, AP75=math.nan)
    RunFolder(run).add_evaluation("knn", {"top1": 40.0, "k": 5, "temperature": 0.1})
    with open(RunFolder(run).evaluations_file, "a") as file:
        file.write('{"evaluator": "lin')
    table = evaluation_table([run])
    assert {row.label: row.cells[0].mean for row in table.rows} == {"detect-voc, AP": 50.1, "detect-voc, AP50": 80}
    assert any(note.startswith(f"line 3 of {RunFolder(run).evaluations_file} is no JSON") for note in table.notes)
    assert f"{run}: a result of knn is left out, since it names no settings" in table.notes


def test_compare_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", "leoclr_cifar10"), run_of(tmp_path / "b", "mocov2_cifar10")]
    assert "nothing was evaluated in" in refused(capsys, "compare", *runs)
    for run, top1 in zip(runs, (61.0, 60.0), strict=True):
        add(run, "linear", LINEAR, top1=top1)
    assert run_command(["compare", *map(str, runs), "--json"]) == 0
    output = capsys.readouterr().out.splitlines()
    document = json.loads(output[-1])
    assert output[0] == "| evaluation    | LeOCLR | MoCo-v2 | difference |"
    assert document["rows"][0]["differences"][0]["mean"] == 1
    assert [column["runs"] for column in document["columns"]] == [[str(run)] for run in runs]
    assert "is not a run folder" in refused(capsys, "compare", tmp_path / "nowhere", runs[0])
    assert "given twice" in refused(capsys, "compare", runs[0], runs[0])


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30])
def test_quantiles_of_student_are_scipys(degrees: int) -> None:
    assert student_t_975(degrees) == pytest.approx(t.ppf(0.975, df=degrees), rel=2e-3)

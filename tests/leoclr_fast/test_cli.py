"""The commands as a user types them, and the JSON they end with."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dataset_tools import demo_data
from leoclr_fast.cli import parse_command, run_command
from leoclr_fast.config import RunConfig
from leoclr_fast.config_file import from_yaml, to_yaml
from leoclr_fast.recipes import RECIPES, get_recipe
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.schedules import learning_rate
from pipelines.config import LoaderConfig
from tests.leoclr_fast.training.test_bad_input import pretrain_line, refused


def succeeded(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    """Run a command line with --json; returns the document on the last line and all of stdout."""
    code = run_command([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured
    return json.loads(captured.out.splitlines()[-1]), captured.out


def test_pretrain_then_knn(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary, output = succeeded(capsys, *pretrain_line(tiny_data, run))
    assert summary["run"] == str(run)
    assert (summary["epochs"], summary["steps"], summary["complete"]) == (2, 6, True)
    assert summary["images_per_s"] > 0
    assert 0 < summary["data_wait_fraction"] < 1
    assert 0 <= summary["knn_top1"] <= 100
    assert "learning rate 0.00" in output  # the rule, with its numbers
    assert "loader resident" in output

    folder = RunFolder(run)
    records = folder.read_metrics("step")
    assert records[-1]["loss"] == summary["final_loss"]
    assert folder.read_metrics("knn")[-1]["top1"] == summary["knn_top1"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["versions"]["torch"]
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000003", "step-00000006"]

    knn, _ = succeeded(capsys, "knn", run, "--data", tiny_data, "--device", "cpu")
    assert knn["top1"] == pytest.approx(summary["knn_top1"])
    assert (knn["k"], knn["temperature"], knn["bank_images"], knn["query_images"]) == (3, 0.1, 40, 12)
    assert knn["weights"].endswith("final.safetensors")
    other, _ = succeeded(capsys, "knn", run, "--data", tiny_data, "--k", 5, "--temperature", 0.2, "--max-images", 9)
    assert (other["k"], other["temperature"], other["bank_images"], other["query_images"]) == (5, 0.2, 9, 9)


def test_every_field_has_a_flag_and_lands_in_the_config(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path
) -> None:
    flags = "--method.key-passes=joint --views.crop-scale 0.3 0.9 --optimizer.weight-decay=0.5 --seed=7 "
    flags += "--loader torchvision --loader.workers=0 --max-images=24 --method.enqueue=all"
    summary, output = succeeded(capsys, *pretrain_line(tiny_data, tmp_path / "run", *flags.split()))
    assert summary["steps"] == 4
    assert "24 images" in output
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["recipe"] == "leoclr_demo"
    assert config["result"]["method"]["key_passes"] == "joint"
    assert config["result"]["method"]["enqueue"] == "all"
    assert config["result"]["views"]["crop_scale"] == [0.3, 0.9]
    assert config["result"]["optimizer"]["weight_decay"] == 0.5
    assert (config["result"]["seed"], config["result"]["max_images"]) == (7, 24)
    assert config["speed"]["loader"] == asdict(LoaderConfig(name="torchvision", workers=0))


@pytest.mark.parametrize("name", RECIPES)
def test_config_files_come_back_as_they_were(name: str) -> None:
    config = get_recipe(name)
    assert from_yaml(RunConfig, to_yaml(config), "here") == config


def test_fields_that_are_no_more_are_passed_over() -> None:
    """A run of an earlier version is read; a misspelt field is still an error."""
    config = get_recipe("leoclr_demo")
    old = to_yaml(config).replace("monitor:\n", "monitor:\n  silence_limit_s: 15.0\n  hang_limit_s: 30.0\n")
    assert "hang_limit_s" in old
    assert from_yaml(RunConfig, old, "here") == config
    with pytest.raises(ValueError, match=r"unknown field monitor\.hang_limits_s"):
        from_yaml(RunConfig, old.replace("hang_limit_s", "hang_limits_s"), "here")


def test_recipes_hold_the_published_values() -> None:
    """The paper's setting, MoCo-v2's published values, and the values of MoCo's CIFAR demo."""
    paper = get_recipe("leoclr_imagenet_200ep").result
    assert (paper.epochs, paper.batch_size, paper.lr, paper.backbone.arch) == (200, 256, 0.03, "resnet50")
    assert (paper.optimizer.momentum, paper.optimizer.weight_decay) == (0.9, 1e-4)
    method = paper.method
    assert (method.temperature, method.queue_size, method.key_momentum) == (0.2, 65_536, 0.999)
    assert (method.projection_dim, method.loss_reduction, method.key_batchnorm) == (128, "sum", "shuffle")
    assert (paper.views.image_size, paper.views.crop_scale, paper.views.hue) == (224, (0.2, 1.0), 0.1)
    assert get_recipe("leoclr_imagenet_800ep").result.epochs == 800
    for name in [name for name in RECIPES if name.startswith("leoclr")]:
        ours, theirs = get_recipe(name).result, get_recipe(name.replace("leoclr", "mocov2")).result
        assert theirs.method.name == "mocov2"
        assert to_yaml(theirs).replace("name: mocov2", "name: leoclr") == to_yaml(ours)
    small = get_recipe("leoclr_cifar10").result
    assert (small.method.queue_size, small.method.key_momentum, small.method.temperature) == (4096, 0.99, 0.1)
    assert (small.backbone.arch, small.backbone.stem, small.views.blur_probability) == ("resnet18", "small", 0.0)
    assert (method.query_batchnorm, method.query_batchnorm_group, method.key_batchnorm_group) == ("split", 32, 32)


def test_mocos_cifar10_demo_value_for_value() -> None:
    """args, transforms and schedule of its notebook; epochs count from 1 to 200 there."""
    demo = get_recipe("mocov2_cifar10_demo")
    result, method, views = demo.result, demo.result.method, demo.result.views
    assert (result.epochs, result.batch_size, result.lr) == (200, 512, 0.06)
    assert (result.optimizer.momentum, result.optimizer.weight_decay) == (0.9, 5e-4)
    rates = [learning_rate(result.optimizer.schedule, 0.06, 97 * epoch, 97, 200) for epoch in range(200)]
    assert rates == pytest.approx([0.06 * 0.5 * (1 + math.cos(math.pi * epoch / 200)) for epoch in range(1, 201)])
    assert (method.projection_dim, method.projection_layers, method.queue_size) == (128, 1, 4096)
    assert (method.key_momentum, method.temperature) == (0.99, 0.1)
    assert (method.key_batchnorm, method.key_batchnorm_group) == ("shuffle", 512 // 8)
    assert (method.query_batchnorm, method.query_batchnorm_group) == ("split", 512 // 8)
    assert (views.image_size, views.crop_scale, views.blur_probability) == (32, (0.08, 1.0), 0.0)
    assert (views.mean, views.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (demo.monitor.knn_k, demo.monitor.knn_temperature, demo.monitor.knn_features) == (200, 0.1, "projection")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: x\nresult: {epocs: 3}", "unknown field result.epocs; known there: result.epochs"),
        ("recipe: x\nresult: {epochs: many}", "result.epochs is 'many': Expected `int`, got `str`"),
        ("recipe: x\nresult: {method: {enqueue: some}}", "result.method.enqueue is 'some': Invalid enum value 'some'"),
        ("recipe: x\nresult: {epochs: 0}", "result.epochs is 0: Expected `int` >= 1"),
        ("recipe: x\nresult: 3", "result is 3: Expected `object`, got `int`"),
        ("a: [", "RUN/config.yaml is no YAML"),
        ("a: &a [1]\nrecipe: *a", "it holds the alias .a, and none is allowed"),
        ("[" * 5000, "RUN/config.yaml is nested too deeply"),
    ],
)
def test_a_damaged_config_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_yaml(RunConfig, text, "RUN/config.yaml")


def test_without_labels_knn_is_null(capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tiny_data / "train").rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    summary, output = succeeded(capsys, *pretrain_line(flat, tmp_path / "run"))
    assert summary["knn_top1"] is None
    assert "no kNN accuracy" in output
    message = refused(capsys, "knn", tmp_path / "run", "--data", flat, "--device", "cpu")
    assert "needs labelled train images" in message


@pytest.mark.usefixtures("pages")
def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path of `make demo`, two steps of it on fewer drawings; typed again, it continues."""
    few = partial(demo_data.write_demo_data, num_train=200, num_val=50)
    monkeypatch.setattr(demo_data, "write_demo_data", few)
    arguments = ["demo", "--out", tmp_path / "demo", "--device", "cpu"]
    summary, output = succeeded(capsys, *arguments, "--max-images", 150, "--max-steps", 2)
    assert {"knn_top1", "knn_top1_untrained", "seconds", "run", "data"} <= summary.keys()
    assert summary["knn_top1"] > 0
    report = tmp_path / "demo" / "run" / "report.html"
    assert (output.splitlines()[-2], summary["report"]) == (f"report: {report}", str(report))
    assert f"kNN top-1 is {summary['knn_top1']:.2f} %" in report.read_text()
    train = list((tmp_path / "demo" / "data" / "train").rglob("*.jpg"))
    assert len({path.parent.name for path in train}) == 10
    assert Image.open(train[0]).format == "JPEG"
    metrics = RunFolder(tmp_path / "demo" / "run").read_metrics("step")
    assert metrics[-1]["step"] == 2
    again, _ = succeeded(capsys, *arguments, "--max-images", 150, "--max-steps", 3)
    assert RunFolder(tmp_path / "demo" / "run").read_metrics("step")[-1]["step"] == 3
    assert again["complete"] is False
    assert "no recipe 'simclr_demo'" in refused(capsys, "demo", "--method", "simclr", "--out", tmp_path / "other")


def test_preview_shows_the_boxes_and_all_views(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sheets" / "views.png"
    document, _ = succeeded(
        capsys, "preview", "--data", tiny_data, "--out", out, "--rows", 3, "--recipe", "leoclr_cifar10"
    )
    assert document == {"out": str(out), "rows": 3, "views": ["original", "crop 1", "crop 2"]}
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (20 + 3 * 168 + 8, 4 * 168 + 8, 3)
    first_column = sheet[20:, :168].reshape(-1, 3).tolist()
    assert [255, 176, 0] in first_column  # the box of crop 1
    assert [0, 190, 255] in first_column  # the box of crop 2
    for column in range(1, 4):
        cell = sheet[20:180, 8 + column * 168 : 168 + column * 168]
        assert cell.std() > 5
    document, _ = succeeded(
        capsys, "preview", "--data", tiny_data, "--out", out, "--rows", 2, "--recipe", "mocov2_cifar10"
    )
    assert document["views"] == ["crop 1", "crop 2"]


def test_flags_are_known_by_their_earlier_names() -> None:
    given = ["detect", "RUN", "--data", "DATA", "--max-test-images", "3", "--max-iterations=5"]
    assert parse_command(given) == parse_command(
        ["detect", "RUN", "--data", "DATA", "--max-images", "3", "--max-steps=5"]
    )

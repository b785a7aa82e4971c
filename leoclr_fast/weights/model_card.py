"""The model card beside an exported file: what it is, how to load it, and what is known of its worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dataset_tools.terminal import markdown_code, markdown_text
from leoclr_fast.config_file import as_plain
from leoclr_fast.run.documents import DataDescription, Summary, read_evaluations, read_or_default
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.weights.formats.export_format import ExportFormat
from leoclr_fast.weights.pretrained import Pretrained

_NOT_RESULTS = {"evaluator", "unix_s", "note", "weights", "weights_sha256", "data", "config", "classes", "command"}

_NO_RESULTS = "No evaluation of these weights is recorded."
_IMPORTED = " These weights were imported: the licence at the place they came from holds."
_CARD = """\
# {name}

A {config.arch} backbone without classifier or projection head, written by leoclr-fast for {exporter.name}.

| | |
|---|---|
| Origin | {origin} |
| Network | {config.arch}, {config.stem} stem, width {config.width_multiplier:g} |
| Features | {features}, after global average pooling |
| Parameters | {parameters:,} |
| SHA-256 of the file | `{sha256}` |
| SHA-256 of the weights in leoclr-fast | `{weights_sha256}` |

## Load

{usage}

Checked when it was written: loaded back by {exporter.reader}, the features of {num_images} fixed random images \
differ from leoclr-fast's by {difference} of the largest feature (allowed: {tolerance}).

## Images

RGB, values from 0 to 1, minus mean ({mean}), divided by standard deviation ({std}), {views.image_size} x \
{views.image_size} pixels in pretraining.

## Recipe

{recipe}

## Training data

{data}

## Results

{results}

## Licence

leoclr-fast, which wrote this file, is MIT-licensed; that says nothing about the weights. Whoever trained them decides \
on their licence, within the terms of the images they were trained on: ImageNet's, for one, allow non-commercial \
research and education. State the licence here before you hand the file on.{imported}
"""


def model_card(
    pretrained: Pretrained, exporter: ExportFormat, *, name: str, sha256: str, difference: float, num_images: int
) -> str:
    """Markdown: the file, loading, preprocessing, recipe, data, results, licence.

    name, sha256: of the exported file. difference: of the features of `num_images` images, over the largest of ours.
    """
    description, backbone = pretrained.description, pretrained.backbone
    return _CARD.format(
        name=markdown_text(name),
        sha256=sha256,
        exporter=exporter,
        usage=markdown_code(exporter.usage(name, pretrained), "yaml" if exporter.name == "detectron2" else "python"),
        num_images=num_images,
        config=description.backbone,
        views=description.views,
        origin=_origin(pretrained),
        features=backbone.feature_dim,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        weights_sha256=pretrained.sha256,
        difference=scientific(difference),
        tolerance=scientific(exporter.tolerance),
        mean=", ".join(f"{value:g}" for value in description.views.mean),
        std=", ".join(f"{value:g}" for value in description.views.std),
        recipe=_recipe(pretrained),
        data=_data(pretrained),
        results=_results(pretrained.run, pretrained) if pretrained.run else _NO_RESULTS,
        imported=_IMPORTED if description.source else "",
    )


def _origin(pretrained: Pretrained) -> str:
    description = pretrained.description
    if description.source:
        return f"imported from {markdown_text(description.source)}"
    summary = read_or_default(pretrained.run.summary_file, Summary) if pretrained.run else Summary()
    state = ""
    if summary.epochs is not None and summary.steps is not None:
        state = f", {summary.epochs:g} epochs ({summary.steps:,} steps)"
        state += "" if summary.complete else ", stopped before its end"
    elif pretrained.run and pretrained.path != pretrained.run.final_weights:
        state = f", a checkpoint on the way ({pretrained.path.name})"
    return f"pretrained with leoclr-fast, recipe {markdown_text(description.recipe)}{state}"


def _recipe(pretrained: Pretrained) -> str:
    if pretrained.run is None:
        return f"{markdown_text(pretrained.description.recipe)}; the file that was exported says no more of it."
    config = pretrained.run.read_config()
    text = yaml.safe_dump(as_plain(config.result), sort_keys=False).rstrip()
    return f"{markdown_text(config.recipe)}, with\n\n{markdown_code(text, 'yaml')}"


def _data(pretrained: Pretrained) -> str:
    file = pretrained.run.data_file if pretrained.run else None
    if file is None or not file.is_file():
        return "Not recorded."
    data = read_or_default(file, DataDescription)
    of_what = markdown_text(f"{Path(data.path).name} ({data.kind}, split {data.split})")
    lines = [
        f"- {data.images or 0:,} images of {of_what}, {data.num_classes} classes; labels were not used",
        f"- fingerprint of names and labels: {markdown_text(data.fingerprint)}",
    ]
    if data.note:
        lines.append(f"- {markdown_text(data.note)}")
    if data.quarantined.images:
        lines.append(f"- {data.quarantined.images:,} images were left out by the conversion")
    return "\n".join(lines)


def _results(run: RunFolder, pretrained: Pretrained) -> str:
    rows = []
    for result in read_evaluations(run.evaluations_file, []):
        values = ", ".join(
            f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in result.items()
            if name not in _NOT_RESULTS and isinstance(value, int | float) and not isinstance(value, bool)
        )
        data = Path(str(result.get("data", ""))).name or "not recorded"
        cells = (result["evaluator"], data, values, _of_these(result, pretrained))
        rows.append(f"| {' | '.join(map(markdown_text, cells))} |")
    return "\n".join(["| evaluation | data | result | weights |", "|---|---|---|---|", *rows]) if rows else _NO_RESULTS


def _of_these(result: dict[str, Any], pretrained: Pretrained) -> str:
    if result.get("untrained"):
        return "those before training"
    if result.get("weights_sha256") == pretrained.sha256:
        return "these"
    return Path(str(result.get("weights", "not recorded"))).name


def scientific(value: float) -> str:
    """`2.5e-07`, and zero as `0`."""
    return f"{value:.1e}" if value else "0"

"""The model card beside an exported file: what it is, how to load it, and what is known of its worth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from leoclr_fast.config_file import as_plain
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.weights.pretrained import Pretrained

_NOT_RESULTS = {"evaluator", "unix_s", "note", "weights", "weights_sha256", "data", "config", "classes", "command"}

_CARD = """\
# {file.name}

A {config.arch} backbone without classifier or projection head, written by leoclr-fast for {file.format}.

| | |
|---|---|
| Origin | {origin} |
| Network | {config.arch}, {config.stem} stem, width {config.width_multiplier:g} |
| Features | {features}, after global average pooling |
| Parameters | {parameters:,} |
| SHA-256 of the file | `{file.sha256}` |
| SHA-256 of the weights in leoclr-fast | `{weights_sha256}` |

## Load

```{language}
{file.usage}
```

Checked when it was written: loaded back by {file.reader}, the features of {file.num_images} fixed random images \
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """An exported file as its card describes it."""

    name: str
    format: str
    sha256: str
    usage: str
    difference: float
    tolerance: float
    reader: str
    num_images: int


def model_card(pretrained: Pretrained, file: ExportedFile) -> str:
    """Markdown: the file, loading, preprocessing, recipe, data, results, licence."""
    description, backbone = pretrained.description, pretrained.backbone
    return _CARD.format(
        file=file,
        config=description.backbone,
        views=description.views,
        origin=_origin(pretrained),
        features=backbone.feature_dim,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        weights_sha256=pretrained.sha256,
        language="yaml" if file.format == "detectron2" else "python",
        difference=scientific(file.difference),
        tolerance=scientific(file.tolerance),
        mean=", ".join(f"{value:g}" for value in description.views.mean),
        std=", ".join(f"{value:g}" for value in description.views.std),
        recipe=_recipe(pretrained),
        data=_data(pretrained),
        results=_results(pretrained),
        imported=" These weights were imported: the licence at the place they came from holds."
        if description.source
        else "",
    )


def _origin(pretrained: Pretrained) -> str:
    description = pretrained.description
    if description.source:
        return f"imported from {description.source}"
    summary = pretrained.run.read_summary() if pretrained.run else None
    state = ""
    if summary is not None:
        state = f", {summary['epochs']:g} epochs ({summary['steps']:,} steps)"
        state += "" if summary["complete"] else ", stopped before its end"
    elif pretrained.run and pretrained.path != pretrained.run.final_weights:
        state = f", a checkpoint on the way ({pretrained.path.name})"
    return f"pretrained with leoclr-fast, recipe {description.recipe}{state}"


def _recipe(pretrained: Pretrained) -> str:
    if pretrained.run is None:
        return f"`{pretrained.description.recipe}`; the file that was exported says no more of it."
    config = pretrained.run.read_config()
    text = yaml.safe_dump(as_plain(config.result), sort_keys=False).rstrip()
    return f"`{config.recipe}`, with\n\n```yaml\n{text}\n```"


def _data(pretrained: Pretrained) -> str:
    file = pretrained.run.data_file if pretrained.run else None
    if file is None or not file.is_file():
        return "Not recorded."
    data: dict[str, Any] = json.loads(file.read_text())
    lines = [
        f"- {data['images']:,} images of {Path(data['path']).name} ({data['kind']}, split {data['split']}), "
        f"{data['num_classes']} classes; labels were not used",
        f"- fingerprint of names and labels: `{data['fingerprint']}`",
    ]
    if data.get("note"):
        lines.append(f"- {data['note']}")
    left_out = data.get("quarantined", {}).get("images", 0)
    if left_out:
        lines.append(f"- {left_out:,} images were left out by the conversion")
    return "\n".join(lines)


def _results(pretrained: Pretrained) -> str:
    results = _evaluations(pretrained.run) if pretrained.run else []
    if not results:
        return "No evaluation of these weights is recorded."
    lines = ["| evaluation | data | result | weights |", "|---|---|---|---|"]
    for result in results:
        values = ", ".join(
            f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in result.items()
            if name not in _NOT_RESULTS and isinstance(value, int | float) and not isinstance(value, bool)
        )
        data = Path(str(result.get("data", ""))).name or "not recorded"
        lines.append(f"| {result.get('evaluator', '?')} | {data} | {values} | {_of_these(result, pretrained)} |")
    return "\n".join(lines)


def _of_these(result: dict[str, Any], pretrained: Pretrained) -> str:
    if result.get("untrained"):
        return "those before training"
    if result.get("weights_sha256") == pretrained.sha256:
        return "these"
    return Path(str(result.get("weights", "not recorded"))).name


def _evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """Damaged lines are passed over."""
    if not run.evaluations_file.is_file():
        return []
    found = []
    for line in run.evaluations_file.read_text().splitlines():
        try:
            found.append(dict(json.loads(line)))
        except (json.JSONDecodeError, TypeError, ValueError):
            continue
    return found


def scientific(value: float) -> str:
    """`2.5e-07`, and zero as `0`."""
    return f"{value:.1e}" if value else "0"

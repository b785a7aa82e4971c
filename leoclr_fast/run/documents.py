"""What the files of a run hold, as they are read back. What is missing has its default; what is wrong is one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, field

from dataset_tools.schema import FileContentError, convert, read_bounded

FORMAT = 1
"""Of the records. A reader that meets a higher number shows what it knows, and says so."""

Number = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Time = Annotated[float, Meta(ge=0, le=1e11)]
Commit = Annotated[str, Meta(pattern=r"^[0-9a-f]{7,64}\+?$")]


class LeftOut(Struct):
    name: str
    reason: str


class Quarantined(Struct):
    """Images that a conversion left out."""

    images: Number = 0
    listed: list[LeftOut] = []


class Shown(Struct, rename={"class_name": "class"}):
    """An image of the preview."""

    name: str
    class_name: str | None = None


class DataDescription(Struct):
    """`data.json`: what a run learns from."""

    path: str = "PATH"
    kind: str = ""
    fingerprint: str | None = None
    split: str = ""
    images: Number | None = None
    classes: list[str] = []
    num_classes: Number = 0
    note: str = ""
    quarantined: Quarantined = field(default_factory=Quarantined)
    preview: list[Shown] = []


class Summary(Struct):
    """`summary.json`: what a run came to."""

    complete: bool = False
    epochs: float | None = None
    steps: Number | None = None
    images_per_s: float | None = None
    data_wait_fraction: float | None = None
    energy_kwh: float | None = None
    unreadable_images: dict[str, str] = {}


class Environment(Struct, omit_defaults=True):
    """`environment.json`: what a run was made with."""

    versions: dict[str, str] = {}
    python: str | None = None
    system: str | None = None
    cpu: str | None = None
    cpu_cores: int | None = None
    torch_threads: int | None = None
    device: str | None = None
    gpu: str | None = None
    cuda: str | None = None
    world_size: Positive = 1
    local_world_size: Positive | None = None
    git_commit: Commit | None = None
    gpu_warnings: list[str] = []


class EvaluationSettings(Struct):
    """What is read of the settings of an evaluation; the others are shown as they are."""

    percent: float | None = None
    dataset: str | None = None
    k: Number | None = None
    temperature: float | None = None
    seed: Number | None = None


class Evaluation(Struct):
    """What every line of `evaluations.jsonl` has in common; what was found is named as the evaluator likes."""

    evaluator: str
    settings: EvaluationSettings | None = None
    unix_s: Time | None = None
    weights: str = ""
    untrained: bool = False
    metric: str | None = None
    test_images: Number | None = None
    classes: Number | list[str] | None = None
    train_images: Number | None = None
    val_images: Number | None = None


class Start(Struct):
    """A process began to train."""

    step: Number
    unix_s: Time | None = None
    method: str | None = None
    num_keys: Positive | None = None
    baseline: str = ""
    metrics: list[str] | None = None
    format: int = FORMAT
    steps_per_epoch: Positive | None = None
    last_step: Number | None = None
    boot_id: str | None = None


class End(Struct):
    """A process said how it ended."""

    step: Number
    unix_s: Time | None = None
    status: str = ""
    reason: str | None = None
    where: str | None = None


class Warned(Struct):
    """The run warned of something."""

    step: Number
    text: str


class Knn(Struct, omit_defaults=True):
    """A kNN evaluation in training."""

    step: Number
    epoch: Annotated[float, Meta(ge=0)] = 0.0
    top1: float | None = None
    top5: float | None = None
    k: Number | None = None
    temperature: float | None = None


class Record(Struct):
    """What every record of `metrics.jsonl` has."""

    kind: str
    step: Number
    unix_s: Time | None = None


AnyRecord = Start | End | Warned | Knn | Record
RECORDS: dict[str, type[AnyRecord]] = {"start": Start, "end": End, "warning": Warned, "knn": Knn}
"""Those that are no steps, by their kind."""


def read_line(line: bytes, kind: type[Struct], where: str = "the line") -> dict[str, Any]:
    """A line of a log, NaN included, that fits `kind`; it may hold more. Raises FileContentError."""
    try:
        document: dict[str, Any] = json.loads(line, parse_int=_bounded)
    except (ValueError, RecursionError) as error:
        raise FileContentError(f"{where} is no JSON: {str(error).partition(':')[0]}") from error
    convert(document, kind, where)
    return document


def read_evaluations(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The results in `evaluations.jsonl`; lines that are none are named in `problems`."""
    found = []
    try:
        lines = read_bounded(path).splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return []
    for place, line in enumerate(lines, start=1):
        try:
            found.append(read_line(line, Evaluation, f"line {place} of {path}"))
        except FileContentError as error:
            problems.append(str(error))
    return found


def records(lines: bytes) -> list[dict[str, Any]]:
    """The records in `metrics.jsonl`; what is none, such as a half-written last line, is left out."""
    found = []
    for line in lines.splitlines():
        try:
            found.append(read_line(line, Record))
        except FileContentError:
            continue
    return found


def _bounded(digits: str) -> float:
    """An integer of 64 bits; a float where it has more."""
    return int(digits) if len(digits) < 19 else float(digits)

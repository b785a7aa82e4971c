"""All results that evaluators left in some runs, as one table: a row for each protocol, a column for each kind of run.

Runs that differ in nothing but the seed are one column; their results are a mean with a standard deviation.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leoclr_fast.config_file import as_plain, differing_fields
from leoclr_fast.evaluate.protocols import LinearProtocol
from leoclr_fast.recipes import RECIPES, get_recipe
from leoclr_fast.report.run_record import RunRecord, read_run

METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_11point": "AP (11 points)",
    "ap50_11point": "AP50 (11 points)",
    "ap75_11point": "AP75 (11 points)",
}
"""Field of a result, in small letters → how the table calls it. All in percent."""
_EVALUATORS = ("knn", "linear", "linear_cached_features", "finetune", "transfer", "detect")
_TITLES = {"knn": "kNN", "linear_cached_features": "linear estimate (cached features)"}
_NOT_PROTOCOL = {"seed", "weights_sha256"}
_DETECTOR_SETTINGS = ("precision", "train_fingerprint", "test_fingerprint")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperGain:
    """By how much LeOCLR exceeds MoCo-v2 in the paper, and what is known of the images that this was found on."""

    points: float
    """Of linear top-1."""
    classes: int
    train_images: int
    """With labels."""
    val_images: int
    """That accuracies are reported on."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.classes, self.train_images, self.val_images


PAPER_GAINS = {
    "imagenet": PaperGain(points=5.1, classes=1000, train_images=1_281_167, val_images=50_000),
    "stl10": PaperGain(points=5.12, classes=10, train_images=5000, val_images=8000),
    "cifar10": PaperGain(points=5.71, classes=10, train_images=50_000, val_images=10_000),
}
"""By the data of the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One metric over the runs of a column; NaN-free, and without a deviation where there is one run."""

    n: int
    mean: float | None
    std: float | None
    by_seed: dict[str, float]
    """Seed (and the run's name where a seed comes twice) → the value of that run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one protocol."""

    label: str
    evaluator: str
    metric: str
    untrained: bool
    settings: dict[str, Any]
    cells: tuple[Cell, ...]
    """One for each column."""
    difference: float | None
    """LeOCLR less MoCo-v2, points, of the means over the runs; None unless there is one column of each."""
    difference_std: float | None
    """Over the seeds that both have, of their differences; None for fewer than two."""
    paper_difference: float | None
    """What the paper reports for it; None if that was found on other images, or if it cannot be known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Runs that differ in nothing but the seed."""

    title: str
    method: str
    recipe: str
    runs: tuple[str, ...]
    seeds: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTable:
    """What `compare` prints."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """In what the numbers are not what one would think."""

    def as_document(self) -> dict[str, Any]:
        """As plain JSON."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    def as_markdown(self) -> str:
        """A table whose columns are padded, and the notes below it."""
        has_difference = any(row.difference is not None for row in self.rows)
        has_paper = any(row.paper_difference is not None for row in self.rows)
        head = ["evaluation"]
        for column in self.columns:
            head += [column.title, "n"]
        head += ["difference"] * has_difference + ["in the paper"] * has_paper
        lines = [head]
        for row in self.rows:
            cells = [row.label]
            for cell in row.cells:
                cells += [_mean_std(cell.mean, cell.std), str(cell.n) if cell.n else ""]
            if has_difference:
                cells.append(_mean_std(row.difference, row.difference_std, "+.2f"))
            if has_paper:
                cells.append("" if row.paper_difference is None else f"{row.paper_difference:+.2f}")
            lines.append(cells)
        widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
        padded = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([padded[0], rule, *padded[1:], "", *(f"- {note}" for note in self.notes)]).rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """A result of one run."""

    evaluator: str
    settings: dict[str, Any]
    """Without what may differ between runs that are averaged."""
    untrained: bool
    values: dict[str, float]
    seed: Any
    """Of the evaluation."""
    sizes: tuple[Any, Any, Any]
    """Numbers of classes, of images to learn from and of those tested, where the result says so."""

    @property
    def key(self) -> str:
        return json.dumps([self.evaluator, self.untrained, self.settings], sort_keys=True)


def evaluation_table(paths: Sequence[Path]) -> EvaluationTable:
    """The table of some run folders.

    Of several results of one run by one protocol the newest counts, for each seed of the evaluation; over these seeds
    it is averaged. Raises FileNotFoundError for what is no run folder, ValueError if a folder is given twice or none
    was evaluated.
    """
    if not paths:
        raise ValueError("give one run folder or more: leoclr-fast compare RUN_A RUN_B …")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run folder is given twice")
    runs = [read_run(path) for path in paths]
    notes: list[str] = [problem for run in runs for problem in run.problems]
    findings = {id(run): _findings(run, notes) for run in runs}
    if not any(findings.values()):
        raise ValueError(
            f"nothing was evaluated in {', '.join(map(str, paths))}; run leoclr-fast knn, linear, finetune, transfer "
            "or detect on them first"
        )
    groups = _groups(runs)
    columns = tuple(_column(group, groups, notes) for group in groups)
    protocols = {found.key: found for own in findings.values() for found in own}
    labels = _labels(list(protocols.values()))
    both = _both_methods(groups)
    rows = []
    for key in sorted(protocols, key=lambda key: _rank(protocols[key], labels[key])):
        found = protocols[key]
        for metric in (metric for metric in METRICS if metric in found.values):
            cells = tuple(_cell([(run, findings[id(run)]) for run in group], key, metric) for group in groups)
            difference, difference_std = _difference(cells, both)
            paper_difference = None
            if both is not None and difference is not None:
                paper_difference = _paper_difference(found, metric, [groups[place] for place in both], notes)
            rows.append(
                Row(
                    label=f"{labels[key]}, {METRICS[metric]}",
                    evaluator=found.evaluator,
                    metric=metric,
                    untrained=found.untrained,
                    settings=found.settings,
                    cells=cells,
                    difference=difference,
                    difference_std=difference_std,
                    paper_difference=paper_difference,
                )
            )
    if any(row.paper_difference is not None for row in rows):
        notes += _deviations_from_the_paper(groups, [protocols[key] for key in protocols])
    return EvaluationTable(columns=columns, rows=tuple(rows), notes=tuple(dict.fromkeys(notes)))


def _findings(run: RunRecord, notes: list[str]) -> list[_Finding]:
    """What evaluators found in a run, one for each protocol: the newest of each seed, averaged over the seeds."""
    newest: dict[tuple[str, str], _Finding] = {}
    for record in run.evaluations:
        values = _values(record)
        if not values:
            continue
        settings = _settings(record)
        if record.get("whole_test_set") is False:
            settings["test_images"] = record.get("test_images")
        found = _Finding(
            evaluator=str(record.get("evaluator", "?")),
            settings={name: value for name, value in settings.items() if name not in _NOT_PROTOCOL},
            untrained=bool(record.get("untrained")),
            values=values,
            seed=settings.get("seed"),
            sizes=(record.get("classes"), record.get("train_images"), record.get("val_images")),
        )
        newest[found.key, str(found.seed)] = found
        weights = Path(str(record.get("weights", "")))
        if weights.parent.name == "checkpoints" and run.summary.get("complete"):
            notes.append(f"{run.path}: {found.evaluator} is of the checkpoint {weights.name}, not of the final weights")
    by_protocol: dict[str, list[_Finding]] = {}
    for (key, _), found in newest.items():
        by_protocol.setdefault(key, []).append(found)
    own = [_mean_over_seeds(several) for several in by_protocol.values()]
    evaluated = {(found.settings.get("k"), found.settings.get("temperature"), found.untrained) for found in own}
    for record, untrained in ((run.knn, False), (run.metrics.knn[0] if run.metrics.knn else {}, True)):
        values = _values(record)
        settings = {"k": record.get("k"), "temperature": record.get("temperature"), "in_training": True}
        of_the_end = untrained or bool(run.summary.get("complete"))
        if not values or not of_the_end or (untrained and record.get("step") != 0):
            continue
        if (settings["k"], settings["temperature"], untrained) not in evaluated:
            own.append(
                _Finding(
                    evaluator="knn",
                    settings=settings,
                    untrained=untrained,
                    values=values,
                    seed=None,
                    sizes=(None, None, None),
                )
            )
    return own


def _values(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a result, of those that the literature reports for it."""
    values = {
        name.lower(): float(value)
        for name, value in record.items()
        if name.lower() in METRICS and isinstance(value, int | float) and math.isfinite(value)
    }
    if (chosen := record.get("metric")) in values and record.get("evaluator") == "transfer":
        return {str(chosen): values[str(chosen)]}
    values.pop("mean_per_class", None)
    return values


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """All that a result depends on. An older detector's named its configuration, and the rest beside it."""
    settings, config = record.get("settings"), record.get("config")
    if isinstance(settings, dict):
        return dict(settings)
    if isinstance(config, dict):
        return config | {name: record[name] for name in _DETECTOR_SETTINGS if name in record}
    return _scalars(record)


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    """Settings out of a result that does not name them as such: all but the numbers it found and whose they are."""
    left_out = {"evaluator", "unix_s", "weights", "note", "data", "untrained", *METRICS}
    return {
        name: value
        for name, value in record.items()
        if name.lower() not in left_out
        and (isinstance(value, str | int) or name in ("temperature", "percent"))
        and not name.endswith("_sha256")
    }


def _mean_over_seeds(several: list[_Finding]) -> _Finding:
    first = several[0]
    if len(several) == 1:
        return first
    means = {metric: statistics.mean(found.values[metric] for found in several) for metric in first.values}
    return replace(first, values=means, seed=None)


def _groups(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs that differ in nothing that changes the result but the seed; LeOCLR's first, else as they were given."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        result = {key: value for key, value in (run.setting("result") or {}).items() if key != "seed"}
        images = run.data.get("fingerprint"), run.synthetic
        groups.setdefault(json.dumps([result, images], sort_keys=True, default=str), []).append(run)
    return sorted(groups.values(), key=lambda group: group[0].method != "leoclr")


def _column(group: list[RunRecord], groups: list[list[RunRecord]], notes: list[str]) -> Column:
    run = group[0]
    title = run.method_title
    alike = [other[0] for other in groups if other[0].method == run.method]
    if len(alike) > 1:
        title += f" {run.recipe}" if len({other.recipe for other in alike}) == len(alike) else f" {run.path.name}"
    seeds = tuple(str(one.setting("result.seed", "?")) for one in group)
    if len(set(seeds)) < len(seeds):
        notes.append(f"{title}: several runs have the same seed, so their spread says less")
    for one in group:
        if not one.summary.get("complete"):
            notes.append(f"{one.path} is not finished: {one.state.sentence}")
    return Column(
        title=title, method=run.method, recipe=run.recipe, runs=tuple(str(one.path) for one in group), seeds=seeds
    )


def _cell(group: list[tuple[RunRecord, list[_Finding]]], key: str, metric: str) -> Cell:
    by_seed: dict[str, float] = {}
    for run, own in group:
        for found in own:
            if found.key == key and metric in found.values:
                seed = str(run.setting("result.seed", "?"))
                by_seed[seed if seed not in by_seed else f"{seed} ({run.path.name})"] = found.values[metric]
    values = list(by_seed.values())
    return Cell(
        n=len(values),
        mean=statistics.mean(values) if values else None,
        std=statistics.stdev(values) if len(values) > 1 else None,
        by_seed=by_seed,
    )


def _both_methods(groups: list[list[RunRecord]]) -> tuple[int, int] | None:
    """The places of LeOCLR's and MoCo-v2's column, if there is one of each."""
    methods = [group[0].method for group in groups]
    if methods.count("leoclr") != 1 or methods.count("mocov2") != 1:
        return None
    return methods.index("leoclr"), methods.index("mocov2")


def _difference(cells: Sequence[Cell], both: tuple[int, int] | None) -> tuple[float | None, float | None]:
    if both is None:
        return None, None
    ours, theirs = (cells[place] for place in both)
    if ours.mean is None or theirs.mean is None:
        return None, None
    pairs = [ours.by_seed[seed] - theirs.by_seed[seed] for seed in ours.by_seed if seed in theirs.by_seed]
    return ours.mean - theirs.mean, statistics.stdev(pairs) if len(pairs) > 1 else None


def _labels(protocols: list[_Finding]) -> dict[str, str]:
    """A name for each; where two would be called alike, with the settings in which they differ."""
    plain = {found.key: _label(found) for found in protocols}
    labels = {}
    for found in protocols:
        alike = [other for other in protocols if plain[other.key] == plain[found.key]]
        varying = [
            name
            for name in dict.fromkeys(name for other in alike for name in other.settings)
            if len({json.dumps(other.settings.get(name)) for other in alike}) > 1
        ]
        shown = ", ".join(f"{name} {_short(found.settings.get(name))}" for name in varying)
        labels[found.key] = plain[found.key] + (f" [{shown}]" if shown else "")
    return labels


def _label(found: _Finding) -> str:
    title = _TITLES.get(found.evaluator, found.evaluator)
    settings = found.settings
    if settings.get("percent") is not None:
        title += f" {settings['percent']:.4g} %"
    if settings.get("dataset") is not None and not title.endswith(str(settings["dataset"])):
        title += f" {settings['dataset']}"
    if settings.get("k") is not None:
        title += f" (k {settings['k']}, temperature {_short(settings.get('temperature'))})"
    if settings.get("in_training"):
        title += " in training"
    return f"{title}, untrained" if found.untrained else title


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def _rank(found: _Finding, label: str) -> tuple[Any, ...]:
    name = found.evaluator.partition("-")[0]
    known = _EVALUATORS.index(name) if name in _EVALUATORS else len(_EVALUATORS)
    percent = found.settings.get("percent")
    return known, float(percent) if isinstance(percent, int | float) else 0.0, found.untrained, label


def _paper_difference(found: _Finding, metric: str, both: list[list[RunRecord]], notes: list[str]) -> float | None:
    """The paper's gain, where an evaluation of both methods is on the images that it is for; else a note says why not.

    They are known by their numbers, and by being of the data that the runs learned from.
    """
    names = {_data_of(group[0].recipe) for group in both}
    name = names.pop()
    if names or name not in PAPER_GAINS or found.evaluator != "linear" or found.untrained or metric != "top1":
        return None
    gain, fingerprint = PAPER_GAINS[name], found.settings.get("data_fingerprint")
    runs = [run for group in both for run in group]
    left_out = f"the paper's gain for {name}, {gain.points:+.2f}, does not stand beside this linear evaluation: "
    if found.sizes != gain.sizes:
        notes.append(f"{left_out}{_told(gain.sizes)} there, {_told(found.sizes)} here")
    elif strangers := [str(run.path) for run in runs if run.data.get("fingerprint") != fingerprint]:
        notes.append(f"{left_out}nothing says that {', '.join(strangers)} learned from the data it is on")
    else:
        return gain.points
    return None


def _told(sizes: tuple[Any, Any, Any]) -> str:
    classes, train, val = (f"{size:,}" if isinstance(size, int) else "?" for size in sizes)
    return f"{classes} classes, {train} images learned from, {val} tested"


def _data_of(recipe: str) -> str:
    """The data that a recipe is for: leoclr_imagenet_200ep is for imagenet."""
    _, _, rest = recipe.partition("_")
    return rest.partition("_")[0]


def _deviations_from_the_paper(groups: list[list[RunRecord]], protocols: list[_Finding]) -> list[str]:
    """Why a difference may not be the paper's: how runs differ from their recipe, and evaluations from the protocol."""
    notes = []
    for group in groups:
        run = group[0]
        if run.recipe not in RECIPES:
            continue
        wanted = as_plain(get_recipe(run.recipe).result)
        lines = differing_fields(wanted, run.setting("result") or {})
        lines = [line for line in lines if not line.startswith("seed:")]
        if lines:
            notes.append(f"{run.recipe} as published there, these runs here: {'; '.join(lines)}")
    published = as_plain(LinearProtocol())
    for found in protocols:
        if found.evaluator == "linear" and not found.untrained:
            used = {name: found.settings[name] for name in published if name in found.settings}
            known = {name: value for name, value in published.items() if name in used}
            lines = differing_fields(known, used)
            if found.settings.get("max_images") is not None:
                lines.append(f"max_images: none there, {found.settings['max_images']} here")
            if lines:
                notes.append(f"linear evaluation as published there, this one here: {'; '.join(lines)}")
    return notes


def _mean_std(mean: float | None, std: float | None, form: str = ".2f") -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" if std is None else f"{mean:{form}} ± {std:.2f}"

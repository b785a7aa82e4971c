"""All results that evaluators left in some runs, as one table: a row for each protocol, a column for each kind of run.

Runs that differ in nothing but the seed are one column; their results are a mean with a standard deviation.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from leoclr_fast.config_file import as_plain, differences
from leoclr_fast.evaluate.protocols import LinearProtocol
from leoclr_fast.recipes import RECIPES, get_recipe
from leoclr_fast.report.comparison import compared_methods, time_ratio
from leoclr_fast.report.metrics_file import number
from leoclr_fast.report.published import GAINS, Sizes, published_values
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
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One metric over the runs of a column; NaN-free, and without a deviation where there is one run."""

    n: int
    mean: float | None
    std: float | None
    by_seed: dict[str, float]
    """Seed (and the run's name where a seed comes twice) → the value of that run."""
    published: float | None
    """What was published for this network, data, number of epochs and protocol."""
    interval: tuple[float, float] | None = None
    """95 %, of the ratio of a single run's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """From the baseline, over the seeds that both have; points, or of a cost its unit."""

    mean: float
    """Of the means over all runs of each."""
    std: float | None
    """Of the differences of the pairs; None for fewer than two."""
    interval: tuple[float, float] | None
    """95 %, by Student's t over the pairs, around their mean."""

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"
        return _mean_std(self.mean, self.std, "+.2f") + interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one protocol."""

    label: str
    evaluator: str
    metric: str
    untrained: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    cells: tuple[Cell, ...]
    """One for each column."""
    differences: tuple[Difference | None, ...]
    """Of each column from the baseline's, where there is one column of the baseline."""


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
    costs: tuple[Row, ...]
    """What the training took: hours, kWh, images/s, and the time per image over the baseline's of the same seed."""
    notes: tuple[str, ...]
    """In what the numbers are not what one would think."""

    def as_document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    def as_markdown(self) -> str:
        """Tables whose columns are padded, and the notes below them."""
        tables = [_padded(table) for table in self.as_text()]
        return "\n\n".join([*tables, "\n".join(f"- {note}" for note in self.notes)]).rstrip()

    def as_text(self) -> list[list[list[str]]]:
        """The table of the accuracies and that of the costs, if there are such: rows of cells, the head first."""
        return [self._lines(first, rows) for first, rows in (("evaluation", self.rows), ("cost", self.costs)) if rows]

    def _lines(self, first: str, rows: Sequence[Row]) -> list[list[str]]:
        compared = [place for place in range(len(self.columns)) if any(row.differences[place] for row in rows)]
        counts = [{row.cells[place].n for row in rows} - {0} for place in range(len(self.columns))]
        head = [first]
        for column, n in zip(self.columns, counts, strict=True):  # a column of its own where it is not always the same
            said = f" (n = {max(n)})" if n - {1} else ""
            head += [column.title, "n"] if len(n) > 1 else [column.title + said]
        one = len(compared) == 1
        head += ["difference" if one else f"difference of {self.columns[place].title}" for place in compared]
        lines = [head]
        for row in rows:
            cells = [row.label]
            for cell, n in zip(row.cells, counts, strict=True):
                published = "" if cell.published is None else f" (published: {cell.published:.1f})"
                shown = _mean_std(cell.mean, cell.std)
                if cell.interval is not None:
                    shown = f"{cell.mean:.3f} [{cell.interval[0]:.3f}, {cell.interval[1]:.3f}]"
                cells.append(shown + published)
                cells += [str(cell.n or "")] if len(n) > 1 else []
            cells += [str(row.differences[place] or "") for place in compared]
            lines.append(cells)
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """A result of one run."""

    evaluator: str
    settings: dict[str, Any]
    """Without what may differ between runs that are averaged."""
    untrained: bool = False
    values: dict[str, float]
    """Metric → percent."""
    seed: int | None = None
    """Of the evaluation."""
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def key(self) -> str:
        """The same for evaluations by one protocol."""
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
    table = table_of([read_run(path) for path in paths])
    if not table.rows:
        raise ValueError(
            f"nothing was evaluated in {', '.join(map(str, paths))}; run leoclr-fast knn, linear, finetune, transfer "
            "or detect on them first"
        )
    return table


def table_of(runs: Sequence[RunRecord]) -> EvaluationTable:
    """The same of runs that were read; without rows where nothing was evaluated."""
    notes: list[str] = [problem for run in runs for problem in run.problems]
    evaluations = {run: _evaluations(run, notes) for run in runs}
    groups = _groups(runs)
    columns = tuple(_column(group, groups, notes) for group in groups)
    protocols = {key: evaluation for own in evaluations.values() for key, evaluation in own.items()}
    labels = _labels(protocols)
    ours, baseline = _compared(groups)
    rows, gains = [], list[str]()
    for key, protocol in sorted(protocols.items(), key=lambda item: _rank(item[1], labels[item[0]])):
        for metric in (metric for metric in METRICS if metric in protocol.values):
            found = [[(run, evaluations[run][key]) for run in group if key in evaluations[run]] for group in groups]
            cells = tuple(_cell(group, metric, notes) for group in found)
            differences = _differences(cells, ours, baseline)
            if len(ours) == 1 and any(differences) and metric == "top1":
                gain = _papers_gain(protocol, [groups[place] for place in (*ours, baseline)])
                gains += [] if gain is None else [gain]
            rows.append(
                Row(
                    label=f"{labels[key]}, {METRICS[metric]}",
                    evaluator=protocol.evaluator,
                    metric=metric,
                    untrained=protocol.untrained,
                    settings=protocol.settings,
                    cells=cells,
                    differences=differences,
                )
            )
    costs = _costs(groups, ours, baseline)
    notes += gains
    return EvaluationTable(columns=columns, rows=tuple(rows), costs=costs, notes=tuple(dict.fromkeys(notes)))


def _evaluations(run: RunRecord, notes: list[str]) -> dict[str, _Evaluation]:
    """What was found in a run, one for each protocol: the newest of each seed, averaged over the seeds."""
    by_protocol: dict[str, dict[int | None, _Evaluation]] = {}
    for record in run.evaluations:
        if not (values := _values(record)):
            continue
        if record.get("settings") is None:
            notes.append(f"{run.path}: a result of {record['evaluator']} is left out, since it names no settings")
            continue
        settings = {name: value for name, value in record["settings"].items() if name not in _NOT_PROTOCOL}
        found = _Evaluation(
            evaluator=record["evaluator"],
            settings=settings,
            untrained=record.get("untrained", False),
            values=values,
            seed=record["settings"].get("seed"),
            sizes=Sizes(
                record.get("classes"), record.get("train_images"), record.get("val_images", record.get("test_images"))
            ),
        )
        by_protocol.setdefault(found.key, {})[found.seed] = found
        weights = Path(record.get("weights", ""))
        if weights.parent.name == "checkpoints" and run.summary.complete:
            notes.append(f"{run.path}: {found.evaluator} is of the checkpoint {weights.name}, not of the final weights")
    own = {key: _mean_over_seeds(list(several.values())) for key, several in by_protocol.items()}
    evaluated = {(one.settings.get("k"), one.settings.get("temperature"), one.untrained) for one in own.values()}
    features = run.setting("monitor.knn_features", "backbone")
    for knn, untrained in ((run.knn if run.summary.complete else None, False), (run.knn_untrained, True)):
        if knn is None:
            continue
        settings = {"k": knn.k, "temperature": knn.temperature, "features": features, "in_training": True}
        values = _values(to_builtins(knn))
        if values and (features != "backbone" or (knn.k, knn.temperature, untrained) not in evaluated):
            found = _Evaluation(evaluator="knn", settings=settings, untrained=untrained, values=values)
            own[found.key] = found
    return own


def _values(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a result, of those that the literature reports for it."""
    values = {
        name.lower(): value
        for name, value in record.items()
        if name.lower() in METRICS and math.isfinite(number(value))
    }
    if record.get("evaluator") == "transfer" and record.get("metric") in values:
        return {record["metric"]: values[record["metric"]]}
    values.pop("mean_per_class", None)
    return values


def _mean_over_seeds(several: list[_Evaluation]) -> _Evaluation:
    first = several[0]
    return replace(
        first, values={metric: statistics.mean(one.values[metric] for one in several) for metric in first.values}
    )


def _groups(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs that differ in nothing that changes the result but the seed; baselines last, else as they were given."""
    baselines = {run.method_facts.baseline for run in runs}
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        result = {key: value for key, value in run.setting("result", {}).items() if key != "seed"}
        images = run.data.fingerprint, run.synthetic
        groups.setdefault(json.dumps([result, images], sort_keys=True, default=str), []).append(run)
    return sorted(groups.values(), key=lambda group: group[0].method in baselines)


def _column(group: list[RunRecord], groups: list[list[RunRecord]], notes: list[str]) -> Column:
    run = group[0]
    title = run.method_facts.title
    alike = [other[0] for other in groups if other[0].method == run.method]
    if len(alike) > 1:
        title += f" {_what_sets_apart(run, alike)}"
    seeds = tuple(str(one.setting("result.seed", "?")) for one in group)
    if len(set(seeds)) < len(seeds):
        notes.append(f"{title}: several runs have the same seed, so their spread says less")
    notes += [f"{one.path} is not finished: {one.state.sentence}" for one in group if not one.summary.complete]
    return Column(
        title=title, method=run.method, recipe=run.recipe, runs=tuple(str(one.path) for one in group), seeds=seeds
    )


def _what_sets_apart(run: RunRecord, alike: list[RunRecord]) -> str:
    """Of a run, among others of its method: its recipe, else the one setting in which they differ, else its name."""
    if len({other.recipe for other in alike}) == len(alike):
        return run.recipe
    names = [name for name in differences([other.setting("result", {}) for other in alike]) if name != "seed"]
    if len(names) == 1:
        return f"{names[0].rpartition('.')[2]} {run.setting(f'result.{names[0]}')}"
    return run.path.name


def _cell(found: list[tuple[RunRecord, _Evaluation]], metric: str, notes: list[str]) -> Cell:
    values = [(run, evaluation.values[metric]) for run, evaluation in found if metric in evaluation.values]
    published = None
    for run, one in found[:1]:
        if not one.untrained:
            published = published_values(run, one.evaluator, one.settings, one.sizes, notes).get(metric)
    return _over_runs(values, published)


def _over_runs(found: list[tuple[RunRecord, float]], published: float | None = None) -> Cell:
    by_seed: dict[str, float] = {}
    for run, value in found:
        seed = str(run.setting("result.seed", "?"))
        by_seed[seed if seed not in by_seed else f"{seed} ({run.path.name})"] = value
    values = list(by_seed.values())
    return Cell(
        published=published,
        n=len(values),
        mean=statistics.mean(values) if values else None,
        std=statistics.stdev(values) if len(values) > 1 else None,
        by_seed=by_seed,
    )


def _compared(groups: list[list[RunRecord]]) -> tuple[list[int], int]:
    """The places of our method's columns and of the baseline's; none of ours where there is no one baseline."""
    methods = [group[0].method for group in groups]
    compared = compared_methods([group[0] for group in groups])
    if compared is None or methods.count(compared[1]) > 1:
        return [], 0
    return [place for place, name in enumerate(methods) if name == compared[0]], methods.index(compared[1])


def _differences(cells: Sequence[Cell], ours: list[int], baseline: int) -> tuple[Difference | None, ...]:
    theirs = cells[baseline]
    return tuple(_difference(cell, theirs) if place in ours else None for place, cell in enumerate(cells))


def _difference(ours: Cell, theirs: Cell) -> Difference | None:
    if ours.mean is None or theirs.mean is None:
        return None
    pairs = [ours.by_seed[seed] - theirs.by_seed[seed] for seed in ours.by_seed if seed in theirs.by_seed]
    std = interval = None
    if len(pairs) > 1:
        std, mean = statistics.stdev(pairs), statistics.mean(pairs)
        half = student_t_975(len(pairs) - 1) * std / math.sqrt(len(pairs))
        interval = mean - half, mean + half
    return Difference(mean=ours.mean - theirs.mean, std=std, interval=interval)


def student_t_975(degrees_of_freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.2 %: of a table, then by its expansion about the normal quantile
    (Abramowitz and Stegun, 26.7.5).
    """
    n = degrees_of_freedom
    return _T_975[n - 1] if n <= len(_T_975) else 1.95996 + 2.37227 / n + 2.8225 / n**2


def _costs(groups: list[list[RunRecord]], ours: list[int], baseline: int) -> tuple[Row, ...]:
    """What the runs of each column took; of runs that measured speed on noise, too."""
    measures: dict[str, Callable[[RunRecord], float]] = {
        "hours": lambda run: run.duration_s / 3600,
        "kWh": lambda run: run.energy_kwh,
        "images/s": lambda run: run.images_per_s,
    }
    rows = {
        label: [_over_runs([(run, value) for run in group if math.isfinite(value := measure(run))]) for group in groups]
        for label, measure in measures.items()
    }
    if ours:
        rows["time per image, ratio"] = [_time_ratios(group, groups[baseline]) for group in groups]
    return tuple(
        Row(
            label=label,
            evaluator="pretrain",
            metric=label,
            cells=tuple(cells),
            differences=(None,) * len(groups),
        )
        for label, cells in rows.items()
        if any(cell.n for cell in cells)
    )


def _time_ratios(group: list[RunRecord], baselines: list[RunRecord]) -> Cell:
    """Of each run over the baseline of its seed, else the first one; with an interval where there is one run."""
    of_seed = {run.setting("result.seed"): run for run in reversed(baselines)}
    found = [(run, time_ratio(run, of_seed.get(run.setting("result.seed"), baselines[0]))) for run in group]
    cell = _over_runs([(run, value) for run, (value, _) in found if math.isfinite(value)])
    return replace(cell, interval=found[0][1][1]) if len(found) == 1 and group is not baselines else cell


def _labels(protocols: dict[str, _Evaluation]) -> dict[str, str]:
    """A name for each; where two would be called alike, with the settings in which they differ."""
    plain = {key: _label(protocol) for key, protocol in protocols.items()}
    labels = {}
    for key, protocol in protocols.items():
        alike = [other.settings for place, other in protocols.items() if plain[place] == plain[key]]
        shown = ", ".join(f"{name} {_short(protocol.settings.get(name))}" for name in differences(alike))
        labels[key] = plain[key] + (f" [{shown}]" if shown else "")
    return labels


def _label(protocol: _Evaluation) -> str:
    title, settings = _TITLES.get(protocol.evaluator, protocol.evaluator), protocol.settings
    if settings.get("percent") is not None:
        title += f" {settings['percent']:.4g} %"
    if settings.get("dataset") is not None and not title.endswith(settings["dataset"]):
        title += f" {settings['dataset']}"
    if settings.get("k") is not None:
        title += f" (k {settings['k']}, temperature {_short(settings.get('temperature'))})"
    if settings.get("in_training"):
        title += " in training"
    return f"{title}, untrained" if protocol.untrained else title


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def _rank(protocol: _Evaluation, label: str) -> tuple[Any, ...]:
    name = protocol.evaluator.partition("-")[0]
    known = _EVALUATORS.index(name) if name in _EVALUATORS else len(_EVALUATORS)
    return known, protocol.settings.get("percent") or 0.0, protocol.untrained, label


def _papers_gain(protocol: _Evaluation, both: list[list[RunRecord]]) -> str | None:
    """What the paper reports on the images of a linear evaluation of both methods, trained and evaluated as published,
    and what it does not state of that; None for any other.

    Images are known by their numbers, and by being of the data that the runs learned from. A recipe names its data:
    leoclr_imagenet_200ep.
    """
    names = {group[0].recipe.partition("_")[2].partition("_")[0] for group in both}
    name = names.pop()
    if names or name not in GAINS or protocol.evaluator != "linear" or protocol.untrained:
        return None
    gain, sizes, unstated = GAINS[name]
    published = as_plain(LinearProtocol()) | {"max_images": None}
    used = {key: protocol.settings.get(key, value) for key, value in published.items()}
    runs = [run for group in both for run in group]
    if protocol.sizes != sizes or used != published or any(run.recipe not in RECIPES for run in runs):
        return None
    for run in runs:
        recipe = as_plain(get_recipe(run.recipe).result)
        arch = {"backbone": recipe["backbone"] | {"arch": "resnet50"}, "seed": run.setting("result.seed")}
        if run.setting("result") != recipe | arch or run.data.fingerprint != protocol.settings.get("data_fingerprint"):
            return None
    return f"the paper reports {gain} for {name}, and does not state {unstated}"


def _mean_std(mean: float | None, std: float | None, form: str = ".2f") -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" if std is None else f"{mean:{form}} ± {std:.2f}"


def _padded(lines: list[list[str]]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    padded = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])

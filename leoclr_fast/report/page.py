"""The report: one HTML file out of one run folder, or out of several side by side. Nothing in it is fetched."""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image

from leoclr_fast.config_file import as_plain
from leoclr_fast.recipes import RECIPES
from leoclr_fast.report.comparison import (
    Pair,
    Ratio,
    differing_environment,
    differing_settings,
    find_pairs,
    speed_range,
)
from leoclr_fast.report.curves import plots_of
from leoclr_fast.report.document import Section, document
from leoclr_fast.report.elements import Content, Markup, element, joined, table
from leoclr_fast.report.evaluation_table import METRICS
from leoclr_fast.report.figure import figure
from leoclr_fast.report.plots import MAX_POINTS, svg_of
from leoclr_fast.report.reference import Reference, find_reference
from leoclr_fast.report.reproduce import changed_settings, flat, reproducing_command
from leoclr_fast.report.run_record import RunRecord, duration, read_run, when
from leoclr_fast.report.verdict import bound_sentence, remedy, verdict
from leoclr_fast.run_folder import RunFolder, write_atomically

_POINTS_OF_A_PAGE = 3200  # of each plot, over all runs: keeps twenty runs under 2 MB
_SHEET_BYTES = 250_000
_MAX_SHEETS = 4
_MAX_LISTED = 50
_UNEVEN = 1.5
_DIGEST = re.compile("[0-9a-f]{64}")
_PARTS = {"result": "Changes the result", "speed": "Changes only the speed", "monitor": "What is watched and kept"}


def write_report(paths: list[Path], out: Path) -> dict[str, Any]:
    """Write the page of the runs in `paths`, whole or not at all.

    Returns out, bytes, and for each run what its verdict is made of. Raises FileNotFoundError for what is no run
    folder, ValueError if `out` is no .html, OSError if it cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out} is not an HTML file; give a name that ends in .html")
    runs = [read_run(path) for path in paths]
    page = page_of(runs).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return {"out": str(out), "bytes": len(page), "runs": [_digest(run) for run in runs]}


def page_of(runs: list[RunRecord]) -> str:
    """The whole page."""
    single = len(runs) == 1
    labels = ["this run"] if single else _labels(runs)
    reference, no_reference = find_reference(runs[0]) if single else (None, "")
    curves, plot_data = _curves(runs, labels, reference, no_reference)
    sections: list[Section] = []
    if not single:
        sections.append(("comparison", "Side by side", _comparison(runs, labels)))
    sections += [
        ("curves", "Curves", curves),
        ("views", "Views", _views(runs, labels)),
        ("throughput", "Throughput", _throughput(runs, labels)),
        ("results", "Results", _results(runs, labels)),
        ("configuration", "Configuration", _configuration(runs[0]) if single else _differences(runs, labels)),
        ("environment", "Environment", _environment(runs[0]) if single else _environments(runs, labels)),
        ("warnings", "Warnings and left-out files", _warnings(runs, labels)),
        ("reproduce", "How to reproduce", _reproduce(runs, labels)),
    ]
    title = f"{runs[0].recipe}: {runs[0].path}" if single else f"{len(runs)} runs side by side: {', '.join(labels)}"
    return document(
        title=title,
        heading=runs[0].recipe if single else f"{len(runs)} runs side by side",
        opening=[
            element("p", "Run folder ", element("code", str(runs[0].path)), class_="soft") if single else None,
            [_opening(run, None if single else label) for run, label in zip(runs, labels, strict=True)],
        ],
        sections=sections,
        plot_data=plot_data,
    )


def _opening(run: RunRecord, label: str | None) -> Markup:
    """Verdict and state."""
    state = run.state
    named = element("strong", f"{label}: ") if label is not None else None
    then = (
        f" So it was when this page was written, on {when(time.time())}; a run that was killed since could not say so. "
        "leoclr-fast report makes the page anew."
        if state.kind in ("running", "unsure")
        else None
    )
    return joined(
        [
            element("p", named, verdict(run), class_="verdict" if label is None else None),
            element("p", state.sentence, then, class_=f"state {state.kind}"),
        ]
    )


def _curves(
    runs: list[RunRecord], labels: list[str], reference: Reference | None, no_reference: str
) -> tuple[Content, dict[str, Any]]:
    plots = plots_of(runs, labels, reference)
    if not plots:
        return element("p", "Nothing was logged yet, so there is nothing to draw."), {}
    max_points = max(50, min(MAX_POINTS, _POINTS_OF_A_PAGE // len(runs)))
    figures, plot_data = [], {}
    for plot in plots:
        svg, plot_data[plot.name] = svg_of(plot, max_points)
        figures.append(figure(plot, svg))
    source: Content = None
    if len(runs) == 1:
        source = f"Expected curve: {reference.source}." if reference is not None else no_reference
    return [
        element("p", "Point at a curve, or focus a plot and press the arrow keys, to read its values.", class_="soft"),
        element("p", source, class_="soft") if source else None,
        element("div", figures, class_="plots"),
    ], plot_data


def _views(runs: list[RunRecord], labels: list[str]) -> Content:
    shown = []
    for run, label in list(zip(runs, labels, strict=True))[:_MAX_SHEETS]:
        sheet, caption = _sheet(run), _views_caption(run)
        if sheet is None:
            shown.append(element("p", f"{label}: {caption}" if len(runs) > 1 else caption))
        else:
            name = element("h3", label) if len(runs) > 1 else None
            shown.append(element("figure", name, sheet, element("figcaption", caption)))
    if len(runs) > _MAX_SHEETS:
        shown.append(
            element("p", f"Of {len(runs)} runs, the views of the first {_MAX_SHEETS} are shown.", class_="soft")
        )
    return element("div", shown, class_="plots") if len(runs) > 1 else shown


def _sheet(run: RunRecord) -> Markup | None:
    """The contact sheet, as a JPEG of at most 250 kB inside the page."""
    path = RunFolder(run.path).preview_file
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            image.thumbnail((1400, 1400))
            picture = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        run.problems.append(f"{path} cannot be read: {error}")
        return None
    for quality in (85, 70, 50, 30):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= _SHEET_BYTES:
            break
    else:
        return None
    encoded = base64.b64encode(buffer.getvalue()).decode()
    described = (
        "Contact sheet. Each row is an image with the boxes of its random crops, then its augmented views: first the "
        "query's, then the keys'."
    )
    width, height = picture.size
    return element(
        "img",
        src=f"data:image/jpeg;base64,{encoded}",
        alt=described,
        width=str(width),
        height=str(height),
        class_="sheet",
    )


def _views_caption(run: RunRecord) -> Content:
    rows = run.data.get("preview")
    if run.synthetic:
        return "The images of this run were synthetic noise: there is nothing to see."
    if not isinstance(rows, list) or not rows:
        return "This run folder holds no views of its data."
    items = []
    for row in rows:
        if isinstance(row, dict):
            name = f" (class {row['class']})" if row.get("class") is not None else ""
            items.append(element("li", f"{row.get('name')}{name}"))
    classes = run.data.get("classes")
    listed: Content = None
    if isinstance(classes, list) and classes:
        more = int(run.data.get("num_classes", len(classes))) - min(len(classes), _MAX_LISTED)
        names = ", ".join(str(name) for name in classes[:_MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")
        listed = element("p", f"Classes, of no use to pretraining: {names}.")
    return [element("p", "The first images that this run trains on, row by row:"), element("ol", items), listed]


def _throughput(runs: list[RunRecord], labels: list[str]) -> Content:
    bars: list[tuple[str, float, bool]] = []
    for run, label in zip(runs, labels, strict=True):
        rate, wait = run.images_per_s, run.data_wait_fraction
        if not math.isfinite(rate):
            continue
        name = f"{label}: " if len(runs) > 1 else ""
        if run.synthetic:
            bars.append((f"{name}synthetic images, measured: a ceiling without loading", rate, True))
            continue
        bars.append((f"{name}measured, since the run was last started", rate, False))
        if 0 < wait < 1:
            bars.append(
                (
                    f"{name}if no step had waited for data (computed from the data wait, {100 * wait:.1f} %)",
                    rate / (1 - wait),
                    True,
                )
            )
    if not bars:
        return element("p", "No speed was logged.")
    highest = max(rate for _, rate, _ in bars)
    drawn = [
        element(
            "div",
            element("div", f"{name}: ", element("strong", f"{rate:,.1f} images/s")),
            element(
                "div",
                element(
                    "div",
                    class_="bar-fill ceiling" if ceiling else "bar-fill",
                    style=f"width: {100 * rate / highest:.2f}%",
                ),
                class_="bar-track",
                aria_hidden="true",
            ),
        )
        for name, rate, ceiling in bars
    ]
    notes: list[Content] = []
    for run in runs if len(runs) == 1 else []:
        if bound := bound_sentence(run):
            notes.append(element("p", f"{bound[0].upper()}{bound[1:]}. {remedy(run)}"))
    if not any(run.synthetic for run in runs):
        how = "The ceiling with synthetic images was not measured"
        if command := reproducing_command(runs[0]):
            notes.append(
                element(
                    "p",
                    f"{how}. This measures it; a report of both runs then shows the two side by side: ",
                    element("code", _with_loader(command, "synthetic")),
                    class_="soft",
                )
            )
        else:
            notes.append(element("p", f"{how}.", class_="soft"))
    notes.append(
        element(
            "p",
            "The loader alone is not measured in training; this does it: ",
            element("code", "leoclr-fast bench loader --data PATH"),
            class_="soft",
        )
    )
    return [element("div", drawn, class_="bars"), notes]


def _with_loader(command: str, name: str) -> str:
    words = command.split(" ")
    if "--loader.name" in words:
        at = words.index("--loader.name")
        del words[at : at + 2]
    words[words.index("--out") + 1] = f"RUN-{name}"
    return " ".join([*words, "--loader", name, "--max-steps", "200"])


def _results(runs: list[RunRecord], labels: list[str]) -> Content:
    rows: list[list[Content]] = []
    for run, label in zip(runs, labels, strict=True):
        for record in _first_best_last(run.metrics.knn):
            epoch = record.get("epoch")
            place = f"in training, epoch {epoch:g}" if isinstance(epoch, int | float) else "in training"
            rows.append([label, "knn", *_result_cells(record, ("kind", "step", "epoch", "unix_s")), place])
        for record in run.evaluations:
            place = when(float(record["unix_s"])) if isinstance(record.get("unix_s"), int | float) else ""
            cells = _result_cells(record, ("evaluator", "unix_s"))
            rows.append([label, str(record.get("evaluator", "?")), *cells, place])
    if not rows:
        return element("p", "No evaluator has run: there is no accuracy to show.")
    head = ["run", "evaluator", "result", "settings", "when"]
    hidden = 1 if len(runs) == 1 else 0  # a single run needs no name
    return [
        table(head[hidden:], [row[hidden:] for row in rows], "What evaluators found"),
        element("p", "Every kNN accuracy of the training stands in the table behind its curve.", class_="soft"),
    ]


def _first_best_last(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[0], records[-1]] if len(records) > 1 else records


def _result_cells(record: dict[str, Any], left_out: tuple[str, ...]) -> list[str]:
    """What was found, and everything else the evaluator said, but for lists and tables."""
    settings_of = record.get("settings", record.get("config"))
    nested = settings_of if isinstance(settings_of, dict) else {}
    found, settings = [], []
    for key, value in {**nested, **record}.items():
        if key in left_out or value is None or value == "" or isinstance(value, dict | list):
            continue
        shown = f"{value[:12]}…" if isinstance(value, str) and _DIGEST.fullmatch(value) else value
        name = METRICS.get(key.lower(), key.replace("_", " "))
        if key.lower() in METRICS and isinstance(value, int | float):
            found.append(f"{name} {value:.2f} %")
        elif isinstance(value, float) and key not in nested and key not in ("temperature",):
            found.append(f"{name} {value:.4g}")
        else:
            settings.append(f"{name} {shown:g}" if isinstance(shown, float) else f"{name} {shown}")
    return [", ".join(found), ", ".join(settings)]


def _comparison(runs: list[RunRecord], labels: list[str]) -> Content:
    energy = any(math.isfinite(run.energy_kwh) for run in runs)
    head: list[Content] = [
        "run",
        "method",
        "recipe",
        "seed",
        "epochs",
        "kNN top-1",
        "time",
        "training images/s",
        "data wait",
    ]
    rows: list[list[Content]] = []
    for run, label in zip(runs, labels, strict=True):
        seed = run.setting("result.seed", "?")
        cells: list[Content] = [label, run.method_title, run.recipe, str(seed), _figure_of(run.epochs_done, ".4g")]
        cells += [
            _figure_of(run.knn_top1, ".2f", " %"),
            duration(run.wall_s if math.isfinite(run.wall_s) else run.training_s),
            _figure_of(run.images_per_s, ",.1f"),
            _figure_of(100 * run.data_wait_fraction, ".1f", " %"),
        ]
        rows.append([*cells, _figure_of(run.energy_kwh, ".3g")] if energy else cells)
    parts: list[Content] = [table([*head, "kWh"] if energy else head, rows, "Each run")]
    pairs = find_pairs(runs)
    names = {id(run): label for run, label in zip(runs, labels, strict=True)}
    if pairs:
        parts.append(_pairs(pairs, names))
    elif len({run.recipe for run in runs}) > 1:
        parts.append(element("p", "These runs are of different recipes, and not one of each method: read with care."))
    return parts


def _pairs(pairs: list[Pair], names: dict[int, str]) -> Content:
    rows = []
    for pair in pairs:
        others = ", ".join(pair.differences) if pair.differences else "nothing"
        rows.append(
            [
                names[id(pair.leoclr)],
                names[id(pair.mocov2)],
                _figure_of(pair.gain, "+.2f", " points"),
                _ratio(pair.time_ratio),
                others,
            ]
        )
    head = ["LeOCLR", "MoCo-v2", "kNN top-1, difference", "time per image, ratio", "what else differs"]
    gains = [pair.gain for pair in pairs if math.isfinite(pair.gain)]
    over = (
        f"Over {len(gains)} pairs the difference is {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f} "
        "points (mean ± standard deviation)."
        if len(gains) > 1
        else "One pair says nothing about chance: give several seeds of each."
    )
    return [
        table(head, rows, "LeOCLR against MoCo-v2"),
        element("p", over),
        [
            element("p", warning)
            for run in dict.fromkeys(run for pair in pairs for run in (pair.leoclr, pair.mocov2))
            if (warning := _uneven(run, names[id(run)]))
        ],
        element(
            "p",
            "Ratio: how many times as long LeOCLR trains on an image. In brackets a 95 % bootstrap interval over the "
            "stretches between two log records: how unevenly the two runs went, and whatever else their machine did.",
            class_="soft",
        ),
    ]


def _uneven(run: RunRecord, label: str) -> str | None:
    """A warning where the speed of a run changed so much that its mean says little."""
    slow, fast = speed_range(run)
    if not fast > _UNEVEN * slow:
        return None
    return (
        f"The speed of {label} varied: a fifth of its stretches ran below {slow:,.0f} images/s, a fifth above "
        f"{fast:,.0f}. Something else used the machine, or the data came unevenly: do not take the ratio for one of "
        "the methods."
    )


def _ratio(ratio: Ratio) -> str:
    if not math.isfinite(ratio.value):
        return "unknown"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (no interval: {min(ratio.windows)} stretches are too few)"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _configuration(run: RunRecord) -> Content:
    if not run.config:
        return element("p", "The configuration is not known.")
    changed = changed_settings(run)
    defaults = flat(as_plain(RECIPES[run.recipe]())) if run.recipe in RECIPES else {}
    if changed:
        lines = [f"{name.split('.', 1)[-1]} {_shown(value)} ({_shown(was)})" for name, (was, value) in changed.items()]
        intro = f"Recipe {run.recipe}, changed (the recipe's own value in brackets): {'; '.join(lines)}."
    elif defaults:
        intro = f"Recipe {run.recipe}, nothing changed."
    else:
        intro = f"{run.recipe} is no recipe of this version, so what was changed of it is not known."
    parts: list[Content] = [element("p", intro)]
    known = [part for part in run.config if part != "recipe"]
    for part in known:
        values = flat({part: run.config[part]}) if isinstance(run.config[part], dict) else {part: run.config[part]}
        rows = [
            element(
                "tr",
                element("th", name.removeprefix(f"{part}."), scope="row"),
                element("td", _shown(value)),
                class_="changed" if name in changed else None,
            )
            for name, value in values.items()
        ]
        title = _PARTS.get(part, part)
        parts.append(
            element(
                "details",
                element("summary", f"{title}: {len(rows)} settings"),
                element(
                    "div",
                    element("table", element("tbody", rows)),
                    class_="scroll",
                    tabindex="0",
                    role="region",
                    aria_label=title,
                ),
            )
        )
    return parts


def _differences(runs: list[RunRecord], labels: list[str]) -> Content:
    rows = [[name, *map(_shown, values)] for name, values in differing_settings(runs).items()]
    if not rows:
        return element("p", "The configurations are the same.")
    return table(["setting", *labels], rows, "Only what differs")


def _environment(run: RunRecord) -> Content:
    if not run.environment:
        return [element("p", "The environment was not recorded."), _history(run)]
    rows = [[name, _shown(value)] for name, value in flat(run.environment).items()]
    return [
        element("p", "Git commit: ", element("code", str(run.environment.get("git_commit") or "not known"))),
        element("details", element("summary", "Versions and hardware"), table(["what", "value"], rows, "Environment")),
        _history(run),
    ]


def _environments(runs: list[RunRecord], labels: list[str]) -> Content:
    rows = [[name, *map(_shown, values)] for name, values in differing_environment(runs).items()]
    if not rows:
        return element("p", "The same data, versions and hardware, as far as was recorded.")
    return table(["what", *labels], rows, "Only what differs")


def _history(run: RunRecord) -> Content:
    """When the run was started and how each of these ended, if that is more than once and well."""
    marks = [("started", record) for record in run.metrics.starts] + [("ended", record) for record in run.metrics.ends]
    if len(run.metrics.starts) < 2 and all(record.get("status") == "finished" for record in run.metrics.ends):
        return None
    marks.sort(key=lambda mark: mark[1].get("unix_s", 0))
    rows = []
    for what, record in marks:
        reason = " ".join(str(record[key]) for key in ("status", "reason", "where") if record.get(key))
        rows.append([when(float(record.get("unix_s", 0))), what, str(record.get("step", "?")), reason])
    return element(
        "details",
        element("summary", f"Started {len(run.metrics.starts)} times"),
        table(["when", "what", "step", "how"], rows, "Starts and ends"),
    )


def _warnings(runs: list[RunRecord], labels: list[str]) -> Content:
    parts: list[Content] = []
    for run, label in zip(runs, labels, strict=True):
        name = f"{label}: " if len(runs) > 1 else ""
        lines = [f"{name}{line}" for line in run.notes()]
        warned = [f"step {record.get('step', '?')}: {record.get('text', '')}" for record in run.metrics.warnings]
        unreadable = [f"{image}: {why}" for image, why in run.unreadable_images.items()]
        quarantine = run.data.get("quarantined")
        quarantine = quarantine if isinstance(quarantine, dict) else {}
        left_out = [f"{entry.get('name')}: {entry.get('reason')}" for entry in quarantine.get("listed", [])]
        parts += [
            element("ul", [element("li", line) for line in lines], class_="notes") if lines else None,
            _listed(f"{name}Warned while it ran", warned, len(warned)),
            _listed(f"{name}Images that could not be read, each replaced by the next", unreadable, len(unreadable)),
            _listed(
                f"{name}Images that the conversion left out (quarantine.jsonl)", left_out, quarantine.get("images", 0)
            ),
        ]
    parts = [part for part in parts if part]
    return parts or element("p", "None: nothing was warned of, no image was unreadable or left out.")


def _listed(title: str, lines: list[str], number: int) -> Content:
    if not lines:
        return None
    shown = [element("li", line) for line in lines[:_MAX_LISTED]]
    if number > len(shown):
        shown.append(element("li", f"… and {number - len(shown):,} more"))
    return [element("h3", f"{title}: {number:,}"), element("ul", shown, class_="notes")]


def _reproduce(runs: list[RunRecord], labels: list[str]) -> Content:
    parts: list[Content] = []
    for run, label in zip(runs, labels, strict=True):
        parts.append(element("h3", label) if len(runs) > 1 else None)
        command = reproducing_command(run)
        if command is None:
            parts.append(
                element("p", f"{run.recipe} is no recipe of this version: only its config.yaml says how to run it.")
            )
            continue
        commit = run.environment.get("git_commit")
        lines = []
        if isinstance(commit, str) and commit:
            lines += [f"git checkout {commit.rstrip('+')}", "make setup"]
        parts.append(element("pre", element("code", "\n".join([*lines, command])), tabindex="0", aria_label="Commands"))
        if isinstance(commit, str) and commit.endswith("+"):
            parts.append(
                element("p", "The source tree had changes beyond that commit, which are not recorded.", class_="soft")
            )
    return parts


def _digest(run: RunRecord) -> dict[str, Any]:
    """What `--json` tells of a run; None for what is not known."""
    values = {
        "images_per_s": run.images_per_s,
        "knn_top1": run.knn_top1,
        "data_wait_fraction": run.data_wait_fraction,
        "wall_s": run.wall_s,
        "epochs": run.epochs_done,
    }
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {"run": str(run.path), "state": run.state.kind, "steps": run.metrics.last_step, **known}


def _labels(runs: list[RunRecord]) -> list[str]:
    """The shortest end of each path that says something and that no other run shares; numbered where they are equal."""
    paths = [run.path.resolve().parts for run in runs]
    labels = []
    for number, parts in enumerate(paths):
        others = [other for index, other in enumerate(paths) if index != number]
        for length in range(2 if parts[-1] == "run" else 1, len(parts) + 1):
            if all(other[-length:] != parts[-length:] for other in others):
                break
        label = "/".join(parts[-length:])
        labels.append(label if parts not in others else f"{label} ({number + 1})")
    return labels


def _figure_of(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not known"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "none" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)

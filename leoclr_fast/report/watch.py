"""A run in the terminal, live, out of its folder: also of another rank, or of another machine that shares the disk."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leoclr_fast.report.metrics_file import Floats, number
from leoclr_fast.report.run_record import RunRecord, StateKind, duration, read_run, refresh
from leoclr_fast.report.sentence import as_sentence, bound_clause

_BLOCKS = "▁▂▃▄▅▆▇█"
_OVER: tuple[StateKind, ...] = ("finished", "paused", "stopped", "failed", "killed")
_STYLES = {"failed": "bold red", "killed": "bold red", "finished": "green", "running": "cyan"}


def watch(path: Path, console: Console, *, every_s: float = 2.0, once: bool = False) -> dict[str, Any]:
    """Show a run until it is over, or for ever if it is not; `once` shows it as it is and returns.

    Returns the newest values. Raises FileNotFoundError if there is no run in the folder, ValueError for `every_s`.
    """
    if not every_s > 0:
        raise ValueError(f"--every-s {every_s:g} is not allowed: give a positive number of seconds")
    run = read_run(path)
    if once or not console.is_terminal:
        _follow_plainly(run, console, every_s, once)
    else:
        with Live(view(run), console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while run.state.kind not in _OVER:
                time.sleep(every_s)
                refresh(run)
                live.update(view(run), refresh=True)
    return run.snapshot()


def view(run: RunRecord) -> RenderableType:
    """All of it: state, progress, a line for each metric, kNN, notes."""
    state = run.state
    head = Text.assemble((f"{run.recipe}  ", "bold"), (str(run.path), "dim"))
    parts: list[RenderableType] = [head, Text(state.sentence, style=_STYLES.get(state.kind, "yellow"))]
    if run.total_steps > 0:
        step = run.metrics.last_step
        left = run.seconds_left
        text = f" {100 * step / run.total_steps:.1f} %" + (f", {duration(left)} left" if math.isfinite(left) else "")
        progress = Table.grid(padding=(0, 1))
        progress.add_row(ProgressBar(total=run.total_steps, completed=step, width=40), Text(text))
        parts.append(progress)
    table = Table.grid(padding=(0, 2))
    for name, newest, line in _lines(run):
        table.add_row(name, Text(newest, style="bold", justify="right"), Text(line, style="cyan", no_wrap=True))
    parts.append(table)
    if bound := bound_clause(run):
        parts.append(Text(as_sentence(bound), style="dim"))
    full_at = run.queue_full_at_step
    if full_at is not None and run.metrics.last_step < full_at:
        parts.append(
            Text(f"The queue fills until step {full_at:,}: a rising loss is normal until then.", style="yellow")
        )
    parts += [Text(line, style="yellow") for line in run.notes()]
    parts += [Text(f"step {each.step}: {each.text}", style="yellow") for each in run.metrics.warnings[-3:]]
    return Group(*parts)


def sparkline(values: Floats, width: int = 40) -> str:
    """Values as a row of block characters, each the mean of a stretch; a blank where a stretch has no finite value."""
    if not np.isfinite(values).any():
        return ""
    means = []
    for part in np.array_split(values, min(width, len(values))):
        finite = part[np.isfinite(part)]
        means.append(float(finite.mean()) if len(finite) else math.nan)
    low, high = np.nanmin(means), np.nanmax(means)
    span = high - low
    levels = len(_BLOCKS) - 1
    return "".join(
        " " if math.isnan(mean) else _BLOCKS[round((mean - low) / span * levels) if span > 0 else levels // 2]
        for mean in means
    )


def _lines(run: RunRecord) -> list[tuple[str, str, str]]:
    """Name, newest value and sparkline of each metric that has a value."""
    column, windows = run.metrics.column, run.windows
    series = [
        ("loss", column("loss"), ".4f", ""),
        *((name.replace("_", " "), column(name), ".4f", "") for name in run.metrics.metric_names),
        ("gradient norm", column("gradient_norm"), ".4g", ""),
        ("learning rate", column("lr"), ".4g", ""),
        ("images/s", windows.images_per_s, ",.1f", ""),
        ("data wait", 100 * windows.wait_fraction, ".1f", " %"),
        ("kNN top-1", np.array([number(record.top1) for record in run.metrics.knn]), ".2f", " %"),
    ]
    lines = []
    for name, values, form, unit in series:
        if len(values):
            newest = f"{values[-1]:{form}}{unit}" if math.isfinite(values[-1]) else "not a number"
            lines.append((name, newest, sparkline(values)))
    return lines


def _follow_plainly(run: RunRecord, console: Console, every_s: float, once: bool) -> None:
    """For pipes and log files: the whole view once, then one line for each look that found something new."""
    console.print(view(run), highlight=False)
    shown = run.metrics.last_step
    while not once and run.state.kind not in _OVER:
        time.sleep(every_s)
        refresh(run)
        if run.metrics.last_step > shown:
            shown = run.metrics.last_step
            newest = "  ".join(f"{name} {value}" for name, value, _ in _lines(run))
            console.print(f"step {shown:,}  {newest}", highlight=False, soft_wrap=True)
    if not once:
        console.print(run.state.sentence, highlight=False, soft_wrap=True)

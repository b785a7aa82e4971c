"""The configuration of a run, or what differs between those of several."""

from __future__ import annotations

from leoclr_fast.config_file import as_plain
from leoclr_fast.recipes import RECIPES
from leoclr_fast.report.comparison import (
    differing_settings,
)
from leoclr_fast.report.elements import Content, element, table
from leoclr_fast.report.reproduce import changed_settings, flat
from leoclr_fast.report.run_record import RunRecord
from leoclr_fast.report.values import shown_value

_PARTS = {"result": "Changes the result", "speed": "Changes only the speed", "monitor": "What is watched and kept"}


def configuration_of(run: RunRecord) -> Content:
    """The section of a single run: what was changed of its recipe, and every setting."""
    if not run.config:
        return element("p", "The configuration is not known.")
    changed = changed_settings(run)
    defaults = flat(as_plain(RECIPES[run.recipe]())) if run.recipe in RECIPES else {}
    if changed:
        lines = [
            f"{name.split('.', 1)[-1]} {shown_value(value)} ({shown_value(was)})"
            for name, (was, value) in changed.items()
        ]
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
                element("td", shown_value(value)),
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


def differences_of(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section of several runs."""
    rows = [[name, *map(shown_value, values)] for name, values in differing_settings(runs).items()]
    if not rows:
        return element("p", "The configurations are the same.")
    return table(["setting", *labels], rows, "Only what differs")

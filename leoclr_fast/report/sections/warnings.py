"""What was warned of, unreadable or left out."""

from __future__ import annotations

from leoclr_fast.report.elements import Content, element
from leoclr_fast.report.run_record import RunRecord

_MAX_LISTED = 50


def warnings_of(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section."""
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

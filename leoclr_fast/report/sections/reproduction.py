"""The commands that make a run again."""

from __future__ import annotations

from leoclr_fast.report.elements import Content, element
from leoclr_fast.report.reproduce import reproducing_command
from leoclr_fast.report.run_record import RunRecord


def reproduction_of(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section: for each run the commit and the command."""
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

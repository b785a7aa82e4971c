"""`leoclr-fast study`: the comparison in one command."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import CommonFlags, parse_flags, say
from dataset_tools.limits import unknown
from leoclr_fast.study_plans import STUDY_PLANS, StudyPlan

_DRAWS_ITS_IMAGES = "demo_study"


@dataclass(frozen=True, kw_only=True)
class Study(CommonFlags):
    """Compare methods over seeds: leoclr-fast study PLAN --data PATH --out DIR. The same command continues."""

    data: Path | None = None
    """As in pretrain. demo_study draws its own images into DIR/data."""
    out: Path
    """Gets a folder for each run, and `report.html`, `table.md` and `study.json`."""
    print: bool = False
    """Run nothing: print one line for each run, for other machines or a job array. The study itself then has nothing
    left to run, and makes its table and page."""
    launcher: str | None = None
    """What starts a command, such as "torchrun --nproc-per-node 8 -m leoclr_fast"; this Python if not given."""
    plan_name: tyro.conf.Suppress[str] = ""
    plan: Annotated[StudyPlan, tyro.conf.arg(name="")]

    def run(self, console: Console) -> dict[str, Any]:
        from dataset_tools.demo_data import write_demo_data
        from leoclr_fast.study import LAUNCHER, make_runs, study_runs, write_results

        data = self.data
        if data is None:
            if self.plan_name != _DRAWS_ITS_IMAGES:
                raise ValueError(f"{self.plan_name} needs images: give --data PATH")
            data = self.out / "data"
        runs = study_runs(self.plan, data, self.out)
        if self.print:
            for run in runs:
                say(console, str(run))
            return {"commands": [str(run) for run in runs]}
        if self.data is None:
            write_demo_data(data)
        launcher = LAUNCHER if self.launcher is None else shlex.split(self.launcher)
        made = make_runs(runs, launcher=launcher, say=lambda line: say(console, line))
        table, page = write_results(runs, self.out)
        say(console, table.as_markdown())
        say(console, f"report: {page}")
        return {"table": table.as_document(), "report": str(page), "made": [str(step) for step in made]}


def parse_study(arguments: list[str]) -> Study:
    """`PLAN [FLAG …]` as a command; the defaults of its flags are those of the plan. Raises ValueError."""
    if not arguments or (arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments)):
        raise ValueError(f"study needs a plan first: leoclr-fast study PLAN …; plans: {', '.join(STUDY_PLANS)}")
    name = _DRAWS_ITS_IMAGES if arguments[0].startswith("-") else arguments.pop(0)
    if name not in STUDY_PLANS:
        raise ValueError(unknown("plan", name, STUDY_PLANS))
    plan = STUDY_PLANS[name]
    description = (
        f"{Study.__doc__}\n\nPlan {name}: {(plan.__doc__ or '').strip()}\n\nAll plans: {', '.join(STUDY_PLANS)}."
    )
    defaults = Study(out=tyro.MISSING, plan_name=name, plan=plan())
    return parse_flags(Study, arguments, f"leoclr-fast study {name}", default=defaults, description=description)

"""A study: every run of a plan and every evaluation of it, each an ordinary command in a process of its own.

The run folders are the only state. A step whose result lies there is done; who starts the study again, on this machine
or on another one that shares the disk, takes up what is not done and what nobody else is at.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dataset_tools.files import open_own, take_lock, write_file
from dataset_tools.stop_signals import StopSignals, stop_signals
from leoclr_fast.report.evaluation_table import EvaluationTable, evaluation_table
from leoclr_fast.report.page import write_report
from leoclr_fast.run.folder import RunFolder, write_json
from leoclr_fast.study_plans import StudyPlan

EVALUATORS = ("knn", "linear", "finetune", "transfer", "detect")
LAUNCHER = (sys.executable, "-m", "leoclr_fast")
_CONTINUES = "; the same study continues with what is not done"
_POLL_S = 0.2
_LOOK_AGAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and the file that its end leaves behind."""

    words: tuple[str, ...]
    """Of `leoclr-fast`."""
    result: Path

    def is_done(self) -> bool:
        """Whether it was run to its end."""
        if self.words[0] == "pretrain":
            summary = RunFolder(self.result.parent).read_summary()
            return summary is not None and bool(summary.get("complete"))
        return self.result.is_file()

    def __str__(self) -> str:
        return shlex.join(("leoclr-fast", *self.words))


@dataclass(frozen=True, slots=True)
class StudyRun:
    """The pretraining of a variant with a seed, and its evaluations, one after the other."""

    path: Path
    steps: tuple[Step, ...]

    def steps_left(self) -> list[Step]:
        """Those that were not run to their end."""
        return [step for step in self.steps if not step.is_done()]

    def __str__(self) -> str:
        return " && ".join(map(str, self.steps))


def study_runs(plan: StudyPlan, data: Path, out: Path) -> list[StudyRun]:
    """The runs of a plan in the order in which they are made: seed by seed, so that a part of them can be compared.

    Raises ValueError where an evaluation is none.
    """
    return [_study_run(plan, variant, seed, data, out) for seed in plan.seeds for variant in plan.variants]


def make_runs(
    runs: Sequence[StudyRun], *, launcher: Sequence[str] = LAUNCHER, say: Callable[[str], None]
) -> list[Step]:
    """Run every step that is not done, and return those that were run here.

    launcher: what starts a command: the words before `pretrain …`.
    Raises RuntimeError if a command failed, StoppedBySignalError after a signal, which the command at work has obeyed.
    """
    total = sum(len(run.steps) for run in runs)
    say(f"a study of {len(runs)} runs: {total} steps, {_num_done(runs)} of them done before")
    made: list[Step] = []
    with stop_signals(repeats_insist=False) as stop:
        while runs_left := [run for run in runs if run.steps_left()]:
            made_before = len(made)
            for run in runs_left:
                with _held(run) as lock:
                    for step in run.steps_left() if lock is not None else ():
                        say(f"[{_num_done(runs) + 1}/{total}] {step}")
                        _execute(step, launcher, lock, stop)
                        made.append(step)
            if len(made) == made_before:
                _wait_for_others(runs, stop, say)
    return made


def write_results(runs: Sequence[StudyRun], out: Path) -> tuple[EvaluationTable, Path]:
    """The table of all results, also as `table.md` and `study.json`, and the page `report.html`, in `out`."""
    paths = [run.path for run in runs]
    table, page = evaluation_table(paths), out / "report.html"
    write_report(paths, page)
    write_file(out / "table.md", table.as_markdown() + "\n")
    write_json(out / "study.json", table.as_document())
    return table, page


def _study_run(plan: StudyPlan, variant: str, seed: int, data: Path, out: Path) -> StudyRun:
    recipe, *flags = shlex.split(variant)
    path = out / f"{_slug(variant)}-seed{seed}"
    words = ["pretrain", recipe, "--data", str(data), "--out", str(path), "--seed", str(seed)]
    for flag, value in (("--epochs", plan.epochs), ("--max-images", plan.max_images)):
        words += [] if value is None else [flag, str(value)]
    steps = [Step((*words, *shlex.split(plan.pretrain_flags), *flags), RunFolder(path).summary_file)]
    for evaluation in (*plan.evaluations, *plan.further_evaluations):
        evaluator, *flags = shlex.split(evaluation)
        if evaluator not in EVALUATORS:
            raise ValueError(f"{evaluation!r} is no evaluation: give one of {', '.join(EVALUATORS)}, with its flags")
        place = path / "evaluations" / _slug(evaluation)
        images = [] if "--data" in flags else ["--data", str(data)]
        words = [evaluator, str(path), *flags, *images, "--out", str(place)]
        steps.append(Step(tuple(words), place / "result.json"))
    return StudyRun(path, tuple(steps))


def _slug(words: str) -> str:
    """A name of a folder: `leoclr_cifar10 --method.loss-reduction sum` becomes leoclr_cifar10-loss-reduction-sum."""
    return re.sub(r"[^\w.]+", "-", re.sub(r"--(\w+\.)?", "", words)).strip("-.")


def _num_done(runs: Sequence[StudyRun]) -> int:
    return sum(len(run.steps) - len(run.steps_left()) for run in runs)


@contextmanager
def _held(run: StudyRun) -> Iterator[int | None]:
    """The descriptor of the lock on a run against other studies, or None while one of them is at it.

    The command at work inherits it: it counts as at work until it ends, even if its study was killed.
    """
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with open_own(run.path.with_name(f".{run.path.name}.lock"), "a") as lock:
        try:
            take_lock(lock, wait_s=0.0)
        except BlockingIOError:
            yield None
        else:
            yield lock.fileno()


def _execute(step: Step, launcher: Sequence[str], lock: int | None, stop: StopSignals) -> None:
    """Run a step to its end; a signal is passed on to it, and its end waited for."""
    assert lock is not None
    stop.raise_if_requested(_CONTINUES)
    process = subprocess.Popen([*launcher, *step.words], start_new_session=True, pass_fds=[lock])
    passed_on = False
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            if stop.requested and not passed_on:
                process.send_signal(signal.Signals[stop.name])
                passed_on = True
    except KeyboardInterrupt:  # a second Ctrl-C
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    stop.raise_if_requested(_CONTINUES)
    if process.returncode != 0:
        raise RuntimeError(
            f"this step of the study ended with exit code {process.returncode}: {step}; mend it, and type the same "
            "study again"
        )
    if not step.is_done():
        raise RuntimeError(f"this step of the study ended without its result, {step.result}: {step}")


def _wait_for_others(runs: Sequence[StudyRun], stop: StopSignals, say: Callable[[str], None]) -> None:
    """A pause while every run that is left is another process's."""
    names = ", ".join(run.path.name for run in runs if run.steps_left())
    say(f"waiting for another process that is at {names}")
    until = time.monotonic() + _LOOK_AGAIN_S
    while time.monotonic() < until:
        stop.raise_if_requested(_CONTINUES)
        time.sleep(_POLL_S)

"""A study's order, state and signals, with commands that do nothing but leave their results."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.cli import parse_command, run_command
from leoclr_fast.commands.study import parse_study
from leoclr_fast.study import LAUNCHER, make_runs, study_runs
from leoclr_fast.study_plans import STUDY_PLANS, StudyPlan
from tests.leoclr_fast.test_guides import inline_commands

COMMAND = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
base = out if words[0] == "pretrain" else out.parent.parent
log = base.parent / "commands.log"
with open(log, "a") as file:
    file.write(" ".join([words[0], base.name, *[w for w in words if w == "slow"]]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: (open(log, "a").write("stopped\\n"), sys.exit(130)))
if (base.parent / "fail").exists() and words[0] == "linear":
    sys.exit(3)
if "--slow" in words:
    time.sleep(30)
out.mkdir(parents=True)
name = "summary.json" if words[0] == "pretrain" else "result.json"
(out / name).write_text(json.dumps({"complete": True}))
"""


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    program = tmp_path / "command.py"
    program.write_text(COMMAND)
    return [sys.executable, "-S", str(program)]


PLAN = StudyPlan(
    variants=("leoclr_demo --method.loss-reduction mean", "mocov2_demo"),
    seeds=(0, 1),
    epochs=3,
    evaluations=("knn", "linear --lr-grid 1 3"),
)


def test_every_step_is_run_once_and_a_study_continues_after_a_failure(tmp_path: Path, launcher: list[str]) -> None:
    """Seed by seed; a command that fails is named with its exit code, and what was done before is not run again."""
    out, lines = tmp_path / "study", list[str]()
    out.mkdir()
    runs = study_runs(PLAN, tmp_path / "data", out)
    (out / "fail").touch()
    with pytest.raises(RuntimeError, match=r"ended with exit code 3: leoclr-fast linear .*--lr-grid 1 3"):
        make_runs(runs, launcher=launcher, say=lines.append)
    (out / "fail").unlink()
    made = make_runs(runs, launcher=launcher, say=lines.append)
    names = ["leoclr_demo-loss-reduction-mean-seed0", "mocov2_demo-seed0"]
    names += [name.replace("seed0", "seed1") for name in names]
    expected = [f"{command} {name}" for name in names for command in ("pretrain", "knn", "linear")]
    assert (out / "commands.log").read_text().splitlines() == [*expected[:3], *expected[2:]]
    assert len(made) == 10
    assert lines[0] == "a study of 4 runs: 12 steps, 0 of them done before"
    assert not make_runs(runs, launcher=launcher, say=lines.append)


def test_commands_carry_the_fields_of_the_plan(tmp_path: Path) -> None:
    plan = StudyPlan(
        variants=("leoclr_cifar10 --method.loss-reduction sum",),
        seeds=(7,),
        epochs=2,
        max_images=500,
        pretrain_flags="--precision fp32",
        evaluations=("transfer pets --data /pets",),
    )
    (run,) = study_runs(plan, Path("/images"), Path("out"))
    name = "out/leoclr_cifar10-loss-reduction-sum-seed7"
    assert str(run) == (
        f"leoclr-fast pretrain leoclr_cifar10 --data /images --out {name} --seed 7 --epochs 2 --max-images 500 "
        f"--precision fp32 --method.loss-reduction sum && leoclr-fast transfer {name} pets --data /pets --out "
        f"{name}/evaluations/transfer-pets-data-pets"
    )


def test_a_signal_is_passed_on_and_obeyed(tmp_path: Path, launcher: list[str]) -> None:
    """SIGTERM to the study reaches the command at work; the study ends after it."""
    out = tmp_path / "study"
    out.mkdir()
    plan = StudyPlan(variants=("mocov2_demo --slow",), seeds=(0,))
    log = out / "commands.log"

    def stop_when_begun() -> None:
        while not log.exists():
            time.sleep(0.01)
        time.sleep(0.3)  # until the command listens
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_begun, daemon=True).start()
    with pytest.raises(StoppedBySignalError, match="the same study continues"):
        make_runs(study_runs(plan, tmp_path, out), launcher=launcher, say=lambda _: None)
    assert log.read_text().splitlines() == ["pretrain mocov2_demo-slow-seed0", "stopped"]


def test_what_another_study_is_at_is_left_to_it(
    tmp_path: Path, launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose lock is held is passed over, and taken up when the lock is free."""
    monkeypatch.setattr("leoclr_fast.study._LOOK_AGAIN_S", 0.05)
    out, lines = tmp_path / "study", list[str]()
    out.mkdir()
    runs = study_runs(PLAN, tmp_path, out)
    with open(runs[0].path.with_name(f".{runs[0].path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def say(line: str) -> None:
            lines.append(line)
            if line.startswith("waiting"):
                fcntl.flock(lock, fcntl.LOCK_UN)

        make_runs(runs, launcher=launcher, say=say)
    order = [line.split()[1] for line in (out / "commands.log").read_text().splitlines() if line.startswith("pretrain")]
    assert order == [run.path.name for run in (*runs[1:], runs[0])]
    assert f"waiting for another process that is at {runs[0].path.name}" in lines


def test_plans_are_flags_and_their_mistakes_are_named() -> None:
    flags = ["--seeds", "4", "5", "--pretrain-flags", "--device cpu --compile=off", "--epochs", "7", "--json"]
    study = parse_study(["cifar10_study", "--data", "d", "--out", "o", *flags])
    assert (study.plan.seeds, study.plan.epochs, study.json) == ((4, 5), 7, True)
    assert study.plan.pretrain_flags == "--device cpu --compile=off"
    assert study.plan.variants == STUDY_PLANS["cifar10_study"]().variants
    with pytest.raises(ValueError, match=r"there is no plan 'cifar_study'\. Did you mean cifar10_study"):
        parse_study(["cifar_study"])
    with pytest.raises(ValueError, match="'nearest' is no evaluation: give one of knn, linear"):
        study_runs(StudyPlan(variants=("leoclr_demo",), evaluations=("nearest",)), Path("d"), Path("o"))
    with pytest.raises(ValueError, match="--seeds 1 1 is not allowed"):
        StudyPlan(variants=("leoclr_demo",), seeds=(1, 1))


@pytest.mark.parametrize("name", STUDY_PLANS)
def test_every_command_of_a_plan_is_one_that_the_program_takes(name: str) -> None:
    for run in study_runs(STUDY_PLANS[name](), Path("data"), Path("out")):
        for step in run.steps:
            assert parse_command(list(step.words)) is not None


def test_the_studies_of_the_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their first lines with --print; what is to be typed for a run is printed as it stands."""
    lines = [line for line in inline_commands("docs/evaluate.md") if line.startswith("leoclr-fast study ")]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line.replace("PATH", "images").replace("DIR", str(tmp_path)))
        assert run_command([*words[1:], *(() if "--print" in words else ("--print",))]) == 0
        plan = STUDY_PLANS[words[2]]()
        assert len(capsys.readouterr().out.splitlines()) == len(plan.variants) * len(plan.seeds)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_small_study_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """SIGKILL to the whole process group, five times; the numbers are the same to the bit, and no step is run twice."""
    flags = ["--epochs", "2", "--max-images", "300", "--variants", "leoclr_demo", "mocov2_demo", "--evaluations", "knn"]
    flags += ["linear --epochs 2 --lr-grid 1 3", "--pretrain-flags", "--monitor.checkpoint-every-steps 1"]

    def study(out: Path) -> subprocess.Popen[str]:
        command = [*LAUNCHER, "study", "demo_study", "--out", str(out), *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def rows(out: Path) -> Any:
        return json.loads((out / "study.json").read_text())["rows"]

    assert study(tmp_path / "whole").wait() == 0
    draw, said = random.Random(0), ""
    for _ in range(5):
        process = study(tmp_path / "killed")
        time.sleep(draw.uniform(5, 40))
        at_work = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for group in (process.pid, *map(int, at_work)):
            os.killpg(group, signal.SIGKILL)
        said += process.communicate()[0]
    process = study(tmp_path / "killed")
    said += process.communicate()[0]
    assert process.returncode == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    begun = re.findall(r"^\[\d+/12\] (.*)", said, re.MULTILINE)
    assert len(set(begun)) == 12
    assert len(begun) <= 12 + 5

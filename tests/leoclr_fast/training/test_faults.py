"""Ranks that are killed, stopped or asked to end, full disks, damaged files: each ends in an exact continuation, or in
a clear error within a minute. Losses and weights in float64, bit-identical to an undisturbed run's.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from leoclr_fast.run.checkpoint import list_checkpoints, step_of
from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.forked_runs import ForkedRun, ForkedRuns, finished_steps, fork_server
from tests.leoclr_fast.held_port import held_port
from tests.leoclr_fast.tiny_flags import TINY_FLAGS

NUM_STEPS = 18  # six epochs of three steps
CHECKPOINT_EVERY = 2
END_LIMIT_S = 60.0
TIMEOUT_S = 10.0  # of the collectives, where a rank is frozen for ever
FLAGS = [
    *TINY_FLAGS,
    "--epochs=6",
    "--monitor.knn-every-epochs=3",
    f"--monitor.checkpoint-every-steps={CHECKPOINT_EVERY}",
    "--precision=fp64",
]
KINDS = (
    "kill a rank",
    "kill a rank, restarted",
    "kill all",
    "SIGTERM to a rank",
    "SIGUSR1 to a rank",
    "SIGTERM to all",
    "freeze a rank for ever",
    "freeze a rank and go on",
    "truncated checkpoint",
    "full disk",
    "corrupted sample",
)


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and when."""

    kind: str
    num_ranks: int
    rank: int
    step: int
    frozen_s: float = 60.0
    """How long a rank is frozen that then goes on."""

    def __str__(self) -> str:
        return f"{self.kind}, rank {self.rank} of {self.num_ranks}, step {self.step}"


@dataclass(frozen=True)
class Outcome:
    """What came of a fault."""

    step: int
    """The last one that was logged when all processes were gone."""
    seconds: float
    """Until then."""
    what: str


class Campaign:
    """Faults one after the other, each in a run folder of its own."""

    def __init__(self, runs: ForkedRuns, data: Path, folder: Path) -> None:
        self._runs = runs
        self._data = data
        self._folder = folder
        self._undisturbed: dict[int, list[tuple[int, float]]] = {}

    def start(
        self, name: str, num_ranks: int, *flags: str, data: Path | None = None, max_restarts: int = 0
    ) -> ForkedRun:
        arguments = [
            "pretrain",
            "leoclr_demo",
            f"--data={data or self._data}",
            f"--out={self.out(name)}",
            *FLAGS,
            *flags,
        ]
        return self._runs.start(arguments, self._folder / f"{name}.log", ranks=num_ranks, max_restarts=max_restarts)

    def out(self, name: str) -> Path:
        return self._folder / name

    def undisturbed(self, num_ranks: int) -> list[tuple[int, float]]:
        """Steps and losses of a run to which nothing happens."""
        if num_ranks not in self._undisturbed:
            name = f"undisturbed-{num_ranks}"
            run = self.start(name, num_ranks)
            assert run.wait() == 0, run.output()
            self._undisturbed[num_ranks] = losses(self.out(name))
            assert [step for step, _ in self._undisturbed[num_ranks]] == list(range(1, NUM_STEPS + 1))
        return self._undisturbed[num_ranks]

    def endure(self, fault: Fault, name: str) -> Outcome:
        """Disturb a run, and continue it. Raises AssertionError if it hangs, loses something or is not clear."""
        expected = self.undisturbed(fault.num_ranks)
        out = self.out(name)
        if fault.kind == "corrupted sample":
            return self._endure_corrupted_sample(fault, name)
        restarted = fault.kind == "kill a rank, restarted"
        flags = [f"--monitor.collective-timeout-s={TIMEOUT_S}"] if fault.kind == "freeze a rank for ever" else []
        run = self.start(name, fault.num_ranks, *flags, max_restarts=1 if restarted else 0)
        run.wait_for_step(out, fault.step)
        while fault.kind == "truncated checkpoint" and len(list_checkpoints(out / "checkpoints")) < 2:
            assert run.code() is None, run.output()  # one to truncate, and one to go back to
            time.sleep(0.002)
        saved = newest_step(out)
        injected_s = time.monotonic()
        inject(fault, run)
        code = run.wait(END_LIMIT_S + (fault.frozen_s if fault.kind == "freeze a rank and go on" else 0))
        seconds, output, last = time.monotonic() - injected_s, run.output(), finished_steps(out)
        assert newest_step(out) >= saved
        if restarted or fault.kind == "freeze a rank and go on":
            assert code == 0, output
            what = "restarted by torchrun" if restarted else "went on"
        else:
            what = require_clear_end(fault, run, out, code, output)
            newest = newest_step(out)
            if fault.kind == "truncated checkpoint":
                truncate(list_checkpoints(out / "checkpoints")[-1])
            run = self.start(name, fault.num_ranks)
            assert run.wait() == 0, run.output()
            if newest:
                resumed = run.output().removeprefix(output)
                assert "resuming from" in resumed
                assert ("is damaged" in resumed) == (fault.kind == "truncated checkpoint")
        assert losses(out) == expected
        return Outcome(step=last, seconds=seconds, what=f"{what}; continued exactly")

    def _endure_corrupted_sample(self, fault: Fault, name: str) -> Outcome:
        """It is named, another one takes its place, and a kill in the middle changes nothing."""
        data = self._folder / f"{name}-data"
        shutil.copytree(self._data, data)
        images = sorted((data / "train").rglob("*.png"))
        bad = images[fault.step % len(images)]
        bad.write_bytes(bad.read_bytes()[:60])
        whole = self.start(f"{name}-whole", fault.num_ranks, data=data)
        assert whole.wait() == 0, whole.output()
        assert f"cannot read train/{bad.parent.name}/{bad.name}" in whole.output() or bad.name in whole.output()
        run = self.start(name, fault.num_ranks, data=data)
        run.wait_for_step(self.out(name), fault.step)
        start_s = time.monotonic()
        os.kill(run.rank(fault.rank), signal.SIGKILL)
        run.wait(END_LIMIT_S)
        seconds, last = time.monotonic() - start_s, finished_steps(self.out(name))
        run = self.start(name, fault.num_ranks, data=data)
        assert run.wait() == 0, run.output()
        assert losses(self.out(name)) == losses(self.out(f"{name}-whole"))
        return Outcome(step=last, seconds=seconds, what=f"{bad.name} named and replaced; killed; continued exactly")


def inject(fault: Fault, run: ForkedRun) -> None:
    """Let it happen."""
    numbers = {
        "SIGTERM to a rank": signal.SIGTERM,
        "SIGUSR1 to a rank": signal.SIGUSR1,
        "freeze a rank for ever": signal.SIGSTOP,
    }
    match fault.kind:
        case "kill all" | "truncated checkpoint":
            run.kill_all()
        case "freeze a rank and go on":
            os.kill(run.rank(fault.rank), signal.SIGSTOP)
            time.sleep(fault.frozen_s)
            os.kill(run.rank(fault.rank), signal.SIGCONT)
        case "SIGTERM to all":
            for rank in range(fault.num_ranks):
                os.kill(run.rank(rank), signal.SIGTERM)
        case "full disk":
            metrics_bytes = 1 << 16  # the log fits, a checkpoint does not
            resource.prlimit(run.rank(0), resource.RLIMIT_FSIZE, (metrics_bytes, resource.RLIM_INFINITY))
        case _:
            os.kill(run.rank(fault.rank), numbers.get(fault.kind, signal.SIGKILL))


def require_clear_end(fault: Fault, run: ForkedRun, out: Path, code: int, output: str) -> str:
    """The end that belongs to the fault, in a word."""
    assert code != 0, output
    if fault.kind.startswith("SIG"):
        name = fault.kind.split()[0]
        assert f"stopped by {name} after step {finished_steps(out)}; a checkpoint was saved" in output
        assert newest_step(out) == finished_steps(out)
        return "saved and stopped"
    if fault.kind == "full disk":
        assert "cannot write checkpoint" in output
        assert "the last good checkpoint is" in output or "there is no earlier checkpoint" in output
        return "named the disk"
    if fault.kind in ("kill all", "truncated checkpoint"):
        return "gone"
    assert f"(process {run.rank(fault.rank)}) in step " in output, output
    assert f"lost rank {fault.rank} on " in output, output
    assert "the same command continues from the last checkpoint" in output
    return "named the rank"


def newest_step(out: Path) -> int:
    return max((step_of(path) for path in list_checkpoints(out / "checkpoints")), default=0)


def losses(out: Path) -> list[tuple[int, float]]:
    """Every step that was logged, in the order of the file."""
    return [(record["step"], record["loss"]) for record in RunFolder(out).read_metrics("step")]


def truncate(checkpoint: Path) -> None:
    with open(checkpoint / "state.pt", "r+b") as file:
        file.truncate(1000)


@pytest.fixture(scope="module")
def campaign(runs: ForkedRuns, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(runs, tiny_data, tmp_path_factory.mktemp("faults"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "fault",
    [
        Fault("kill a rank, restarted", num_ranks=2, rank=0, step=7),
        Fault("SIGUSR1 to a rank", num_ranks=2, rank=1, step=8),
        pytest.param(Fault("freeze a rank for ever", num_ranks=2, rank=1, step=5), marks=pytest.mark.long),
        Fault("freeze a rank and go on", num_ranks=2, rank=0, step=5, frozen_s=5.0),
        Fault("full disk", num_ranks=2, rank=0, step=9),
    ],
    ids=str,
)
def test_a_fault(campaign: Campaign, fault: Fault) -> None:
    outcome = campaign.endure(fault, "-".join(str(fault).replace(",", "").split()))
    assert outcome.seconds < END_LIMIT_S


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_thirty_random_faults(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind three times, at a random step, of a random rank, of two or three ranks; their reports are written."""
    with fork_server(pages=True) as runs:
        endure_thirty(Campaign(runs, tiny_data, tmp_path), capsys)


def endure_thirty(campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(7)
    faults = []
    for kind in KINDS * 3:
        num_ranks = draw.choice((2, 3))
        faults.append(Fault(kind, num_ranks, draw.randrange(num_ranks), draw.randrange(3, NUM_STEPS - 5)))
    draw.shuffle(faults)
    with capsys.disabled():
        print("\n| fault | ranks | rank | at step | last step | seconds to the end | outcome |")
        print("|---|---|---|---|---|---|---|")
    for number, fault in enumerate(faults):
        outcome = campaign.endure(fault, f"fault-{number}")
        assert outcome.seconds < END_LIMIT_S + (fault.frozen_s if "go on" in fault.kind else 0)
        with capsys.disabled():
            print(
                f"| {fault.kind} | {fault.num_ranks} | {fault.rank} | {fault.step} | {outcome.step} | "
                f"{outcome.seconds:.1f} | {outcome.what} |",
                flush=True,
            )


@contextmanager
def rank_environments() -> Iterator[list[dict[str, str]]]:
    """What each of two ranks knows of where they are to meet."""
    with held_port() as port:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        yield [{"RANK": str(rank), **shared} for rank in range(2)]


def test_ranks_that_were_started_unlike(campaign: Campaign, tiny_data: Path, tmp_path: Path) -> None:
    """Another option on one rank, and files of other bytes: all ranks end, and say which rank and what differs."""
    runs, other_data = [], tmp_path / "data"
    shutil.copytree(tiny_data, other_data)
    for path in other_data.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")
    with rank_environments() as environments:
        for rank, (data, flags) in enumerate(((tiny_data, FLAGS), (other_data, [*FLAGS, "--seed=5"]))):
            arguments = ["pretrain", "leoclr_demo", f"--data={data}", f"--out={tmp_path / 'run'}", *flags]
            runs.append(campaign._runs.start(arguments, tmp_path / f"rank-{rank}.log", **environments[rank]))
        for run in runs:
            assert run.wait(END_LIMIT_S) == 1, run.output()
            assert "the ranks were not started alike. rank 1 on " in run.output()
            assert "result.seed: 5 there, 0 on rank 0" in run.output()
            assert "the bytes of a sample of its images: " in run.output()
            assert "the data's names and labels: " not in run.output()


def test_a_rank_without_the_data(campaign: Campaign, tiny_data: Path, tmp_path: Path) -> None:
    """The others end with its reason and its name."""
    runs = []
    with rank_environments() as environments:
        for rank, data in enumerate((tiny_data, tmp_path / "nowhere")):
            arguments = ["pretrain", "leoclr_demo", f"--data={data}", f"--out={tmp_path / 'run'}", *FLAGS]
            runs.append(campaign._runs.start(arguments, tmp_path / f"rank-{rank}.log", **environments[rank]))
        assert [run.wait(END_LIMIT_S) for run in runs] == [75, 1]
    for run in runs:
        assert "nowhere" in run.output()
    assert "rank 1 on " in runs[0].output()

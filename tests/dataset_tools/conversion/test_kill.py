"""Death at any moment, and signals: the same command continues, and the result is the same to the byte."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.conversion import workers
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.verify import verify
from dataset_tools.stop_signals import StopSignals
from tests.dataset_tools.conversion.trouble import (
    Command,
    Commands,
    contents,
    images_done,
    journal_often,
    journaled,
    mixed_files,
    options,
    until,
)
from tests.dataset_tools.made_up import write_tar

NUM_TRAIN, NUM_VAL = 2000, 250
PAUSE_S = 0.001


@dataclass
class Case:
    """A conversion, and what it must result in."""

    commands: Commands
    source: Path
    destination: Path
    format: str
    expected: dict[str, str]
    parts: list[Path] = field(default_factory=list)
    """To merge, instead of converting."""

    def start(
        self, *, workers: int = 3, pause_s: float = PAUSE_S, prepare: Callable[[], None] | None = None
    ) -> Command:
        flags = ["--format", self.format, "--shard-size", "128KiB"]
        arguments = ["convert", self.source, self.destination, *flags]
        if self.parts:
            arguments = ["merge", *self.parts, self.destination]
        return self.commands(*arguments, "--workers", workers, prepare=prepare or journal_often(pause_s=pause_s))

    def complete(self, **given: Any) -> Command:
        """Runs it to its end, and compares the result."""
        command = self.start(**given)
        assert command.wait() == 0, command.output
        self.check()
        return command

    def check(self) -> None:
        assert contents(self.destination) == self.expected
        assert not self.destination.with_name(f"{self.destination.name}.partial").exists()

    def no_orphans(self) -> None:
        for command in self.commands:
            until(lambda command=command: not command.session(), 20, "the end of the workers")  # type: ignore[misc]


@pytest.fixture(scope="module")
def large_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("source") / "images.tar", mixed_files(NUM_TRAIN, NUM_VAL))


@pytest.fixture(scope="module")
def large_whole(large_tar: Path, format: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / format
    summary = convert(large_tar, folder, options(format), workers=1)
    assert summary["quarantined"] > 15
    assert summary["reencoded"] > 5
    return folder


@pytest.fixture
def case(commands: Commands, format: str, tmp_path: Path, large_tar: Path, large_whole: Path) -> Case:
    return Case(commands, large_tar, tmp_path / "made", format, contents(large_whole))


@pytest.fixture
def small_case(commands: Commands, format: str, tmp_path: Path, mixed_tar: Path, mixed_whole: Path) -> Case:
    return Case(commands, mixed_tar, tmp_path / "made", format, contents(mixed_whole))


def kill_at_random(case: Case, num_kills: int, seed: int, longest_s: float = 0.5) -> None:
    """Kills again and again; whenever a run has come to its end, compares and begins anew.

    On a slow machine many are killed before they have done anything that the next one could continue from; then there
    are more of them.
    """
    chance = random.Random(f"{seed} {case.format}")
    continued = kills = 0
    while kills < num_kills or (continued < num_kills // 6 and kills < 5 * num_kills):
        published = case.destination.exists()  # the last one was killed while it tidied up
        known = 0 if published else images_done(case.destination)
        command = case.start(workers=chance.choice((1, 2, 3)))
        if chance.random() < 0.25:  # not before the end is near
            until(lambda command=command: command.poll() is not None or "completing" in command.output, 30, "the end")
            time.sleep(chance.uniform(0, 0.05))
        else:
            time.sleep(chance.uniform(0, longest_s))
        victim = chance.choice(("group", "main", "worker"))
        if victim == "worker" and (found := command.workers()):
            with suppress(ProcessLookupError):
                os.kill(chance.choice(found), signal.SIGKILL)
                kills += 1
            time.sleep(chance.uniform(0, longest_s))
        if command.kill(group=victim == "group") == -signal.SIGKILL:
            kills += 1
        else:
            assert command.code == 0, command.output
            case.check()
            shutil.rmtree(case.destination)
        if known and re.search(r"^(train|val): [\d,]+ images", command.output, re.MULTILINE):
            assert "continuing what an earlier call left" in command.output
            continued += bool(re.search(r"[1-9][\d,]* of them done before", command.output))
    case.complete(workers=2, pause_s=0)
    assert continued >= num_kills // 6
    case.no_orphans()


LONG = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("num_kills", "seed"), [(12, 1), pytest.param(50, 2, marks=LONG), pytest.param(50, 3, marks=LONG)]
)
def test_kills_at_random_moments(case: Case, num_kills: int, seed: int) -> None:
    kill_at_random(case, num_kills, seed)


@pytest.mark.long
@pytest.mark.real_data
@pytest.mark.timeout(1200)
def test_kills_at_many_random_moments_of_real_images(
    commands: Commands, real_data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, format: str
) -> None:
    """ImageNet's JPEGs, which are larger than the pieces that are written at once; several MiB of them are scaled."""
    source = tmp_path / "real.tar"
    with tarfile.open(real_data / "imagenet-sample-400.tar") as archive, tarfile.open(source, "w") as copy:
        for member in archive:
            if member.isfile():
                data = archive.extractfile(member)
                for place in ("train/{}", "train/again/{}", "val/{}"):
                    assert data is not None
                    data.seek(0)
                    member.name = place.format(os.path.basename(member.name))
                    copy.addfile(member, data)
    folder = tmp_path_factory.mktemp("whole") / format
    convert(source, folder, options(format), workers=1)
    case = Case(commands, source, tmp_path / "made", format, contents(folder))
    kill_at_random(case, 50, seed=4, longest_s=0.7)
    assert verify(case.destination, source=source, deep=True)["ok"]


def die_at(call: int, half: bool = True, count_into: Path | None = None) -> Callable[[], None]:
    """For `Command`: the main process dies before its `call`-th change of a file or folder (or in its midst)."""

    def prepare() -> None:
        journal_often(0.0)()
        here, calls = os.getpid(), [0]

        def deadly(name: str) -> Callable[..., Any]:
            function = getattr(os, name)

            def wrapped(*arguments: Any, **named: Any) -> Any:
                if os.getpid() == here:
                    calls[0] += 1
                    if count_into:
                        count_into.write_text(str(calls[0]))
                    if calls[0] == call:
                        if half and name == "pwrite":
                            function(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                        os.kill(here, signal.SIGKILL)
                return function(*arguments, **named)

            return wrapped

        for name in ("mkdir", "rmdir", "unlink", "replace", "rename", "fsync", "ftruncate", "pwrite"):
            setattr(os, name, deadly(name))

    return prepare


def count_calls(case: Case) -> int:
    counter = case.destination.with_name("calls")
    case.complete(prepare=die_at(0, count_into=counter))
    shutil.rmtree(case.destination)
    return int(counter.read_text())


def kill_at_each(case: Case, calls: list[int], chance: random.Random) -> None:
    """A death at each of these calls, sometimes a second one when continuing; then the rest, and the comparison."""
    for call in calls:
        first = case.start(workers=2, prepare=die_at(call))
        if first.wait() == 0:  # this time there were fewer calls
            case.check()
        else:
            assert first.code == -signal.SIGKILL, first.output
            if chance.random() < 0.4:
                assert case.start(workers=1, prepare=die_at(chance.randint(1, 40))).wait() in (0, -signal.SIGKILL)
            case.complete(workers=chance.choice((1, 3)), pause_s=0)
        shutil.rmtree(case.destination)
        case.commands.end()


def test_kills_between_the_calls_that_change_files(small_case: Case) -> None:
    """The last ones, which publish the result, and some of the others."""
    total = count_calls(small_case)
    chance = random.Random(5)
    assert total > 40
    calls = [*chance.sample(range(1, total - 20), 2), *chance.sample(range(total - 20, total + 1), 5)]
    kill_at_each(small_case, calls, chance)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_kills_at_every_call_that_changes_files(small_case: Case) -> None:
    kill_at_each(small_case, list(range(1, count_calls(small_case) + 1)), random.Random(6))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=LONG)])
def test_merge_may_be_killed_between_any_calls(small_case: Case, every: bool) -> None:
    """Also when the result is there and only what was left of the work is not removed yet."""
    for number in (1, 2):
        small_case.parts.append(small_case.destination.with_name(f"part{number}"))
        convert(small_case.source, small_case.parts[-1], options(small_case.format, part=f"{number}/2"), workers=1)
    total = count_calls(small_case)
    chance = random.Random(7)
    some = [*chance.sample(range(1, total - 12), 4), *range(total - 12, total + 1, 3)]
    kill_at_each(small_case, list(range(1, total + 1)) if every else some, chance)


def test_a_restart_does_not_wait_for_workers_that_survive(case: Case) -> None:
    """Only the main process is killed, while each worker is in the middle of a task of seconds."""
    command = case.start(workers=3, pause_s=PAUSE_S)
    until(lambda: images_done(case.destination) > 300, 30, "300 images in the journal")
    assert len(command.workers()) == 3
    assert command.kill(group=False) == -signal.SIGKILL
    done = images_done(case.destination)
    second = case.complete(workers=2, pause_s=0)
    assert "continuing what an earlier call left" in second.output
    before = re.search(rf"train: {NUM_TRAIN:,} images, ([\d,]+) of them done before", second.output)
    assert before is not None
    assert int(before[1].replace(",", "")) == done > 300
    case.no_orphans()


def test_a_restart_waits_for_a_worker_that_was_only_just_forked(small_case: Case) -> None:
    """It still holds the lock of its parent, which is dead, and is about to let it go."""

    def prepare() -> None:
        serve = workers._serve

        def serve_late(*arguments: Any) -> None:
            time.sleep(0.5)
            serve(*arguments)

        workers._serve = serve_late

    command = small_case.start(workers=1, prepare=prepare)
    until(command.workers, 30, "a worker")
    assert command.kill(group=False) == -signal.SIGKILL
    small_case.complete(pause_s=0)
    small_case.no_orphans()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("group", [False, True], ids=["main process", "group"])
def test_a_signal_saves_and_stops(case: Case, name: str, group: bool) -> None:
    command = case.start(workers=3)
    until(lambda: images_done(case.destination) > 200, 30, "200 images in the journal")
    (os.killpg if group else os.kill)(command.pid, getattr(signal, name))
    assert command.wait(30) == 130, command.output
    left = re.search(rf"error: stopped by {name} with ([\d,]+) images of train left; the same command", command.output)
    assert left is not None, command.output
    done = NUM_TRAIN - int(left[1].replace(",", ""))
    assert journaled(case.destination)["train"]["done"] == done > 200
    case.no_orphans()
    assert f"train: {NUM_TRAIN:,} images, {done:,} of them done before" in case.complete(pause_s=0).output


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_interrupts_at_once(case: Case, name: str) -> None:
    """Even where the first one is not heeded yet."""

    def prepare() -> None:
        from dataset_tools.conversion import convert

        journal_often()()
        wait, receive = time.sleep, StopSignals.receive

        def tell(stop: StopSignals, number: int, frame: Any) -> None:
            receive(stop, number, frame)
            os.write(1, b"received\n")

        StopSignals.receive = tell  # type: ignore[method-assign]
        convert._Conversion._save = lambda *_: print("saving", flush=True) or wait(50)  # type: ignore

    command = case.start(prepare=prepare)
    until(lambda: "saving" in command.output, 30, "a journal that takes its time")
    os.kill(command.pid, getattr(signal, name))
    until(lambda: "received" in command.output, 30, "the first signal's arrival: two that wait are one")
    assert command.poll() is None
    os.kill(command.pid, getattr(signal, name))
    assert command.wait(30) == 130
    assert command.output.endswith("interrupted\n")
    case.no_orphans()
    case.complete(pause_s=0)

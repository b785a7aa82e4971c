"""Where an evaluation works: its settings, its checkpoints, and in the end its result."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from leoclr_fast.config_file import differing_fields
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.options import EvaluationOptions
from leoclr_fast.evaluate.subject import Subject
from leoclr_fast.run.checkpoint import DamagedCheckpointError, load_newest_checkpoint, save_checkpoint
from leoclr_fast.run.environment import environment
from leoclr_fast.run.folder import RunFolder, write_json

log = logging.getLogger(__name__)

State = dict[str, Any]

_KEEP_CHECKPOINTS = 2


class PausedError(RuntimeError):
    """The evaluation has come to `max_steps`, on all ranks; everything is saved."""

    def __init__(self, step: int, training: Path) -> None:
        super().__init__(f"paused after step {step}")
        self.document = {"complete": False, "step": step, "training": training.name, "out": str(training.parent)}
        """What is known instead of a result. step: of all trainings of the evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFolder:
    """One evaluation on disk: `settings.json`, checkpoints while it runs, `result.json` once it is finished.

    It lies in the run folder, or beside a file of weights, under a name that its settings determine, so that the same
    command continues it.
    """

    path: Path
    evaluator: str
    settings: dict[str, Any]
    """All that the result depends on."""
    finished: dict[str, Any] | None
    """The result, where this very evaluation was made before."""
    run: RunFolder | None
    """Gets the result, too."""
    checkpoint_every_s: float
    max_steps: int | None
    ranks: Ranks

    def checkpoints(self, name: str, steps_before: int = 0) -> Checkpoints:
        """Those of one training of this evaluation, which follows `steps_before` steps of others."""
        return Checkpoints(
            self.path / name, self.checkpoint_every_s, self.ranks, steps_before=steps_before, max_steps=self.max_steps
        )

    def finish(self, result: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Keep the result here and in the run's `evaluations.jsonl`; returns all of it, nothing on other ranks."""
        if not self.ranks.is_main:
            return {}
        document = {"evaluator": self.evaluator, **result, "settings": self.settings}
        if self.run is not None:
            kept = {key: value for key, value in document.items() if key != "evaluator"}
            self.run.add_evaluation(self.evaluator, kept)
        write_json(self.path / "result.json", document | {"environment": environment(device, self.ranks.world_size)})
        return document


@contextmanager
def evaluation_folder(
    evaluator: str,
    settings: dict[str, Any],
    subject: Subject,
    options: EvaluationOptions,
    ranks: Ranks,
) -> Iterator[EvaluationFolder]:
    """The folder of an evaluation with these settings (plain JSON), held against a second process.

    options.out: by default a folder in `subject.evaluations`, named by evaluator and settings.
    Raises ValueError if it cannot be written or holds an evaluation with other settings, RuntimeError if another
    process works in it.
    """
    settings = json.loads(json.dumps({"weights_sha256": subject.sha256, **settings}))
    digest = hashlib.sha256(json.dumps([evaluator, settings], sort_keys=True).encode()).hexdigest()
    with ExitStack() as stack:
        path = options.out if options.out is not None else subject.evaluations / f"{evaluator}-{digest[:12]}"
        finished = ranks.from_main(_enter(path, evaluator, settings, stack) if ranks.is_main else None)
        yield EvaluationFolder(
            path=path,
            evaluator=evaluator,
            settings=settings,
            finished=finished,
            run=subject.run,
            checkpoint_every_s=options.checkpoint_every_s,
            max_steps=options.max_steps,
            ranks=ranks,
        )


def _enter(path: Path, evaluator: str, settings: dict[str, Any], stack: ExitStack) -> dict[str, Any] | None:
    """Make and lock the folder; its result, if there is one."""
    wanted = {"evaluator": evaluator, **settings}
    described = path / "settings.json"
    try:
        if path.is_dir() and not described.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise ValueError(f"{path} holds other files and no evaluation; give --out a new or empty folder")
        path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunFolder(path).locked())
        if described.exists():
            differences = differing_fields(json.loads(described.read_text()), wanted)
            if differences:
                raise ValueError(
                    f"{path} holds another evaluation: {'; '.join(differences[:6])}. Give the same options as there to "
                    "continue it, or another --out."
                )
        write_json(described, wanted)
    except OSError as error:
        raise ValueError(
            f"cannot write to {path}: {error.strerror}; give --out a folder that the evaluation can work in"
        ) from error
    result = path / "result.json"
    if not result.is_file():
        return None
    document: dict[str, Any] = json.loads(result.read_text())
    log.info("this evaluation was made before: %s; delete that file to make it again", result)
    return {key: value for key, value in document.items() if key != "environment"}


def newest_checkpoint(folder: Path) -> tuple[Path, State] | None:
    """As `load_newest_checkpoint`, of an evaluation's training.

    Raises DamagedCheckpointError if none is whole, with the one folder that is to be deleted: not the pretraining's.
    """
    try:
        return load_newest_checkpoint(folder)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(
            f"every checkpoint in {folder} is damaged; delete this folder, and no other, to start this part of the "
            "evaluation again. The weights that are evaluated are not concerned."
        ) from error


class Checkpoints:
    """The checkpoints of one training, written by the first rank: between epochs, but not at every short one."""

    def __init__(
        self, folder: Path, every_s: float, ranks: Ranks, *, steps_before: int = 0, max_steps: int | None = None
    ) -> None:
        """max_steps: where the evaluation is to pause, if it is; counted with the `steps_before` of other trainings."""
        self._folder, self._every_s, self._ranks = folder, every_s, ranks
        self._steps_before, self._max_steps = steps_before, max_steps
        self._saved_at = time.monotonic()

    def load(self, device: torch.device) -> State | None:
        """What was saved last, on every rank; None at the beginning. Every rank reads it by itself."""
        newest = newest_checkpoint(self._folder)
        step = -1 if newest is None else int(newest[1]["step"])
        self._ranks.require_equal(step, f"the step to continue {self._folder} from", device)
        if newest is None:
            return None
        log.info("resuming from %s", newest[0])
        return newest[1]

    def save(self, step: int, state: Callable[[], State], *, due: bool = True) -> None:
        """Keep the state of `step`. due: whether it must be now; else only if the last one is old enough."""
        if not self._ranks.is_main or (not due and time.monotonic() - self._saved_at < self._every_s):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self._folder, step, {"step": step, **state()}, _KEEP_CHECKPOINTS)
        self._saved_at = time.monotonic()

    def last_step(self, total_steps: int) -> int:
        """The step of a training of `total_steps` after which it ends or pauses."""
        return (
            total_steps if self._max_steps is None else min(total_steps, max(0, self._max_steps - self._steps_before))
        )

    def pause(self, step: int, state: Callable[[], State]) -> NoReturn:
        """Save, and raise PausedError."""
        self.save(step, state)
        raise PausedError(self._steps_before + step, self._folder)

    def delete(self) -> None:
        """Its training is over."""
        if self._ranks.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)

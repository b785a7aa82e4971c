"""What comes before the first step: ranks, data, state, run folder, checkpoint, loader, kNN."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from dataset_tools.stop_signals import StopSignals, stop_signals
from dataset_tools.subsets import limited
from dataset_tools.terminal import PlainConsole
from leoclr_fast.config import LR_REFERENCE_BATCH_SIZE, Precision, RunConfig
from leoclr_fast.config_file import as_plain, differing_fields
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.failures import failures_explained
from leoclr_fast.distributed.host_group import HostGroup
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.distributed.same_start import require_same_everywhere
from leoclr_fast.evaluate.data import EvaluationLoaders
from leoclr_fast.evaluate.knn import KnnEvaluation
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.machine.precision import automatic_precision, settled
from leoclr_fast.run.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint, state_of, step_of
from leoclr_fast.run.checkpoint_writer import CheckpointWriter
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.run.telemetry import MetricsLog, ProgressDisplay
from leoclr_fast.run.trackers import open_trackers, require_trackers
from leoclr_fast.training.run_log import RunLog
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.factory import make_loader, settle_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder

log = logging.getLogger(__name__)

MAX_KNN_QUERIES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the loop works with; all of it is open."""

    config: RunConfig
    ranks: Ranks
    host: HostGroup
    state: TrainingState
    step: TrainingStep
    loader: Loader
    knn: KnnEvaluation | None
    folder: RunFolder
    log: RunLog
    display: ProgressDisplay
    writer: CheckpointWriter | None
    """Of the first rank."""
    last_step: int
    total_steps: int
    """Of all epochs; `last_step` is before it where --max-steps pauses the run."""
    stop: StopSignals


@contextmanager
def opened_run(
    config: RunConfig, data: Path, out: Path, *, resume: str, max_steps: int | None, console: Console | None
) -> Iterator[Run]:
    """Open a run, new or continued; see `leoclr_fast.training.loop.pretrain` for the arguments and the errors."""
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"--max-steps {max_steps} is not allowed: give at least 1")
    require_trackers(config.monitor)
    result, monitor = config.result, config.monitor
    with ExitStack() as stack:
        enter = stack.enter_context
        ranks, device = enter(process_group(config.speed.device, monitor.join_limit_s, monitor.collective_timeout_s))
        stop = enter(stop_signals(repeats_insist=False))
        stop.patience_s = patience_s(ranks)
        host = enter(HostGroup(ranks, monitor.collective_timeout_s))

        source = host.together(lambda: open_source(data))
        require_same_everywhere(host, config, source, {"resume": resume, "max_steps": max_steps})
        splits = choose_splits(source, holdout_seed=result.holdout_seed)
        split = limited(splits.pretrain, result.max_images)
        order = TrainOrder(
            num_images=len(split),
            batch_size=result.batch_size,
            micro_batches=result.micro_batches,
            seed=result.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        total_steps = result.epochs * order.steps_per_epoch
        last_step = total_steps if max_steps is None else min(total_steps, max_steps)

        folder = RunFolder(out)
        config, precision = _with_precision(config, device, folder, resume, host)
        state = TrainingState.fresh(config, ranks, device, source.fingerprint)
        step = TrainingStep(state, config, device)

        def open_folder() -> None:
            folder.create()
            enter(folder.locked())

        host.from_main(open_folder)
        _resume(state, config, folder, resume, host)
        gpu = gpu_state(device)
        gpu_warnings = None if gpu is None else gpu["warnings"]
        if ranks.is_main:
            folder.keep_metrics_until(state.step)
            folder.write_config(config)
            folder.write_environment(device, ranks.world_size, gpu_warnings)
        trackers = open_trackers(config, folder.path) if ranks.is_main else []
        metrics_log = MetricsLog(folder.metrics_file, enabled=ranks.is_main, trackers=trackers)
        stack.callback(metrics_log.close)
        run_log = RunLog(folder, metrics_log, state, total_steps, enabled=ranks.is_main)
        enter(run_log.kept(last_step, order.steps_per_epoch, ranks.world_size))
        enter(failures_explained(ranks, lambda: state.step))
        writer = None
        if ranks.is_main:
            writer = CheckpointWriter(folder, monitor.keep_checkpoints)
            writer.continue_from(state.step)
            enter(writer.finished())

        display = ProgressDisplay(console or PlainConsole(), total_steps, enabled=ranks.is_main)
        stack.callback(display.close)
        headline = _headline(config, len(split), order.steps_per_epoch, device, ranks, precision, step.means)
        for line in (splits.note, headline, *(gpu_warnings or [])):
            if line:
                display.say(line)
        if state.synthetic:
            display.say("the images are synthetic noise, so no kNN accuracy is computed: this run measures speed")
        else:
            run_log.describe_data(source, split, splits.note, state.method.views, result.views, result.seed)
        loader_config = settle_loader(split, config.speed.loader, device)
        views = state.method.views
        loader = enter(make_loader(split, views, result.views, loader_config, order, seed=result.seed, device=device))
        knn_images = min(result.max_images or monitor.knn_max_images, monitor.knn_max_images)
        knn = None
        if splits.bank is not None and splits.queries is not None and not state.synthetic and monitor.knn != "off":
            knn = KnnEvaluation(
                limited(splits.bank, knn_images),
                limited(splits.queries, min(knn_images, MAX_KNN_QUERIES)),
                enter(EvaluationLoaders(result.views, loader_config, result.batch_size, 0, device, ranks)),
                k=monitor.knn_k,
                temperature=monitor.knn_temperature,
                precision=config.speed.precision,
            )
        yield Run(
            config=config,
            ranks=ranks,
            host=host,
            state=state,
            step=step,
            loader=loader,
            knn=knn,
            folder=folder,
            log=run_log,
            display=display,
            writer=writer,
            last_step=last_step,
            total_steps=total_steps,
            stop=stop,
        )


def patience_s(ranks: Ranks) -> float:
    """How long a signal waits where there is nothing to save.

    torchrun sends SIGTERM to all ranks when one has died: there must be time to say which one.
    """
    return 0.0 if ranks.world_size == 1 else 8.0


def _with_precision(
    config: RunConfig, device: torch.device, folder: RunFolder, resume: str, host: HostGroup
) -> tuple[RunConfig, str]:
    """The configuration with what `--precision auto` means here, the same on all ranks; and how the headline says it.

    A run that is continued keeps its own. Raises ValueError if the device has none such, or ranks would differ.
    """
    given = config.speed.precision

    def of_the_run() -> Precision:
        return folder.read_config().speed.precision if resume != "never" and folder.exists() else "auto"

    chosen, why = given, ""
    if given == "auto":
        chosen, why = host.from_main(of_the_run), "auto: as the run began"
        if chosen == "auto":
            chosen, why = automatic_precision(device)
    everywhere = host.gathered(chosen)
    if len(set(everywhere)) > 1:
        raise ValueError(f"the ranks' GPUs differ: --precision auto would be {', '.join(everywhere)}; give --precision")
    speed = host.together(lambda: settled(replace(config.speed, precision=chosen), device))
    return replace(config, speed=speed), f"{chosen} ({why})" if why else chosen


def _resume(state: TrainingState, config: RunConfig, folder: RunFolder, resume: str, host: HostGroup) -> None:
    """Load the checkpoint that `--resume` means, if any. The first rank reads it, the others get it from there."""
    found = host.from_main(lambda: _checkpoint_to_resume(config, folder, resume))
    if found is None:
        return
    path, content = found

    def load() -> None:
        try:
            state.load_state_dict(state_of(content, path), config.result, path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no checkpoint of a pretraining: {type(error).__name__}: {error}") from error

    host.together(load)
    if resume == "auto":
        log.info("resuming from %s", path)
        return

    def require_newest() -> None:
        later = [other.name for other in list_checkpoints(folder.checkpoints) if step_of(other) > state.step]
        if later:
            raise ValueError(
                f"{folder.path} holds later checkpoints than {path} ({', '.join(later)}); give another --out to go on "
                "from there, and nothing is lost"
            )

    host.from_main(require_newest)


def _checkpoint_to_resume(config: RunConfig, folder: RunFolder, resume: str) -> tuple[Path, bytes] | None:
    """Its path and content; None for a new run."""
    if resume == "never":
        if folder.exists():
            raise ValueError(
                f"{folder.path} already holds a run and --resume never forbids to continue it; give another --out"
            )
        return None
    if folder.exists():
        saved = folder.read_config()
        differences = differing_fields(as_plain(saved.result), as_plain(config.result))
        if differences:
            raise ValueError(
                f"{folder.path} holds another run: {'; '.join(differences)}. Give the same options as there to "
                "continue it, or another --out for a new run."
            )
    if resume != "auto":
        return Path(resume), read_checkpoint(Path(resume))
    newest = newest_checkpoint(folder.checkpoints)
    return None if newest is None else newest[:2]


def _headline(
    config: RunConfig,
    num_images: int,
    steps_per_epoch: int,
    device: torch.device,
    ranks: Ranks,
    precision: str,
    means: str,
) -> str:
    result = config.result
    ranks_text = f" x {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    return (
        f"{config.recipe}: {result.method.name}, {result.backbone.arch}, {num_images:,} images of "
        f"{result.views.image_size} px, {result.epochs} epochs of {steps_per_epoch} steps, batch {result.batch_size}, "
        f"{', '.join(filter(None, (f'{device}{ranks_text}', precision, means)))}\n"
        f"learning rate {result.lr:g} = base_lr {result.optimizer.base_lr:g} * batch {result.batch_size} / "
        f"{LR_REFERENCE_BATCH_SIZE}; loss reduction {result.method.loss_reduction}, key batch-norm "
        f"{result.method.key_batchnorm}, query batch-norm {result.method.query_batchnorm}"
    )

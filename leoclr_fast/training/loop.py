"""Pretraining: the loop around the step, and all that comes before, between and after the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals, stop_signals
from dataset_tools.subsets import limited
from leoclr_fast.config import LR_REFERENCE_BATCH_SIZE, RunConfig
from leoclr_fast.config_file import as_plain, differing_fields
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.communication_meter import CommunicationMeter
from leoclr_fast.distributed.process_group import Rendezvous, process_group
from leoclr_fast.distributed.same_start import require_same_everywhere
from leoclr_fast.distributed.side_group import SideGroup
from leoclr_fast.distributed.step_agreement import StepAgreement, StepReport
from leoclr_fast.distributed.step_times import RankTimes, StepStopwatch
from leoclr_fast.distributed.watchdog import Watchdog, WatchdogLimits, watched
from leoclr_fast.evaluate.knn_evaluation import KnnEvaluation, knn_evaluation
from leoclr_fast.machine.energy import energy_kwh
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.method.methods import METHODS
from leoclr_fast.run.bottleneck import Bottleneck, find_bottleneck
from leoclr_fast.run.checkpoint import list_checkpoints, read_checkpoint, read_newest_checkpoint, state_of, step_of
from leoclr_fast.run.checkpoint_writer import CheckpointWriter
from leoclr_fast.run.folder import RunFolder, write_json
from leoclr_fast.run.telemetry import (
    MetricsLog,
    NonFiniteLossError,
    ProgressDisplay,
    StepMetrics,
    TrainingClock,
)
from leoclr_fast.run.trackers import open_trackers, require_trackers
from leoclr_fast.schedules import learning_rate
from leoclr_fast.training.device_meter import DeviceMeter
from leoclr_fast.training.out_of_memory import explained_out_of_memory
from leoclr_fast.training.run_diary import RunDiary
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from leoclr_fast.weights.backbone_file import save_backbone
from pipelines.batch import CropBatch
from pipelines.factory import make_loader, settle_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder

log = logging.getLogger(__name__)

_REPORT_LIMIT_S = 10.0  # of a process that the watchdog is about to end


def pretrain(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    resume: str = "auto",
    max_steps: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Pretrain on the images of `data` and leave everything in the run folder `out`.

    resume: `auto` continues a run in `out` of the same configuration, `never` wants an empty folder, a path is the
    checkpoint to start from. max_steps: stop when so many steps are done; the run can be continued.
    Returns the summary: run, epochs, steps, images_per_s (without evaluation), final_loss, knn_top1 (percent, None
    without labels), knn_top1_untrained, data_wait_fraction, energy_kwh (of one GPU; None where it is not known),
    bottleneck (see `leoclr_fast.run.bottleneck`).
    Raises ValueError for what the user can mend, NonFiniteLossError, OSError (a full disk).
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"--max-steps {max_steps} is not allowed: give at least 1")
    require_trackers(config.monitor)
    monitor, last_words = config.monitor, _LastWords()
    limits = WatchdogLimits(
        silence_s=monitor.silence_limit_s, step_s=monitor.hang_limit_s, phase_s=monitor.phase_limit_s
    )
    with (
        process_group(config.speed.device, monitor.join_limit_s) as (joined_ranks, device),
        # torchrun sends SIGTERM to all when one has died: there must be time to say which one.
        stop_signals(enabled=joined_ranks.world_size > 1, repeats_insist=False) as stop,
        watched(
            Rendezvous.of_environment(),
            limits,
            last_words=last_words,
            finish_writing=last_words.finish_writing,
            advice="A rank that was only slow: raise --monitor.hang-limit-s or --monitor.silence-limit-s.",
        ) as watchdog,
        SideGroup(joined_ranks) as side,
        ExitStack() as stack,
    ):
        ranks = joined_ranks
        if ranks.world_size > 1 and device.type == "cpu":
            ranks = replace(ranks, meter=CommunicationMeter())  # tells how long a rank waits for the others
        source = side.together(lambda: open_source(data))
        require_same_everywhere(side, config, source, {"resume": resume, "max_steps": max_steps})
        splits = choose_splits(source, holdout_seed=config.result.holdout_seed)
        split = limited(splits.pretrain, config.result.max_images)
        order = TrainOrder(
            num_images=len(split),
            batch_size=config.result.batch_size,
            micro_batches=config.result.micro_batches,
            seed=config.result.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        total_steps = config.result.epochs * order.steps_per_epoch
        last_step = total_steps if max_steps is None else min(total_steps, max_steps)
        training = TrainingState.fresh(config, ranks, device)
        step = TrainingStep(training, config, device)
        folder = RunFolder(out)

        def open_folder() -> None:
            folder.create()
            stack.enter_context(folder.locked())

        side.from_main(open_folder)
        _resume(training, config, folder, source.fingerprint, resume, side)
        gpu = gpu_state(device)
        gpu_warnings = None if gpu is None else gpu["warnings"]
        if ranks.is_main:
            folder.keep_metrics_until(training.step)
            folder.write_config(config)
            folder.write_environment(device, ranks.world_size, gpu_warnings)
        trackers = open_trackers(config, folder.path) if ranks.is_main else []
        metrics_log = MetricsLog(folder.metrics_file, enabled=ranks.is_main, trackers=trackers)
        stack.callback(metrics_log.close)
        diary = RunDiary(folder, metrics_log, training, total_steps, enabled=ranks.is_main)
        last_words.diary = diary
        stack.enter_context(diary.kept(last_step, order.steps_per_epoch, ranks.world_size))
        stack.enter_context(watchdog.explained())
        writer = None
        if ranks.is_main:
            writer = CheckpointWriter(folder, monitor.keep_checkpoints, keep_best=monitor.keep_best)
            writer.continue_from(training.step)
            stack.enter_context(writer.finished())
            last_words.writer = writer

        display = ProgressDisplay(console or Console(), total_steps, enabled=ranks.is_main)
        stack.callback(display.close)
        headline = _headline(config, len(split), order.steps_per_epoch, device, ranks)
        for line in (splits.note, headline, ranks.placement, *(gpu_warnings or [])):
            if line:
                display.say(line)
        views = METHODS[config.result.method.name].views
        if not training.synthetic:
            diary.describe_data(source, split, splits.note, views, config.result.views, config.result.seed)
        loader_config = settle_loader(split, config.speed.loader, device)
        loader = stack.enter_context(
            make_loader(
                split,
                views,
                config.result.views,
                loader_config,
                order,
                seed=config.result.seed,
                device=device,
            )
        )
        if training.synthetic:
            display.say("the images are synthetic noise, so no kNN accuracy is computed: this run measures speed")
        knn = stack.enter_context(
            knn_evaluation(
                replace(splits, bank=None) if training.synthetic else splits,
                views=config.result.views,
                loader=loader_config,
                batch_size=config.result.batch_size,
                k=config.monitor.knn_k,
                temperature=config.monitor.knn_temperature,
                precision=config.speed.precision,
                device=device,
                ranks=ranks,
                max_images=config.result.max_images,
            )
        )
        run = _Run(
            config=config,
            folder=folder,
            training=training,
            step=step,
            loader=loader,
            knn=knn,
            ranks=ranks,
            side=side,
            stop=stop if ranks.world_size > 1 else None,
            watchdog=watchdog,
            writer=writer,
            display=display,
            metrics_log=metrics_log,
            diary=diary,
            data_fingerprint=source.fingerprint,
            last_step=last_step,
        )
        stack.callback(watchdog.end_steps)  # before all else is closed
        return _train(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the loop works with; all of it is open."""

    config: RunConfig
    folder: RunFolder
    training: TrainingState
    step: TrainingStep
    loader: Loader
    knn: KnnEvaluation | None
    ranks: Ranks
    side: SideGroup
    stop: StopSignals | None
    """Of several ranks: from the start on. A single one can be stopped at once until its first step."""
    watchdog: Watchdog
    writer: CheckpointWriter | None
    """Of the first rank."""
    display: ProgressDisplay
    metrics_log: MetricsLog
    diary: RunDiary
    data_fingerprint: str
    last_step: int


class _LastWords:
    """For the diary, the checkpoint that is being written and the report, before the watchdog ends the process."""

    def __init__(self) -> None:
        self.diary: RunDiary | None = None
        self.writer: CheckpointWriter | None = None

    def finish_writing(self, limit_s: float) -> None:
        if self.writer is not None:
            self.writer.wait(limit_s)
        if self.diary is not None:
            self.diary.last_report(_REPORT_LIMIT_S)

    def __call__(self, sentence: str) -> None:
        if self.diary is not None:
            self.diary.cut_short(sentence)


def _train(run: _Run) -> dict[str, Any]:
    result, training, ranks, watchdog = run.config.result, run.training, run.ranks, run.watchdog
    steps_per_epoch = run.loader.steps_per_epoch
    own_signals = stop_signals(enabled=True, repeats_insist=False) if run.stop is None else nullcontext(run.stop)
    with own_signals as stop:
        if training.step == 0 or (_knn_is_due(run) and _lacks_knn(run)):
            _evaluate(run)
        metrics = StepMetrics(ranks, training.step, loss_is_scaled=training.scaler.is_enabled())
        meter = DeviceMeter(result, run.config.speed.precision, ranks.world_size, run.loader.device)
        agreement, rank_times, stopping = StepAgreement(run.side), RankTimes(warns=ranks.is_main), False
        clock = TrainingClock(training.step)
        stopwatch = StepStopwatch(lambda: clock.data_wait_s, _waits_for_others(ranks, metrics))
        remaining_batches = islice(
            _batches_from(run.loader, training.step, watchdog), max(0, run.last_step - training.step)
        )
        watchdog.start_steps(training.step)
        for batch in clock.timed(remaining_batches):
            lr = learning_rate(result.optimizer.schedule, result.lr, training.step, steps_per_epoch, result.epochs)
            with explained_out_of_memory(run.step, batch), _first_of(clock, training, watchdog):
                metrics.add(run.step(batch, lr))
            step_s, data_wait_s, own_s = stopwatch.read()
            reports = agreement.exchange(
                StepReport(
                    stop=stop.requested,
                    rows_on_host=metrics.num_arrived,
                    step_s=step_s,
                    data_wait_s=data_wait_s,
                    own_s=own_s,
                )
            )
            stopping = any(report.stop for report in reports)
            rank_times.add(reports)
            on_host = min((report.rows_on_host for report in reports), default=0)
            _between_steps(run, metrics, clock, meter, rank_times, on_host, batch.epoch, lr, stopping=stopping)
            watchdog.progress(training.step)
            if stopping:
                break
            stopwatch.start()
        clock.stop()
        stopping = any(report.stop for report in agreement.settle()) or stopping
        if stopping:
            _stop(run, stop)
    with watchdog.phase("the end of the run"):
        return _finish(run, clock)


def _stop(run: _Run, stop: StopSignals) -> None:
    """Save, on all ranks at the same step, and raise StoppedBySignalError."""
    stop.saving = True
    names = [name for name in run.side.gathered(stop.name) if name]
    with run.watchdog.phase("the last checkpoint"):
        run.side.from_main(lambda: _save(run, wait=True))
    raise StoppedBySignalError(
        f"stopped by {names[0] if names else 'a signal'} after step {run.training.step}; a checkpoint was saved, and "
        "the same command continues from there"
    )


def _waits_for_others(ranks: Ranks, metrics: StepMetrics) -> Callable[[], float]:
    """For how long this rank has waited: on a CPU in collectives; on a GPU for the device, which waits in them."""
    meter = ranks.meter
    return meter.seconds if meter is not None else lambda: metrics.device_wait_s


def _first_of(clock: TrainingClock, training: TrainingState, watchdog: Watchdog) -> AbstractContextManager[None]:
    """The first two steps may take their time: one compiles, and nobody knows yet how long the other should take."""
    number = training.step - clock.first_step
    return watchdog.first_steps(typical=number == 1) if number < 2 else nullcontext()


def _batches_from(loader: Loader, step: int, watchdog: Watchdog) -> Iterator[CropBatch]:
    """The batches of all epochs to come, from the one that follows `step` finished steps; an epoch's first one may take
    its time.
    """
    first_epoch, start_step = divmod(step, loader.steps_per_epoch)
    for epoch in count(first_epoch):
        batches = loader.batches(epoch, start_step if epoch == first_epoch else 0)
        with watchdog.phase(f"the start of epoch {epoch}"):
            first = next(batches, None)
        if first is not None:
            yield first
        yield from batches


def _knn_is_due(run: _Run) -> bool:
    """Whether the step that was finished last is followed by an evaluation; the last one of all has its own."""
    epochs, step_in_epoch = divmod(run.training.step, run.loader.steps_per_epoch)
    every = run.config.monitor.knn_every_epochs
    return bool(every) and step_in_epoch == 0 and epochs % every == 0 and run.training.step != run.last_step


def _lacks_knn(run: _Run) -> bool:
    """Whether the log has no evaluation of the step that was finished last.

    Only the first rank reads the log: it may still be writing to it when another one comes here.
    """
    missing = run.ranks.is_main and not run.folder.has_knn_of(run.training.step)
    return run.ranks.main_says(missing, run.loader.device)


def _between_steps(
    run: _Run,
    metrics: StepMetrics,
    clock: TrainingClock,
    meter: DeviceMeter,
    rank_times: RankTimes,
    on_host: int,
    epoch: int,
    lr: float,
    stopping: bool,
) -> None:
    """Log, evaluate and save, whatever is due after a step. The last step's evaluation and checkpoint come later."""
    step, monitor = run.training.step, run.config.monitor
    finished_epochs, step_in_epoch = divmod(step, run.loader.steps_per_epoch)
    epoch_ends, last = step_in_epoch == 0, step == run.last_step
    knn_due = _knn_is_due(run)
    save_due = not last and (
        (epoch_ends and finished_epochs % monitor.checkpoint_every_epochs == 0)
        or (monitor.checkpoint_every_steps is not None and step % monitor.checkpoint_every_steps == 0)
    )
    must_know = bool(knn_due or save_due or last or stopping)  # nothing goes on from a loss that is not finite
    if metrics.num_steps >= monitor.log_every_steps or must_know:
        metrics.send(step=step, epoch=epoch, lr=lr, **_speed(run, clock, meter), **rank_times.take())
    _log_metrics(run, metrics, on_host, must_know)
    if run.writer is not None:
        run.writer.raise_error()
    with clock.paused():
        if save_due:  # before the evaluation, which may take longer than a scheduler's patience
            _save(run)
        top1 = _evaluate(run) if knn_due else None
        if run.writer is not None and top1 is not None:
            with run.watchdog.phase("a checkpoint"):
                run.writer.flush()
                if save_due:
                    run.writer.mark_best(step, top1)
            if not save_due and run.writer.is_best(top1):
                _save(run, top1)
        if save_due or knn_due:
            with run.watchdog.phase("the report"):
                run.diary.report()


def _speed(run: _Run, clock: TrainingClock, meter: DeviceMeter) -> dict[str, float]:
    """How fast it goes, as the host knows it: on a GPU it is a few steps ahead."""
    step, batch_size = run.training.step, run.config.result.batch_size
    steps_per_s_now = clock.lap(step)
    return {
        "images_per_s": clock.steps_per_s(step) * batch_size,
        "images_per_s_now": steps_per_s_now * batch_size,
        "data_wait_fraction": clock.data_wait_fraction,
        "seconds_left": (run.last_step - step) / steps_per_s_now,
        **meter.readings(steps_per_s_now * batch_size),
    }


def _log_metrics(run: _Run, metrics: StepMetrics, on_host: int, wait: bool) -> None:
    try:
        for values in metrics.arrived(on_host, wait=wait):
            run.metrics_log.write("step", **values)
            run.display.update(values["step"], values["epoch"], values)
    except NonFiniteLossError as error:
        if run.writer is not None:
            with run.watchdog.phase("a checkpoint"):
                run.writer.flush()
        checkpoints = list_checkpoints(run.folder.checkpoints)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        epoch = (run.training.step - 1) // run.loader.steps_per_epoch
        raise NonFiniteLossError(
            f"{error}, in epoch {epoch}; nothing was saved since, {kept}. Lower --optimizer.base-lr or choose another "
            "--precision."
        ) from None


def _evaluate(run: _Run) -> float | None:
    """kNN of the query encoder's backbone, to the log and the display; returns the top-1 in percent."""
    if run.knn is None:
        return None
    with run.watchdog.phase("evaluation"):
        accuracy = run.knn.run(run.training.method.query_encoder.backbone)
    step = run.training.step
    run.metrics_log.write(
        "knn",
        step=step,
        epoch=step / run.loader.steps_per_epoch,
        top1=accuracy.top1,
        top5=accuracy.top5,
        k=accuracy.k,
        temperature=accuracy.temperature,
    )
    run.display.say(
        f"epoch {step / run.loader.steps_per_epoch:g}: kNN top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % "
        f"(k = {accuracy.k}, temperature {accuracy.temperature:g})"
    )
    return accuracy.top1


def _save(run: _Run, top1: float | None = None, *, wait: bool = False) -> None:
    """On the first rank, start to write a checkpoint. top1: its accuracy, if known. wait: until it is on the disk."""
    if run.writer is None:
        return
    with run.watchdog.phase("a checkpoint"):
        run.writer.save(run.training.step, run.training.state_dict(run.config.result, run.data_fingerprint), top1)
        if wait:
            run.writer.flush()


def _finish(run: _Run, clock: TrainingClock) -> dict[str, Any]:
    """Save, evaluate, and write what is left of an orderly end; returns the summary (empty on other ranks)."""
    step, steps_per_epoch = run.training.step, run.loader.steps_per_epoch
    trained = step > clock.first_step
    if trained:
        _save(run, wait=True)
    if _lacks_knn(run):
        top1 = _evaluate(run)
        if trained and run.writer is not None and top1 is not None:
            run.writer.mark_best(step, top1)
    unreadable = run.ranks.merged({run.loader.split.names[i]: why for i, why in run.loader.unreadable.items()})
    if not run.ranks.is_main:
        return {}
    complete = step >= run.config.result.epochs * steps_per_epoch
    if complete:
        save_backbone(run.folder.final_weights, run.training.method.query_encoder.backbone, run.config)
    losses, accuracies = run.folder.read_metrics("step"), run.folder.read_metrics("knn")
    summary = {
        "run": str(run.folder.path),
        "recipe": run.config.recipe,
        "complete": complete,
        "epochs": step / steps_per_epoch,
        "steps": step,
        "images_per_s": clock.steps_per_s(step) * run.config.result.batch_size if trained else None,
        "final_loss": losses[-1]["loss"] if losses else None,
        "knn_top1": accuracies[-1]["top1"] if accuracies else None,
        "knn_top1_untrained": accuracies[0]["top1"] if accuracies and accuracies[0]["step"] == 0 else None,
        "data_wait_fraction": clock.data_wait_fraction if trained else None,
        "energy_kwh": energy_kwh(losses) if run.ranks.world_size == 1 else None,
        "unreadable_images": unreadable,
    }
    if not trained:
        run.display.say(f"{run.folder.path} is already at step {step}; nothing was left to do")
        before = run.folder.read_summary()
        if before is not None and (before["steps"], before["complete"]) == (step, complete):
            return before
    elif not run.training.synthetic and (bottleneck := _bottleneck(run, clock)) is not None:
        summary |= {"bottleneck": bottleneck.kind}
        run.display.say(f"{bottleneck}")
    write_json(run.folder.summary_file, summary)
    return summary


def _bottleneck(run: _Run, clock: TrainingClock) -> Bottleneck | None:
    return find_bottleneck(clock.data_wait_fraction, loader=run.loader.name, on_cpu=run.loader.device.type == "cpu")


def _resume(
    training: TrainingState, config: RunConfig, folder: RunFolder, data_fingerprint: str, resume: str, side: SideGroup
) -> None:
    """Load the checkpoint that `--resume` means, if any. The first rank reads it, the others get it from there."""
    found: list[tuple[Path, bytes]] = []

    def find() -> str | None:
        checkpoint = _checkpoint_to_resume(config, folder, resume)
        found.extend([] if checkpoint is None else [checkpoint])
        return None if checkpoint is None else str(checkpoint[0])

    path = side.from_main(find)
    if path is None:
        return
    content = side.bytes_from_main(found[0][1] if found else None)
    side.together(lambda: training.load_state_dict(state_of(content), config.result, data_fingerprint, path))
    if resume == "auto":
        log.info("resuming from %s", path)
        return

    def require_newest() -> None:
        later = [other.name for other in list_checkpoints(folder.checkpoints) if step_of(other) > training.step]
        if later:
            raise ValueError(
                f"{folder.path} holds later checkpoints than {path} ({', '.join(later)}); give another --out to go on "
                "from there, and nothing is lost"
            )

    side.from_main(require_newest)


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
    return read_newest_checkpoint(folder.checkpoints)


def _headline(config: RunConfig, num_images: int, steps_per_epoch: int, device: torch.device, ranks: Ranks) -> str:
    result = config.result
    ranks_text = f" x {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    return (
        f"{config.recipe}: {result.method.name}, {result.backbone.arch}, {num_images:,} images of "
        f"{result.views.image_size} px, {result.epochs} epochs of {steps_per_epoch} steps, batch {result.batch_size}, "
        f"{device}{ranks_text}, {config.speed.precision}\n"
        f"learning rate {result.lr:g} = base_lr {result.optimizer.base_lr:g} * batch {result.batch_size} / "
        f"{LR_REFERENCE_BATCH_SIZE}; loss reduction {result.method.loss_reduction}, key batch-norm "
        f"{result.method.key_batchnorm}"
    )

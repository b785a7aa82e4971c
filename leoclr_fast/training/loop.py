"""Pretraining, top to bottom: open the run, step by step, and in between log, evaluate and save."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from dataset_tools.progress import waiting
from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.config import RunConfig
from leoclr_fast.run.checkpoint import list_checkpoints
from leoclr_fast.run.stepper import endless
from leoclr_fast.run.telemetry import NonFiniteLossError
from leoclr_fast.schedules import learning_rate
from leoclr_fast.training.meters import Meters
from leoclr_fast.training.setup import Run, opened_run, patience_s
from leoclr_fast.training.summary import write_summary


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
    bottleneck (see `leoclr_fast.run.bottleneck`); empty on ranks other than the first.
    Raises ValueError for what the user can mend, NonFiniteLossError, OSError (a full disk).
    """
    with opened_run(config, data, out, resume=resume, max_steps=max_steps, console=console) as run:
        return train(run)


def train(run: Run) -> dict[str, Any]:
    """Train an open run to its last step, or until a signal stops it; returns the summary."""
    result, state = run.config.result, run.state
    steps_per_epoch = run.loader.steps_per_epoch
    if (state.step == 0 and _wants_knn(run)) or (_knn_is_due(run) and _lacks_knn(run)):
        _evaluate(run)
    meters, stopping = Meters(run.config, run.step.metric_names, state, run.host, run.loader.device), False
    batches = islice(endless(run.loader.batches, steps_per_epoch, state.step), max(0, run.last_step - state.step))
    with waiting("the first batch and step") as begun:
        for batch in meters.clock.timed(batches):
            lr = learning_rate(result.optimizer.schedule, result.lr, state.step, steps_per_epoch, result.epochs)
            # ---- a single step ------------------------------------------------------------------------------
            metrics = run.step(batch, lr)
            # -------------------------------------------------------------------------------------------------
            begun()
            run.stop.patience_s = None  # from here on there is something to save
            stopping = meters.add(metrics, stop=run.stop.requested)
            _between_steps(run, meters, batch.epoch, lr, stopping=stopping)
            if stopping:
                break
    if meters.stop() or stopping:
        _save_and_stop(run)
    return _finish(run, meters)


def _between_steps(run: Run, meters: Meters, epoch: int, lr: float, *, stopping: bool) -> None:
    """Log, save and evaluate, whatever is due after a step. The last step's evaluation and checkpoint come later."""
    step, monitor = run.state.step, run.config.monitor
    finished_epochs, step_in_epoch = divmod(step, run.loader.steps_per_epoch)
    last, knn_due = step == run.last_step, _knn_is_due(run)
    save_due = not last and (
        (step_in_epoch == 0 and finished_epochs % monitor.checkpoint_every_epochs == 0)
        or (monitor.checkpoint_every_steps is not None and step % monitor.checkpoint_every_steps == 0)
    )
    must_know = bool(knn_due or save_due or last or stopping)  # nothing goes on from a loss that is not finite
    if meters.num_steps >= monitor.log_every_steps or must_know:
        meters.send(step=step, epoch=epoch, lr=lr, last_step=run.last_step)
    _log_metrics(run, meters, wait=must_know)
    if run.writer is not None:
        run.writer.raise_error()
    if not (save_due or knn_due):
        return
    with meters.clock.paused():
        if save_due:  # before the evaluation, which may take longer than a scheduler's patience
            _save(run)
        if knn_due:
            _evaluate(run)
        run.log.report()


def _knn_is_due(run: Run) -> bool:
    """Whether the step that was finished last is followed by an evaluation; the last one of all has its own."""
    epochs, step_in_epoch = divmod(run.state.step, run.loader.steps_per_epoch)
    every = run.config.monitor.knn_every_epochs
    return bool(every) and epochs > 0 and step_in_epoch == 0 and epochs % every == 0 and run.state.step != run.last_step


def _wants_knn(run: Run) -> bool:
    """Whether there is an evaluation at the start and at the end: of a run that pauses, only where it is asked for."""
    return run.config.monitor.knn == "on" or run.last_step == run.total_steps


def _lacks_knn(run: Run) -> bool:
    """Whether the log has no evaluation of the step that was finished last.

    Only the first rank reads the log: it may still be writing to it when another one comes here.
    """
    newest = run.folder.read_metrics("knn")[-1:] if run.ranks.is_main else []
    return run.ranks.from_main([record["step"] for record in newest] != [run.state.step])


def _log_metrics(run: Run, meters: Meters, *, wait: bool) -> None:
    """Those that have arrived on the host, or all that were sent. Raises NonFiniteLossError."""
    try:
        for values in meters.arrived(wait=wait):
            run.log.write("step", **values)
            run.display.update(values["step"], values["epoch"], values)
    except NonFiniteLossError as error:
        if run.writer is not None:
            run.writer.flush()
        checkpoints = list_checkpoints(run.folder.checkpoints)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        epoch = (run.state.step - 1) // run.loader.steps_per_epoch
        raise NonFiniteLossError(
            f"{error}, in epoch {epoch}; nothing was saved since, {kept}. Lower --optimizer.base-lr or choose another "
            "--precision."
        ) from None


def _evaluate(run: Run) -> None:
    """kNN of the encoder, to the log and the display."""
    if run.knn is None:
        return

    def go_on() -> None:
        if any(run.host.gathered(run.stop.requested)):
            _save_and_stop(run)

    encoder, features = run.state.method.kept_encoder, run.config.monitor.knn_features
    knn = run.knn.run(encoder if features == "projection" else encoder.backbone, go_on)
    epoch = run.state.step / run.loader.steps_per_epoch
    values = {"top1": knn.top1, "top5": knn.top5, "k": run.knn.k, "temperature": run.knn.temperature}
    run.log.write("knn", step=run.state.step, epoch=epoch, **values)
    run.display.say(
        f"epoch {epoch:g}: kNN top-1 {knn.top1:.2f} %, top-5 {knn.top5:.2f} % "
        f"(k = {run.knn.k}, temperature {run.knn.temperature:g})"
    )


def _save(run: Run, *, wait: bool = False) -> None:
    """On the first rank, start to write a checkpoint. wait: until it is on the disk."""
    if run.writer is not None:
        run.writer.save(run.state.step, run.state.state_dict(run.config.result))
        if wait:
            run.writer.flush()


def _save_and_stop(run: Run) -> NoReturn:
    """Save what is not saved yet, on all ranks at the same step, and raise StoppedBySignalError."""
    run.stop.saving = True
    names = [name for name in run.host.gathered(run.stop.name) if name]
    if run.state.step:
        run.host.from_main(lambda: _save(run, wait=True))
    saved = "a checkpoint was saved, and the same command continues from there"
    raise StoppedBySignalError(
        f"stopped by {names[0] if names else 'a signal'} after step {run.state.step}; "
        f"{saved if run.state.step else 'the same command begins again'}"
    )


def _finish(run: Run, meters: Meters) -> dict[str, Any]:
    """Save, evaluate, and write what is left of an orderly end; returns the summary (empty on other ranks)."""
    step = run.state.step
    trained = step > meters.clock.first_step
    if trained:
        _save(run, wait=True)
    run.stop.patience_s = patience_s(run.ranks)  # everything is saved
    if _wants_knn(run) and _lacks_knn(run):
        _evaluate(run)
    return write_summary(run, meters.clock)

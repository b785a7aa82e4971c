"""One sentence about a run: method, data, epochs, accuracy, time, and what bound its speed."""

from __future__ import annotations

import math

from leoclr_fast.report.metrics_file import number
from leoclr_fast.report.run_record import RunRecord, duration
from leoclr_fast.run.bottleneck import Bottleneck, find_bottleneck


def summary_sentence(run: RunRecord) -> str:
    """The sentence; what is not known is left out."""
    clauses = []
    if run.knn is not None and math.isfinite(run.knn_top1):
        untrained = number(run.knn_untrained.top1 if run.knn_untrained else None)
        before = f", untrained {untrained:.2f} %" if math.isfinite(untrained) else ""
        settings = f"k = {run.knn.k or '?'}, temperature {run.knn.temperature or '?'}"
        after = f" at epoch {run.knn.epoch:g}" if run.knn.step != run.metrics.last_step else ""
        clauses.append(f"kNN top-1 is {run.knn_top1:.2f} %{after} ({settings}{before})")
    if math.isfinite(run.metrics.wall_s) and run.metrics.num_steps:
        clauses.append(f"it took {duration(run.metrics.wall_s)} on {_machine(run)}")
    elif math.isfinite(run.training_s):
        clauses.append(f"training alone took {duration(run.training_s)} on {_machine(run)}")
    if bound := bound_clause(run):
        clauses.append(bound)
    done = f"{run.method_facts.title} pretrained a {_backbone(run)} on {_data(run)} for {_epochs(run)}"
    return done + (f": {'; '.join(clauses)}." if clauses else ".")


def bottleneck(run: RunRecord) -> Bottleneck | None:
    """What bound the run's speed, by the measured data wait; None if that was not measured."""
    on_cpu = run.environment.device == "cpu"
    return find_bottleneck(run.data_wait_fraction, loader=str(run.setting("speed.loader.name")), on_cpu=on_cpu)


def bound_clause(run: RunRecord) -> str:
    """As a clause: it was data-bound (…); empty if that was not measured."""
    found = bottleneck(run)
    return f"it was {found.kind} ({found.reason})" if found else ""


def as_sentence(clause: str) -> str:
    """With a capital letter and a full stop; empty if there is no clause."""
    return f"{clause[0].upper()}{clause[1:]}." if clause else ""


def _backbone(run: RunRecord) -> str:
    arch = str(run.setting("result.backbone.arch", "backbone")).replace("resnet", "ResNet-")
    width = run.setting("result.backbone.width_multiplier", 1.0)
    return arch if width == 1.0 else f"{arch} (width × {width})"


def _data(run: RunRecord) -> str:
    if run.synthetic:
        return "synthetic noise, to measure speed"
    if run.data.images is not None:
        return f"{run.data.images:,} images of {run.data.path}"
    images = run.steps_per_epoch * run.batch_size
    return f"about {images:,.0f} images" if math.isfinite(images) else "images it does not name"


def _epochs(run: RunRecord) -> str:
    planned = run.setting("result.epochs")
    if not math.isfinite(run.epochs_done):
        return f"{run.metrics.last_step:,} steps"
    if abs(run.epochs_done - number(planned)) < 1e-9:
        return f"{planned} epochs"
    return f"{run.epochs_done:.3g} of {planned} epochs"


def _machine(run: RunRecord) -> str:
    environment = run.environment
    ranks, threads = environment.world_size, environment.torch_threads
    if environment.gpu:
        return f"{ranks} × {environment.gpu}"
    machine = (f"{ranks} ranks on " if ranks > 1 else "") + (environment.cpu or "an unnamed machine")
    return f"{machine} ({threads} CPU thread{'s' if threads != 1 else ''})" if threads else machine

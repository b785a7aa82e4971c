"""One sentence about a run: method, data, epochs, accuracy, time, and what bound its speed."""

from __future__ import annotations

import math

from leoclr_fast.report.run_record import RunRecord, duration
from leoclr_fast.report.values import number
from leoclr_fast.run.bottleneck import Bottleneck, find_bottleneck


def verdict(run: RunRecord) -> str:
    """The sentence; what is not known is left out."""
    subject = f"{run.method_title} pretrained a {_backbone(run)} on {_data(run)} for {_epochs(run)}"
    clauses = []
    if math.isfinite(run.knn_top1):
        before = f", untrained {run.knn_top1_untrained:.2f} %" if math.isfinite(run.knn_top1_untrained) else ""
        settings = f"k = {run.knn.get('k', '?')}, temperature {run.knn.get('temperature', '?')}"
        step = run.knn.get("step")
        epoch = number(run.knn.get("epoch"))
        after = f" at epoch {epoch:g}" if step != run.metrics.last_step and math.isfinite(epoch) else ""
        clauses.append(f"kNN top-1 is {run.knn_top1:.2f} %{after} ({settings}{before})")
    if math.isfinite(run.wall_s) and run.metrics.num_steps_kept:
        clauses.append(f"it took {duration(run.wall_s)} on {_machine(run)}")
    elif math.isfinite(run.training_s) and run.metrics.num_steps_kept:
        clauses.append(f"training alone took {duration(run.training_s)} on {_machine(run)}")
    if bound := bound_sentence(run):
        clauses.append(bound)
    return subject + (f": {'; '.join(clauses)}." if clauses else ".")


def bound_sentence(run: RunRecord) -> str:
    """Data- or compute-bound, by the measured data wait; empty if it was not measured."""
    found = _bottleneck(run)
    return f"it was {found.kind} ({found.reason})" if found else ""


def remedy(run: RunRecord) -> str:
    """One thing to do against waiting for data; empty where there is nothing to mend."""
    found = _bottleneck(run)
    return f"{found.remedy[0].upper()}{found.remedy[1:]}." if found and found.remedy else ""


def _bottleneck(run: RunRecord) -> Bottleneck | None:
    return find_bottleneck(
        run.data_wait_fraction,
        loader=str(run.setting("speed.loader.name")),
        on_cpu=str(run.environment.get("device", "")) == "cpu",
    )


def _backbone(run: RunRecord) -> str:
    arch = str(run.setting("result.backbone.arch", "backbone")).replace("resnet", "ResNet-")
    width = run.setting("result.backbone.width_multiplier", 1.0)
    return arch if width == 1.0 else f"{arch} (width × {width})"


def _data(run: RunRecord) -> str:
    if run.synthetic:
        return "synthetic noise, to measure speed"
    images = run.data.get("images")
    path = run.data.get("path")
    if isinstance(images, int):
        return f"{images:,} images of {path}"
    steps = run.steps_per_epoch
    if math.isfinite(steps) and math.isfinite(run.batch_size):
        return f"about {steps * run.batch_size:,.0f} images"
    return "images it does not name"


def _epochs(run: RunRecord) -> str:
    planned = run.setting("result.epochs")
    if not math.isfinite(run.epochs_done):
        return f"{run.metrics.last_step:,} steps"
    if abs(run.epochs_done - number(planned)) < 1e-9:
        return f"{planned} epochs"
    return f"{run.epochs_done:.3g} of {planned} epochs"


def _machine(run: RunRecord) -> str:
    environment = run.environment
    ranks = environment.get("world_size", 1)
    if environment.get("gpu"):
        return f"{ranks} × {environment['gpu']}"
    threads = environment.get("torch_threads")
    cpu = environment.get("cpu") or "an unnamed machine"
    many = f"{ranks} ranks on " if isinstance(ranks, int) and ranks > 1 else ""
    return f"{many}{cpu} ({threads} CPU thread{'s' if threads != 1 else ''})" if threads else f"{many}{cpu}"

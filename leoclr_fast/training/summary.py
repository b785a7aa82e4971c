"""What a run comes to: `summary.json`, and `final.safetensors` when it is complete."""

from __future__ import annotations

from typing import Any

from leoclr_fast.machine.energy import energy_kwh
from leoclr_fast.run.bottleneck import find_bottleneck
from leoclr_fast.run.folder import write_json
from leoclr_fast.run.telemetry import TrainingClock
from leoclr_fast.training.setup import Run
from leoclr_fast.weights.backbone_file import save_backbone


def write_summary(run: Run, clock: TrainingClock) -> dict[str, Any]:
    """The summary that `pretrain` returns, written by the first rank; empty on the others. A collective."""
    unreadable = run.ranks.merged({run.loader.split.names[i]: why for i, why in run.loader.unreadable.items()})
    if not run.ranks.is_main:
        return {}
    step, result = run.state.step, run.config.result
    trained, complete = step > clock.first_step, step >= result.epochs * run.loader.steps_per_epoch
    if complete:
        save_backbone(run.folder.final_weights, run.state.method.kept_encoder.backbone, run.config)
    losses, accuracies = run.folder.read_metrics("step"), run.folder.read_metrics("knn")
    summary = {
        "run": str(run.folder.path),
        "recipe": run.config.recipe,
        "complete": complete,
        "epochs": step / run.loader.steps_per_epoch,
        "steps": step,
        "images_per_s": clock.steps_per_s(step) * result.batch_size if trained else None,
        "final_loss": losses[-1].get("loss") if losses else None,
        "knn_top1": accuracies[-1].get("top1") if accuracies else None,
        "knn_top1_untrained": accuracies[0].get("top1") if accuracies and accuracies[0]["step"] == 0 else None,
        "data_wait_fraction": clock.data_wait_fraction if trained else None,
        "energy_kwh": energy_kwh(losses) if run.ranks.world_size == 1 else None,
        "unreadable_images": unreadable,
    }
    if not trained:
        run.display.say(f"{run.folder.path} is already at step {step}; nothing was left to do")
        before = run.folder.read_summary()
        if before is not None and (before["steps"], before["complete"]) == (step, complete):
            return before
    elif not run.state.synthetic:
        on_cpu = run.loader.device.type == "cpu"
        bottleneck = find_bottleneck(clock.data_wait_fraction, loader=run.loader.name, on_cpu=on_cpu)
        if bottleneck is not None:
            summary |= {"bottleneck": bottleneck.kind}
            run.display.say(f"{bottleneck}")
    write_json(run.folder.summary_file, summary)
    return summary

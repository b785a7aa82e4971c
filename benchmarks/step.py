"""Where the time of a training step goes: its parts one by one, and the whole as `pretrain` runs it.
`python -m benchmarks.step --help`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from torch.nn.utils import get_total_norm

from benchmarks.calls import interleaved_ms
from benchmarks.results import print_document
from dataset_tools.limits import Count, Limited, Seconds
from leoclr_fast.bench.config import BenchSetting, Rounds
from leoclr_fast.bench.page import bench_page, number, percent, spread, table_of
from leoclr_fast.bench.rounds import SYNTHETIC, OurMethod, open_batches, prepare, training_images
from leoclr_fast.bench.setting import bench_device, is_paper_setting, setting_header
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.timing import Say
from leoclr_fast.config import MethodName, SpeedConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.machine.precision import encoder_precision, settled, view_dtype
from leoclr_fast.method.flops import mfu, peak_flops_per_s
from leoclr_fast.method.methods import METHODS, method_class
from leoclr_fast.method.momentum_contrast import MomentumContrast
from leoclr_fast.run.environment import environment
from leoclr_fast.training.acceleration import compiles_encoders
from pipelines.augment import augmented_views
from pipelines.batch import CropBatch

WHOLE = "whole step"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBenchConfig(Limited):
    """Whose steps are taken apart, and how often each part is timed."""

    methods: tuple[MethodName, ...] = ()
    """Names in `leoclr_fast.method.methods`; by default all."""
    repeats: Rounds = 20
    """Timed calls of each part."""
    warmup: Count = 3
    """Calls before them, not timed."""
    max_s: Seconds = 600.0
    """For everything; when it is over, each part has been timed less often, at least twice."""


def bench_step(
    config: StepBenchConfig, setting: BenchSetting, speed: SpeedConfig, say: Say = lambda _: None
) -> dict[str, Any]:
    """Time the parts of a step and the whole of it, for each method, on synthetic images that lie on the device.

    Parts and whole are interleaved. The parts are launched one by one, the encoders compiled as the step's are; all
    of it runs as configured, so on a GPU, as one captured graph, it may take less time than its parts.
    Returns a JSON document with `rows`: method, precision, part, ms with its quantiles, share (of the sum of the
    parts); for the whole step also images_per_s, mfu and peak_memory_gib.
    Raises ValueError for a setting that cannot be.
    """
    device = bench_device(speed.device)
    speed = settled(speed, device)
    state = gpu_state(device)
    methods = config.methods or tuple(METHODS)
    result = setting.result(methods[0])
    header = setting_header(result, speed, device)
    say(header)
    rows: list[dict[str, Any]] = []
    for method in methods:
        rows += _method_rows(method, config, setting, speed, device, config.max_s / len(methods))
        torch.compiler.reset()  # else code compiled for one network counts against the limit of the next
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"{method}: {rows[-1]['ms']:,.2f} ms a step, {rows[-1]['images_per_s']:,.1f} images/s")
    return {
        "header": header,
        "paper_setting": is_paper_setting(result),
        "setting": as_plain(setting),
        "speed": as_plain(speed),
        "environment": environment(device, 1),
        "gpu": state,
        "notes": list(state["warnings"]) if state else ["measured on a CPU, which says nothing of a GPU"],
        "rows": rows,
    }


def step_markdown(document: dict[str, Any], command: str | None = None) -> str:
    return bench_page(
        "A training step and its parts",
        f"Setting: {document['header']}",
        step_table(document["rows"]),
        rounds=f"{document['rows'][0]['calls']} interleaved rounds. The parts run alone, launched one by one; the "
        "whole step as configured.",
        command=command,
        notes=document["notes"],
    )


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    return table_of(
        rows,
        {
            "method": lambda row: row["method"],
            "part": lambda row: row["part"],
            "ms": lambda row: spread(row, "ms", 2),
            "share of the parts": lambda row: percent(row["share"]),
            "images/s": lambda row: number(row.get("images_per_s")),
            "MFU": lambda row: percent(row.get("mfu")),
            "peak memory, GiB": lambda row: number(row.get("peak_memory_gib")),
        },
    )


def _method_rows(
    method: MethodName,
    config: StepBenchConfig,
    setting: BenchSetting,
    speed: SpeedConfig,
    device: torch.device,
    max_s: float,
) -> list[dict[str, Any]]:
    result, views = setting.result(method), method_class(method).views
    with open_batches(training_images(None, result), [views], result, SYNTHETIC, device) as (batches, _):
        ours = prepare(partial(OurMethod, method, setting, speed, device), batches, device, config.warmup)
        assert isinstance(ours, OurMethod)
        batch = next(batches[views])
    calls = {**_parts(ours, batch, device), WHOLE: lambda: ours.step(batch)}
    times = interleaved_ms(calls, config.repeats, device, warmup=config.warmup, lead=1, max_s=max_s)
    rows: list[dict[str, Any]] = [
        {"method": method, "precision": speed.precision, "part": part, **quantiles("ms", own), "calls": len(own)}
        for part, own in times.items()
    ]
    parts_ms = sum(row["ms"] for row in rows[:-1])
    for row in rows:
        row["share"] = None if row["part"] == WHOLE else row["ms"] / parts_ms
    peak, _ = peak_flops_per_s(device, speed.precision)
    images_per_s = 1000 * result.batch_size / rows[-1]["ms"]
    rows[-1] |= {
        "images_per_s": images_per_s,
        "mfu": mfu(ours.flops_per_image, images_per_s, peak),
        "peak_memory_gib": ours.peak_memory_gib,
    }
    return rows


def _parts(ours: OurMethod, batch: CropBatch, device: torch.device) -> dict[str, Callable[[], object]]:
    """The parts of a step as functions without arguments, in the order in which a step runs them."""
    training, result, speed = ours.training, ours.config.result, ours.config.speed
    method = training.method
    if not isinstance(method, MomentumContrast):
        raise ValueError(
            f"{method.title} cannot be taken apart here, only momentum contrast; give others to bench train-time"
        )
    size, seed = result.batch_size, result.seed
    networks: list[Callable[[torch.Tensor], torch.Tensor]] = list(method.compiled_encoders())
    if compiles_encoders(speed, device):
        networks = [torch.compile(network, dynamic=False) for network in networks]
    query_encoder, key_encoder = networks

    def augment() -> tuple[torch.Tensor, ...]:
        return augmented_views(batch, ours.views, result.views, seed=seed, dtype=view_dtype(speed.precision))

    query_view, *key_views = augment()
    schedule = method.plan(BatchLayout(batch_size=size))
    order = schedule.draw(seed, training.step)
    restore = torch.from_numpy(order.restore).to(device)
    passes = torch.cat(key_views)[torch.from_numpy(order.encoded[0]).to(device)].split(schedule.pass_sizes)

    def encode_keys() -> list[torch.Tensor]:
        with encoder_precision(speed.precision, device):
            return method.encode_keys(passes, restore, schedule.largest, key_encoder)

    weights = list(method.query_encoder.parameters())

    def encode_query() -> torch.Tensor:
        with encoder_precision(speed.precision, device):
            return query_encoder(query_view)

    keys, query = encode_keys(), encode_query().detach().requires_grad_()
    gradient = torch.zeros_like(query)

    def query_forward_and_backward() -> None:
        for weight in weights:
            weight.grad = None
        encode_query().backward(gradient)

    def loss() -> None:
        query.grad = None
        method.loss(query, keys).backward()

    def gradients() -> list[torch.Tensor]:
        if any(weight.grad is None for weight in weights):
            query_forward_and_backward()  # its gradients are zero: the weights only decay
        return [weight.grad for weight in weights if weight.grad is not None]

    def optimize() -> None:
        gradients()
        training.optimizer.step()

    def metrics() -> None:
        get_total_norm(gradients())
        method.similarities(query, keys)

    return {
        "augmentation": augment,
        "moving average of the key encoder": method.update_key_encoder,
        f"key forward, {len(key_views)} views": encode_keys,
        "query forward and backward": query_forward_and_backward,
        "loss forward and backward": loss,
        "optimizer": optimize,
        "metrics: gradient norm and similarities": metrics,
        "enqueue": lambda: method.enqueue(keys),
    }


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """Time the parts of a training step and the whole of it, on synthetic images."""

    config: Annotated[StepBenchConfig, tyro.conf.arg(name="")] = field(default_factory=StepBenchConfig)
    setting: Annotated[BenchSetting, tyro.conf.arg(name="")] = field(default_factory=BenchSetting)
    """The same for every method."""
    speed: Annotated[SpeedConfig, tyro.conf.arg(name="")] = field(default_factory=SpeedConfig)

    def run(self) -> None:
        print_document(bench_step(self.config, self.setting, self.speed, print), step_markdown)


if __name__ == "__main__":
    import tyro  # a machine with a GPU may lack it, and the suite does not need it

    tyro.cli(StepBenchmark).run()

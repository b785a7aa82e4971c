"""Where the time of a training step goes: its parts one by one, and the whole as `pretrain` runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from leoclr_fast.bench.contestant import OurMethod
from leoclr_fast.bench.feeds import open_feeds, training_images
from leoclr_fast.bench.setting import BenchSetting, bench_device, departures_from_paper, setting_header
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.stopwatch import time_calls_ms
from leoclr_fast.bench.tables import markdown_table, number, percent, spread
from leoclr_fast.bench.turns import prepare
from leoclr_fast.config import MethodName, SpeedConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.machine.precision import encoder_precision, view_dtype
from leoclr_fast.method.flops import mfu, peak_flops_per_s
from leoclr_fast.method.methods import METHODS
from leoclr_fast.method.momentum_contrast import MomentumContrast
from leoclr_fast.run.environment import environment
from leoclr_fast.training.acceleration import compiles_encoders
from pipelines.augment import augmented_views
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig

Say = Callable[[str], None]
WHOLE = "whole step"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBenchConfig:
    """What is taken apart, and how often it is timed."""

    setting: BenchSetting = field(default_factory=BenchSetting)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    methods: tuple[MethodName, ...] = ("leoclr", "mocov2")
    repeats: int = 20
    """Timed calls of each part."""
    warmup: int = 3
    """Calls before them, not timed."""
    max_s: float = 600.0
    """For everything; parts that come late are timed less often, at least twice."""

    def __post_init__(self) -> None:
        for name, least in (("repeats", 2), ("warmup", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is not allowed: give at least {least}")


def bench_step(config: StepBenchConfig, say: Say = lambda _: None) -> dict[str, Any]:
    """Time the parts of a step and the whole of it, for each method, on synthetic images that lie on the device.

    The parts run alone, again and again, launched one by one, the encoders compiled if the step's are; the whole step
    runs as configured, so on a GPU, as one captured graph, it may take less time than its parts.
    Returns a JSON document with `rows`: method, precision, part, ms (median) with q20 and q80, share (of the sum of the
    parts); for the whole step also images_per_s, mfu and peak_memory_gib.
    Raises ValueError for a setting that cannot be.
    """
    device = bench_device(config.speed)
    state = gpu_state(device)
    header = setting_header(config.setting.result(config.methods[0]), config.speed, device)
    say(header)
    rows: list[dict[str, Any]] = []
    for method in config.methods:
        rows += _method_rows(method, config, device)
        torch.compiler.reset()  # else code compiled for one network counts against the limit of the next
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"{method}: {rows[-1]['ms']:,.2f} ms a step, {rows[-1]['images_per_s']:,.1f} images/s")
    return {
        "header": header,
        "paper_setting": not departures_from_paper(config.setting.result(config.methods[0])),
        "setting": as_plain(config.setting),
        "speed": as_plain(config.speed),
        "environment": environment(device, 1),
        "gpu": state,
        "notes": list(state["warnings"]) if state else ["measured on a CPU, which says nothing of a GPU"],
        "rows": rows,
    }


def step_markdown(document: dict[str, Any], command: str | None = None) -> str:
    """The document of `bench_step` as a page."""
    lines = ["# A training step and its parts", "", f"Setting: {document['header']}.", ""]
    if command:
        lines += [f"`{command}`", ""]
    lines += [f"- {note}" for note in document["notes"]]
    lines += ["", "Median [20 %, 80 %]. The parts run alone, launched one by one; the whole step as configured.", ""]
    return "\n".join(lines) + "\n" + step_table(document["rows"])


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """Parts and wholes as a Markdown table."""
    return markdown_table(
        ("method", "part", "ms", "share of the parts", "images/s", "MFU", "peak memory, GiB"),
        [
            (
                row["method"],
                row["part"],
                spread(row["ms"], row["q20"], row["q80"], 2),
                percent(row["share"]),
                number(row.get("images_per_s")),
                percent(row.get("mfu")),
                number(row.get("peak_memory_gib")),
            )
            for row in rows
        ],
    )


def _method_rows(method: MethodName, config: StepBenchConfig, device: torch.device) -> list[dict[str, Any]]:
    result = config.setting.result(method)
    split = training_images(None, result)
    ours: list[OurMethod] = []

    def make() -> OurMethod:
        ours.append(OurMethod(method, config.setting, config.speed, device))
        return ours[0]

    recipes = [METHODS[method].views]
    with open_feeds(split, recipes, result, LoaderConfig(name="synthetic"), device) as (feeds, _):
        prepared = prepare(make, feeds, device, config.warmup)
        batch = next(feeds[recipes[0]])
    parts = _parts(ours[0], batch, device)
    rows: list[dict[str, Any]] = []
    share_s = config.max_s / (len(config.methods) * (len(parts) + 1))
    for name, call in (*parts.items(), (WHOLE, lambda: ours[0].step(batch))):
        times = time_calls_ms(call, device, warmup=config.warmup, repeats=config.repeats, max_s=share_s)
        spread_ms = quantiles(times)
        rows.append(
            {
                "method": method,
                "precision": config.speed.precision,
                "part": name,
                "ms": spread_ms["median"],
                "q20": spread_ms["q20"],
                "q80": spread_ms["q80"],
                "calls": len(times),
                "share": None,
            }
        )
    sum_ms = sum(row["ms"] for row in rows[:-1])
    for row in rows[:-1]:
        row["share"] = row["ms"] / sum_ms
    whole = rows[-1]
    peak, _ = peak_flops_per_s(device, config.speed.precision)
    whole["images_per_s"] = 1000 * result.batch_size / whole["ms"]
    whole["mfu"] = mfu(ours[0].flops_per_image, whole["images_per_s"], peak)
    whole["peak_memory_gib"] = prepared.peak_memory_gib
    return rows


def _parts(ours: OurMethod, batch: CropBatch, device: torch.device) -> dict[str, Callable[[], object]]:
    """The parts of a step as functions without arguments, in the order in which a step runs them."""
    training, result, speed = ours.training, ours.config.result, ours.config.speed
    method = training.method
    assert isinstance(method, MomentumContrast)
    size, seed = result.batch_size, result.seed
    networks: list[Callable[[torch.Tensor], torch.Tensor]] = [method.query_encoder, method.key_encoder]
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

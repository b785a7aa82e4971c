"""What the tests run on the fake GPU: `python -m tests.fake_gpu.program CASE…` prints a line of JSON for each case.

Ranks are forked, so that one start of Python and torch serves all.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import open_source
from leoclr_fast.cli import run_command
from leoclr_fast.config import BackboneConfig, RunConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.gradient_buckets import GradientBuckets
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.method.half_encoder import HalfEncoder
from leoclr_fast.method.momentum_contrast import update_key_encoder
from leoclr_fast.run.telemetry import StepMetrics
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.dali_loader import DaliLoader
from pipelines.factory import make_loader
from pipelines.loader import Loader
from pipelines.order import TrainOrder
from pipelines.views import LEOCLR_VIEWS
from tests.fake_gpu.gpu import counted, free_memory, logged, uses
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.held_port import held_port
from tests.leoclr_fast.rank_program import noise_batches
from tests.leoclr_fast.training.test_training_step import crop_batches, first_images
from tests.pipelines.pictures import encode, picture, write_images

GPU, ALONE = torch.device("cuda", 0), Ranks()
NUM_COUNTED = 2


class Warnings(logging.Handler):
    """What was warned of within `told`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def told() -> Any:
    handler = Warnings()
    logging.getLogger().addHandler(handler)
    try:
        yield handler.lines
    finally:
        logging.getLogger().removeHandler(handler)


def gpu_config(method: str = "leoclr", precision: str = "bf16", graph: str = "auto", **changes: Any) -> RunConfig:
    defaults = {"speed__compile": "off", "result__method__key_batchnorm": "split"}
    return tiny_config(
        method, speed__device="cuda", speed__precision=precision, speed__cuda_graph=graph, **{**defaults, **changes}
    )


def trained(
    config: RunConfig, batches: list[CropBatch] | None = None, ranks: Ranks = ALONE, *, static: bool | None = None
) -> dict[str, Any]:
    """What happens in a step, metrics included, after the first two."""
    batches = crop_batches(config, 2 + NUM_COUNTED, GPU) if batches is None else batches
    device = batches[0].crops.device
    step = TrainingStep(TrainingState.fresh(config, ranks, device), config, device, static=static)
    metrics = StepMetrics(ranks, 0, step.metric_names, loss_is_scaled=config.speed.precision == "fp16")
    with counted() as at_first:
        for batch in batches[:2]:
            metrics.add(step(batch, 0.01))
    with counted() as happened:
        for batch in batches[2:]:
            metrics.add(step(batch, 0.01))
    a_step = {name: value / len(batches[2:]) for name, value in happened.items() if name != "graph_nodes"}
    nodes = {"graph_nodes": happened["graph_nodes"], "illegal_before": at_first["illegal_calls"]}
    return {**a_step, **nodes, "means": step.means}


def captured(method: str, precision: str, *changes: str) -> dict[str, Any]:
    return trained(gpu_config(method, precision, **_parsed(changes)))


def eager(method: str, precision: str, *changes: str) -> dict[str, Any]:
    return trained(gpu_config(method, precision, "off", **_parsed(changes)))


def other_sizes() -> dict[str, Any]:
    """A batch of another size runs eagerly between captured ones."""
    config = gpu_config()
    batches = crop_batches(config, 4, GPU)
    return trained(config, [first_images(batch, 7 + 5 * (n % 2)) for n, batch in enumerate(batches)])


def memory_for_no_graph() -> dict[str, Any]:
    """The memory that a capture needs is not there."""
    real = torch.cuda.graph.__enter__, torch.cuda.graph.__exit__
    limits: list[Any] = []

    def enter(graph: torch.cuda.graph) -> None:
        real[0](graph)
        limits.append(free_memory(0))
        limits[-1].__enter__()

    def leave(graph: torch.cuda.graph, *error: Any) -> None:
        limits[-1].__exit__(None, None, None)
        real[1](graph, *error)

    torch.cuda.graph.__enter__, torch.cuda.graph.__exit__ = enter, leave
    try:
        with told() as lines:
            happened = trained(gpu_config())
        try:
            trained(gpu_config(graph="on"))
        except torch.OutOfMemoryError as error:
            return {**happened, "warnings": lines, "asked_for": str(error)}
        raise AssertionError("the capture that was asked for did not fail")
    finally:
        torch.cuda.graph.__enter__, torch.cuda.graph.__exit__ = real


def in_memory(free_mib: str) -> tuple[str, str]:
    """How two steps of a wider network go in so much memory, and what was said of it."""
    gc.collect()
    torch.cuda.empty_cache()
    size = {"result__backbone__width_multiplier": 1.0, "result__batch_size": 64, "result__method__queue_size": 128}
    config = gpu_config(**size, result__views__image_size=32)
    with free_memory(int(free_mib) << 20), told() as lines:
        try:
            step = TrainingStep(TrainingState.fresh(config, ALONE, GPU), config, GPU)
            for batch in crop_batches(config, 2, GPU):
                step(batch, 0.01)
        except torch.OutOfMemoryError as error:
            return "too small", str(error)
        return step.means.partition(", ")[2], " ".join(lines)


def capture_that_is_refused() -> dict[str, Any]:
    """Something in the step reads a value of the device, which no capture allows."""
    config = gpu_config()
    step = TrainingStep(TrainingState.fresh(config, Ranks(), GPU), config, GPU)
    method = step.training.method
    enqueue = method.enqueue

    def reads(keys: Any) -> None:
        keys[0].sum().item()
        enqueue(keys)

    method.enqueue = reads  # type: ignore[method-assign]
    with told() as lines:
        for batch in crop_batches(config, 2, GPU):
            step(batch, 0.01)
    return {"warnings": lines, "means": step.means}


def launches() -> dict[str, int]:
    """Of what a step does to all the weights of a ResNet-50 at once."""
    query = Encoder(BackboneConfig(), 128).to(GPU).to(memory_format=torch.channels_last)
    key = deepcopy(query).requires_grad_(False)
    rounded = HalfEncoder(key, torch.bfloat16)
    buckets = GradientBuckets(list(query.parameters()), SilentRanks(0, 2))
    for weight in query.parameters():
        weight.grad = torch.empty_like(weight)
    buckets.begin(1)
    actions: dict[str, Callable[[], object]] = {
        "moving average": lambda: update_key_encoder(key, query, 0.999),
        "rounding": rounded.refresh,
        "counters": lambda: torch._foreach_add_([b for b in query.buffers() if not b.is_floating_point()], 1),
        "gradients": buckets.finish,
    }
    done = {}
    for name, action in actions.items():
        with counted() as happened:
            action()
        done[name] = happened["launches"]
    return done


class SilentRanks(Ranks):
    """Sum nothing."""

    def begin_all_reduce_sum(self, buffer: torch.Tensor) -> Callable[[], None]:
        return lambda: None


# ---- what must not go unseen ----------------------------------------------------------------------------------------


def control(name: str) -> dict[str, Any]:
    """One thing that no step may do, without a capture."""
    values = torch.ones(3, device=GPU)
    actions: dict[str, Callable[[], object]] = {
        "nothing": lambda: values + 1,
        "item": values[0].item,
        "nonzero": values.nonzero,
        "pageable": lambda: torch.ones(3).to(GPU, non_blocking=True),
        "to_pageable": lambda: torch.empty(3).copy_(values, non_blocking=True),
        "pinned": lambda: torch.ones(3).pin_memory().to(GPU, non_blocking=True),
        "event": torch.cuda.current_stream().record_event().synchronize,
    }
    torch.ones(3).pin_memory()
    with counted() as happened:
        actions[name]()
    return happened


def control_in_capture(name: str) -> dict[str, Any]:
    """The same in a capture, which CUDA then refuses."""
    values, other = torch.ones(3, device=GPU), torch.cuda.Stream()
    outside = other.record_event()

    def unjoined() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            values.add_(1)

    def joined() -> None:
        unjoined()
        torch.cuda.current_stream().wait_stream(other)

    actions: dict[str, Callable[[], object]] = {
        "nothing": lambda: values + 1,
        "joined": joined,
        "item": values[0].item,
        "nonzero": values.nonzero,
        "event_from_outside": lambda: torch.cuda.current_stream().wait_event(outside),
        "unjoined": unjoined,
        "synchronize": torch.cuda.synchronize,
    }
    refused = ""
    with counted() as happened:
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                actions[name]()
        except RuntimeError as error:
            refused = str(error).splitlines()[0]
    return {**happened, "refused": refused}


# ---- two ranks ------------------------------------------------------------------------------------------------------


def two_ranks(graph: str, *others: str) -> list[dict[str, Any]]:
    """Two ranks' steps. others: batch-norm of the keys and of the queries, the rank whose capture fails, `compiled`."""
    results = []
    with held_port() as port:
        for rank in range(2):
            reader, writer = os.pipe()
            if (process := os.fork()) == 0:
                os.close(reader)
                result = _one_of_two(rank, port, graph, *others)
                os.write(writer, json.dumps(result).encode())
                os._exit(0)
            os.close(writer)
            results.append((process, os.fdopen(reader)))
        return [json.loads(pipe.read()) for _, pipe in results if pipe]


def _one_of_two(
    rank: int, port: int, graph: str, key_batchnorm: str, query_batchnorm: str, failing: str = "", compiled: str = ""
) -> Any:
    """Each weight's gradient is a bucket of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    changes = {"result__method__query_batchnorm": query_batchnorm, "result__method__key_batchnorm": key_batchnorm}
    config = gpu_config("leoclr", "bf16", graph, **changes, speed__compile="on" if compiled else "off")
    with ExitStack() as stack:
        ranks, device = stack.enter_context(process_group("cuda"))
        _agree_over_a_store(port)
        if failing == str(rank):
            torch.cuda.graph.__enter__ = _refuse  # type: ignore[method-assign]
        small = partial(GradientBuckets, bucket_bytes=1)
        stack.enter_context(mock.patch("leoclr_fast.training.step.GradientBuckets", small))
        if compiled:
            from tests.fake_gpu.generated_code import unbuilt_kernels

            stack.enter_context(unbuilt_kernels())
        batches = [replace(b, crops=b.crops.to(device)) for b in noise_batches(config, ranks, 2 + NUM_COUNTED)]
        with told() as lines, logged() as launched:
            happened = trained(config, batches, ranks, static=True if failing in ("0", "1") else None)
        return {**happened, "warnings": lines, "sent_early": _sent_early(launched)}


def _sent_early(launched: list[str]) -> int:
    """How many gradients of all steps are being summed when a convolution is still to come before the optimizer."""
    num_sent = num_waiting = 0
    for line in launched:
        if "ncclAllReduce" in line:
            num_waiting += 1
        elif "cudnnBackendExecute" in line:
            num_sent += num_waiting
            num_waiting = 0
        elif "FusedSgd" in line:
            num_waiting = 0
    return num_sent


def _refuse(_: object) -> None:
    raise RuntimeError("this rank cannot capture")


def _agree_over_a_store(port: int) -> None:
    """What the ranks tell each other while nothing is captured: NCCL's stand-in passes nothing on."""
    store = torch.distributed.distributed_c10d._get_default_store()

    def any_says(ranks: Ranks, answer: bool, _: torch.device) -> bool:
        store.set(f"answer {ranks.rank}", str(int(answer)))
        store.wait(["answer 0", "answer 1"], timedelta(seconds=60))
        return any(store.get(f"answer {rank}") == b"1" for rank in range(2))

    Ranks.any_says = any_says  # type: ignore[method-assign]


# ---- loaders --------------------------------------------------------------------------------------------------------


def loader(name: str, use_device: str = "as it is") -> dict[str, Any]:
    """Two epochs of a loader whose rank has the second GPU. use_device: `never` takes it from the loader's threads.

    nvJPEG and DALI do not run here: torchvision decodes on the CPU in their place, and copies.
    """
    torch.cuda.set_device(1)
    torch.ones(1, device="cuda").sum()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_images(Path(folder) / "images", {f"{n}.jpg": _jpeg(20 + n, 30) for n in range(24)})
        source = Path(folder) / "images"
        if name == "ffcv":
            convert(source, Path(folder) / "ffcv", ConvertOptions(format="ffcv"), workers=1)
            source = Path(folder) / "ffcv"
        split = open_source(source, quietly=True).splits["train"]
        order = TrainOrder(num_images=len(split), batch_size=8, seed=0)
        if use_device == "never":
            stack.enter_context(mock.patch.object(Loader, "use_device"))
        stack.enter_context(mock.patch("pipelines.nvjpeg_loader.decode_jpeg", _decoded_and_copied))
        stack.enter_context(mock.patch.object(DaliLoader, "_built_pipeline", lambda dali, *_, **__: _Pipeline(dali)))
        views, config = ViewConfig(image_size=16), LoaderConfig(name=name, workers=2)
        before = [uses(device) for device in range(2)]
        opened = make_loader(split, LEOCLR_VIEWS, views, config, order, seed=0, device=torch.device("cuda"))
        with opened as loader:
            list(loader.batches(0))  # what is imported and compiled
            with logged() as lines, counted() as happened:
                places = {str(batch.crops.device) for batch in loader.batches(1)}
        used = [uses(device) - count for device, count in enumerate(before)]
        waits = sorted(line for line in lines if line.startswith("SYNC"))
        return {**happened, "places": sorted(places), "used": used, "waits": waits, "steps": order.steps_per_epoch}


def _jpeg(height: int, width: int) -> bytes:
    return encode(Image.fromarray(picture(height, width, "waves")), "JPEG")


def _decoded_and_copied(images: list[Any], device: torch.device) -> list[torch.Tensor]:
    return [image.pin_memory().to(device, non_blocking=True) for image in decode_jpeg(images, ImageReadMode.RGB)]


class _Pipeline:
    """What the DALI loader asks of a pipeline."""

    def __init__(self, loader: Loader) -> None:
        self._device, self._fed = loader.device, deque[list[torch.Tensor]]()

    def feed_input(self, _: str, images: list[Any]) -> None:
        decoded = _decoded_and_copied([torch.from_numpy(image.copy()) for image in images], self._device)
        self._fed.append([image.permute(1, 2, 0) for image in decoded])

    def schedule_run(self) -> None:
        pass

    def share_outputs(self) -> tuple[_Images]:
        return (_Images(self._fed.popleft()),)

    def release_outputs(self) -> None:
        pass


class _Images(list[torch.Tensor]):
    def shape(self) -> list[tuple[int, ...]]:
        return [tuple(image.shape) for image in self]


def generated(what: str, *arguments: str) -> dict[str, Any]:
    """What inductor writes; see `generated_code`."""
    from tests.fake_gpu import generated_code

    found: dict[str, Any] = getattr(generated_code, what)(*arguments)
    return found


def command(*arguments: str) -> dict[str, Any]:
    """A whole command, whose compiled kernels are written and not built; and what happened in each training step."""
    from tests.fake_gpu.generated_code import unbuilt_kernels

    steps: list[dict[str, int]] = []
    take = TrainingStep.__call__

    def counted_step(step: TrainingStep, *batch: Any) -> Any:
        with counted() as happened:
            metrics = take(step, *batch)
        steps.append(happened)
        return metrics

    said = io.StringIO()
    with mock.patch.object(TrainingStep, "__call__", counted_step), unbuilt_kernels(), redirect_stdout(said):
        code = run_command(list(arguments))
    return {"code": code, "steps": steps, "said": said.getvalue()}


# ---- the program ----------------------------------------------------------------------------------------------------


def _parsed(changes: tuple[str, ...]) -> dict[str, Any]:
    return {name: json.loads(value) for name, _, value in (change.partition("=") for change in changes)}


CASES: tuple[Callable[..., Any], ...] = (
    two_ranks, captured, eager, other_sizes, memory_for_no_graph, capture_that_is_refused, control, control_in_capture,
    generated, command, in_memory, launches, loader,
)  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = {case.__name__: case for case in CASES}
    for argument in sorted(sys.argv[1:], key=lambda case: not case.startswith("two_ranks")):  # before CUDA is used here
        name, *arguments = argument.split()
        print(f"{argument}\t{json.dumps(cases[name](*arguments))}", flush=True)
    os._exit(0)  # threads of torch that are left would end the program in the middle of unloading


if __name__ == "__main__":
    main()

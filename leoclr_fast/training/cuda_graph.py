"""A function of tensors that stay where they are, recorded once as a CUDA graph and then replayed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_NUM_WARM_UP_RUNS = 3


class CaptureError(RuntimeError):
    """A function runs, but not while a graph is recorded of it."""


class StaticFunction:
    """Runs a function on buffers of its own, into which the inputs of each call are copied.

    On a GPU the function is captured at the first construction and replayed by every call: one launch, and no Python in
    between. On a CPU every call runs it. What it changes must be tensors that never move.
    """

    def __init__(
        self, function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        """function: tensors -> one tensor, without a wait for the host. inputs: an example, on the host or the device.

        state: every tensor that the function changes. It is run a few times, so that everything lazy is set up and
        every choice of kernel is made, and leaves no trace in them.
        Raises CaptureError, from what failed, if the function has run before and only the capture failed.
        """
        device = state[0].device
        self._function = function
        self._inputs = [torch.empty_like(tensor, device=device) for tensor in inputs]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._copy_in(inputs)
        if device.type != "cuda":
            with unchanged(state):
                function(self._inputs)
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), unchanged(state):
            for _ in range(_NUM_WARM_UP_RUNS):
                function(self._inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Threads of a loader may allocate memory meanwhile, hence thread_local.
        try:
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._output = function(self._inputs)
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors of the graph's memory
            # The end of a capture has failed, too, which says less.
            reason = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            raise CaptureError(str(reason)) from reason

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these inputs have the shapes and dtypes that it was made for."""
        kinds = [(tensor.shape, tensor.dtype) for tensor in inputs]
        return kinds == [(tensor.shape, tensor.dtype) for tensor in self._inputs]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The function's value for these inputs, in new storage. Inputs on the host should be pinned."""
        self._copy_in(inputs)
        if self._graph is None:
            return self._function(self._inputs)
        self._graph.replay()
        return self._output.clone()

    def _copy_in(self, inputs: Sequence[Tensor]) -> None:
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor, non_blocking=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory of the GPU did not suffice; cuDNN then may have found no algorithm whose workspace fits."""
    return isinstance(error, torch.OutOfMemoryError) or "unable to find an engine" in str(error)


@contextmanager
def unchanged(state: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to these tensors in here, afterwards they have their values again, in the same storage."""
    before = [tensor.clone() for tensor in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

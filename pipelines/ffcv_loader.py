"""FFCV's loader on a converted data set: one libjpeg-turbo decode per image, all views cut from it in compiled threads.

The stock `ffcv.loader.Loader` runs the batches; ours are its order, the image field's decoder (`ffcv_decoder`) and, in
place of its page caches, a feeder that draws the boxes of a batch just before FFCV decodes it. Pixels are
Pillow's, bit for bit, as far as both have the same libjpeg-turbo inside.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from io import FileIO
from queue import Empty
from typing import Any, ClassVar, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from dataset_tools.formats.beton import read_beton_head
from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from pipelines.byte_readers import base_of
from pipelines.cores import available_cores
from pipelines.crop_resize import PackedImages, cut_views
from pipelines.decode import Substitutes
from pipelines.loader import DecodedBatch, Loader
from pipelines.views import draw_boxes

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5  # after a thread that may have died
_JOIN_EVERY_S = 0.02
_CLOSE_WITHIN_S = 10.0


class FfcvLoader(Loader):
    """Reads a split of a data set that was converted with ``--format ffcv``, or a subset of one.

    ``config.workers`` threads decode, ``config.prefetch_batches`` batches ahead. One pass at a time: a new one ends the
    one before. Raises ImportError where FFCV is missing, ValueError for another kind of split or a damaged .beton.
    """

    name = "ffcv"
    package = "ffcv"
    installing = "make ffcv"
    auto_places: ClassVar = {"cuda": 3, "cpu": 1}
    drawbacks: ClassVar = {"cuda": "it decodes on the CPU"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base, chosen = _beton_behind(self.split)
        read_beton_head(base.files[0].path)
        _prefer_openmp()
        with _thread_counts_kept():
            decoder = _import_decoder()
            self.num_threads = _settled_threads(self.config.workers)
            self._ffcv = decoder.open_beton(
                str(base.files[0].path),
                decoder.CropDecoder(self.view_config.image_size, self.num_threads),
                batch_size=self.order.max_local_batch_size,
                num_workers=self.num_threads,
                batches_ahead=self.config.prefetch_batches,
            )
        images = self._ffcv.reader.metadata["f0"]
        _check_records(base, images)
        self._path, self._decoder = base.files[0].path, decoder
        self._heights, self._widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        self._offsets = images["data_ptr"].astype(np.int64)
        self._num_bytes = np.array(base.records["num_bytes"], dtype=np.int64)
        self._samples = np.arange(len(base), dtype=np.int64) if chosen is None else chosen
        used = np.unique(self._samples)
        self._state = decoder.DecodeState.allocate(
            self.num_threads, self.order.max_local_batch_size, len(self.views), self.view_config.image_size,
            self._heights[used], self._widths[used], self._num_bytes[used],
        )  # fmt: skip
        self._substitutes = Substitutes(self.split)
        self._hangs = False
        self._pass: _Pass | None = None

    @classmethod
    def obstacle(cls, split: Split, device: torch.device) -> str | None:
        return super().obstacle(split, device) if is_beton(base_of(split)[0]) else "it reads .betons alone"

    @property
    def num_decodes(self) -> int:
        """How many JPEGs FFCV was given to decode so far."""
        return int(self._state.num_decodes.sum())

    def decode_batches(self, epoch: int, start_step: int) -> Generator[DecodedBatch, None, None]:
        current = self._pass = _Pass(self, epoch, start_step)
        try:
            current.start()
            for _ in range(start_step, self.steps_per_epoch):
                yield self._mended(*current.next_batch(), epoch)
        finally:
            current.close()
            self._pass = None

    def is_next_ready(self) -> bool:
        return self._pass is not None and self._pass.has_next

    def _mended(self, batch: DecodedBatch, failed: npt.NDArray[np.bool_], epoch: int) -> DecodedBatch:
        """What TurboJPEG refuses or only warns of is up to Pillow, as in the other loaders. failed: bool [B]."""
        for row in np.flatnonzero(failed).tolist():
            found = self._substitutes.decode(int(batch.indices[row]), batch.unreadable)
            if found is None:
                break  # so many that `Loader` ends the run
            index, image = np.array([found[0]]), torch.tensor(np.asarray(found[1]))
            sizes = np.array([image.shape[0]]), np.array([image.shape[1]])
            boxes = draw_boxes(self.views, self.view_config, *sizes, self.seed, epoch, index)
            packed = PackedImages.side_by_side(image.flatten(), *sizes)
            batch.indices[row], batch.boxes[row] = index[0], boxes[0]
            batch.crops[row] = cut_views(packed, np.zeros(1, dtype=np.int64), boxes, self.view_config.image_size)[0]
        return batch


class _Pass:
    """One run of FFCV's thread through (the rest of) an epoch.

    To FFCV it is a memory manager and its context: it says what a batch is decoded from, just before it is.
    """

    def __init__(self, loader: FfcvLoader, epoch: int, start_step: int) -> None:
        self._loader, self._epoch = loader, epoch
        self._steps = range(start_step, loader.steps_per_epoch)
        self._indices = [loader.order.indices(epoch, step) for step in self._steps]
        if loader._substitutes.unreadable:
            self._indices = [loader._substitutes.replace(indices) for indices in self._indices]
        self._fed = deque[DecodedBatch]()  # what FFCV was given and nobody has taken
        self._num_taken = 0
        self._stopped = False
        self._error: Exception | None = None
        self._iterator: Any = None
        self._file: FileIO | None = None
        self._num_torch_threads = torch.get_num_threads()

    # ---- for the loader ----

    def start(self) -> None:
        """Raises OSError if the file is gone, RuntimeError after a thread has hung: its memory is its own still."""
        loader, ffcv = self._loader, self._loader._ffcv
        if loader._hangs:
            raise RuntimeError("FFCV's thread hangs in an earlier pass; start the program again")
        self._file = FileIO(loader._path)
        loader._state.open()
        samples = loader._samples[np.concatenate([*self._indices, np.empty(0, dtype=np.int64)])]
        if len(samples):
            ffcv.memory_manager, ffcv.traversal_order = self, _GivenOrder(samples)
            ffcv.first_traversal_order = samples  # FFCV takes the length of an epoch from it
            with _thread_counts_kept():
                self._iterator = iter(ffcv)

    @property
    def has_next(self) -> bool:
        """Whether `next_batch` will not wait."""
        return self._iterator is not None and not self._iterator.output_queue.empty()

    def next_batch(self) -> tuple[DecodedBatch, npt.NDArray[np.bool_]]:
        """A batch, and which of its rows FFCV could not decode: bool [B]; nobody else's memory.

        Raises RuntimeError soon after FFCV's thread has died, and when nothing came for ``stall_timeout_s``.
        """
        number = self._num_taken
        self._num_taken += 1
        if not len(self._indices[number]):
            return self._allocate(number), np.empty(0, dtype=np.bool_)
        failed = self._wait()
        if number == 0:
            torch.set_num_threads(self._num_torch_threads)  # FFCV's thread has set its own number, for all to come
        return self._fed.popleft(), failed

    def close(self) -> None:
        """Ends FFCV's thread after the batch it is working on, and waits for that; one that hangs is left behind, with
        its memory and its file.
        """
        self._stopped = True
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()
            patience = time.monotonic() + _CLOSE_WITHIN_S
            while iterator.is_alive():  # it may be waiting for room in its queue, even to say that it has ended
                with suppress(Empty):
                    iterator.output_queue.get_nowait()
                iterator.join(_JOIN_EVERY_S)
                if time.monotonic() > patience:
                    self._file = None
                    self._loader._hangs = True
                    return
            self._loader._ffcv.memory_manager = None
        if self._file is not None:
            self._loader._state.close()
            self._file.close()
            self._file = None

    def _wait(self) -> npt.NDArray[np.bool_]:
        """What FFCV's thread says of the next batch: which rows failed."""
        began, limit_s = time.monotonic(), self._loader.config.stall_timeout_s
        while True:
            alive = self._iterator.is_alive()
            try:
                item = self._iterator.output_queue.get(timeout=_LOOK_EVERY_S if alive else 0.01)
            except Empty:
                if alive and (waited := time.monotonic() - began) > limit_s:
                    raise RuntimeError(
                        f"FFCV's thread has not answered for {waited:.0f} s while decoding step "
                        f"{self._steps[self._num_taken - 1]}; look at the disk and at the machine's load, or allow "
                        "more by stall_timeout_s"
                    ) from None
                if alive:
                    continue
                item = None
            if item is None:
                break
            _, (failed,) = item
            return failed
        if self._error is not None:
            raise RuntimeError(f"FFCV's next batch cannot be prepared: {self._error}") from self._error
        raise RuntimeError("FFCV's thread has died in the middle of the epoch; stderr has its traceback")

    # ---- for FFCV, in its thread ----

    @property
    def state(self) -> tuple[npt.NDArray[Any], ...]:
        return self._loader._state.arrays

    def schedule_epoch(self, batches: object) -> _Pass:
        return self

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True

    def start_batch(self, number: int) -> None:
        if self._stopped:
            raise StopIteration  # FFCV takes it for the end of the epoch
        try:
            self._feed(number)
        except Exception as error:
            self._error = error
            raise StopIteration from error

    def _feed(self, number: int) -> None:
        """Tell the decoder where everything is, and the system what will be read next."""
        loader = self._loader
        assert self._file is not None
        state, descriptor = loader._state, self._file.fileno()
        batch = self._allocate(number)
        samples = loader._samples[batch.indices]
        state.num_bytes[: len(samples)] = loader._num_bytes[samples]
        state.boxes[: len(samples)] = batch.boxes
        state.control[loader._decoder.DESCRIPTOR] = descriptor
        state.control[loader._decoder.CROPS_ADDRESS] = batch.crops.data_ptr()
        self._fed.append(batch)
        for indices in self._indices[number + 1 : number + 2]:
            ahead = loader._samples[indices]
            for offset, size in zip(loader._offsets[ahead].tolist(), loader._num_bytes[ahead].tolist(), strict=True):
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _allocate(self, number: int) -> DecodedBatch:
        """A batch whose pixels are still to come."""
        loader = self._loader
        indices = self._indices[number].copy()
        samples = loader._samples[indices]
        heights, widths = loader._heights[samples], loader._widths[samples]
        boxes = draw_boxes(loader.views, loader.view_config, heights, widths, loader.seed, self._epoch, indices)
        size, on_gpu = loader.view_config.image_size, loader.device.type == "cuda"
        crops = torch.empty(len(indices), len(loader.views), size, size, 3, dtype=torch.uint8, pin_memory=on_gpu)
        return DecodedBatch(crops, indices, boxes)


class _GivenOrder:
    """FFCV's traversal order: samples of the .beton, int64 [·]."""

    def __init__(self, samples: npt.NDArray[np.int64]) -> None:
        self._samples = samples

    def sample_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return self._samples


def _beton_behind(split: Split) -> tuple[ConvertedSplit, npt.NDArray[np.int64] | None]:
    """The converted split that ``split`` is, or was taken from, and which of its samples; None: all of them."""
    base, chosen = base_of(split)
    if is_beton(base):
        return base, chosen
    what = f"tars ({base.files[0].path.name}, …)" if isinstance(base, ConvertedSplit) else type(base).__name__
    raise ValueError(
        f"the ffcv loader reads .beton files alone, but {split.name!r} is made of {what}; convert the data first "
        "(python -m dataset_tools convert SOURCE DEST --format ffcv) and give DEST, or take --loader torchvision"
    )


def is_beton(split: Split) -> TypeGuard[ConvertedSplit]:
    """Whether a split, and not one that it was taken from, is a .beton."""
    return isinstance(split, ConvertedSplit) and split.files[0].path.suffix == ".beton"


def _import_decoder() -> Any:
    """`ffcv_decoder`. Raises ImportError that says what is missing and what to do."""
    try:
        from pipelines import ffcv_decoder
    except ImportError as error:
        raise ImportError(
            f"the ffcv loader needs FFCV, which cannot be imported ({error}). It is built from source: apt-get install "
            "libopencv-dev libturbojpeg0-dev pkg-config g++, then make ffcv (or pip install 'leoclr-fast[ffcv]'). "
            "The torchvision loader reads the same data without it."
        ) from error
    return ffcv_decoder


def _check_records(base: ConvertedSplit, images: npt.NDArray[np.void]) -> None:
    """Raises ValueError if the .beton does not hold what the records say: memory is sized by them."""
    columns = {"mode": "encoding", "width": "width", "height": "height", "data_ptr": "offset"}
    for field, column in columns.items():
        if not np.array_equal(images[field], base.records[column]):
            raise ValueError(
                f"{base.files[0].path} does not fit {base.records.path}: {column} differs. Copy or convert the data "
                "set again."
            )


def _settled_threads(workers: int | None) -> int:
    """How many threads will decode."""
    import numba

    wanted = max(1, available_cores() if workers is None else workers)
    possible = int(numba.config.NUMBA_NUM_THREADS)
    if wanted > 1 and not _numba_s_threads_can_be_shared():
        log.warning(
            "ffcv decodes in one thread: numba finds neither OpenMP (libgomp1) nor TBB, and its own threads abort"
        )
        return 1
    if wanted > possible:
        log.info("ffcv decodes in %d threads and not %d: NUMBA_NUM_THREADS allows no more", possible, wanted)
    return min(wanted, possible)


def _prefer_openmp() -> None:
    """TBB, numba's first choice, complains at every fork, and torch's data loaders fork."""
    import numba

    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # heeded until numba's first threads start


def _numba_s_threads_can_be_shared() -> bool:
    """With its "workqueue", numba ends the process when two Python threads decode at once."""
    for pool in ("omppool", "tbbpool"):
        with suppress(ImportError):
            import_module(f"numba.np.ufunc.{pool}")
            return True
    return False


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """FFCV sets the numbers of threads of torch and numba, even as it is imported."""
    import numba

    num_torch_threads, num_numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_torch_threads)
        numba.set_num_threads(num_numba_threads)

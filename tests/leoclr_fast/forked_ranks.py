"""gloo ranks that share one import of torch: forked by a process that has computed nothing yet."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pipelines import augment_numba, crop_resize_numba

LIMIT_S = 270


def on_ranks(module: str, *arguments: object, log: Path) -> None:
    """Run `python -m MODULE ARGUMENTS`, which forks its ranks. Raises AssertionError with its log if it fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT_S))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()


def load_kernels() -> None:
    """numba's, once for all that are forked then: a second in each of them."""
    augment_numba.compiled_kernel()
    crop_resize_numba.compiled_kernel()


def fork_ranks(num_ranks: int, main: Callable[[], None]) -> None:
    """In that process: run `main` on every rank, with the variables that torchrun sets; exits with what they exit."""

    def rank_main(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ["LOCAL_WORLD_SIZE"] = str(num_ranks)
        main()

    load_kernels()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))

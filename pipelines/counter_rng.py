"""Counter-based random numbers: every draw of the data layer is a pure function of its coordinates.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a block cipher
that turns a 128-bit counter and a 64-bit key into four 32-bit words. The key is the seed; the counter is
(index, epoch, stream, block). No state is kept, so the number of workers, ranks and loader backends, and the
step a run was resumed at, cannot change a single draw.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_NUM_ROUNDS = 10
_ROWS_IN_CACHE = 1 << 13

# Streams keep the purposes apart: two streams never share a draw.
ORDER_STREAM = 0
KEY_SHUFFLE_STREAM = 1
_FIRST_VIEW_STREAM = 16


def crop_stream(view: int) -> int:
    """Stream of the crop boxes of view number ``view``."""
    return _FIRST_VIEW_STREAM + 2 * view


def photometry_stream(view: int) -> int:
    """Stream of the photometric parameters of view number ``view``."""
    return _FIRST_VIEW_STREAM + 2 * view + 1


def philox4x32(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Ten rounds of Philox4x32.

    counter: uint64 [..., 4], each entry a 32-bit word. key: two 32-bit words.
    Returns uint64 [..., 4], each entry a 32-bit word. Checked against the Random123 known-answer vectors.
    """
    c0, c1, c2, c3 = (counter[..., lane] for lane in range(4))
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT_32) ^ c1 ^ np.uint64(k0),
            product1 & _LOW_32,
            (product0 >> _SHIFT_32) ^ c3 ^ np.uint64(k1),
            product0 & _LOW_32,
        )
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)


def random_words(
    seed: int, epoch: int, index: npt.NDArray[np.int64], stream: int, num_words: int
) -> npt.NDArray[np.uint64]:
    """32-bit random words at (seed, epoch, index, stream).

    index: int64 [B], each 0 <= index < 2**32. Returns uint64 [B, num_words], each below 2**32.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is not allowed: give an integer from 0 to 2**64 - 1")
    words = np.empty((len(index), num_words), dtype=np.uint64)
    for start in range(0, len(index), _ROWS_IN_CACHE):
        rows = index[start : start + _ROWS_IN_CACHE]
        counter = np.empty((len(rows), -(-num_words // 4), 4), dtype=np.uint64)
        counter[..., 0] = np.asarray(rows, dtype=np.uint64)[:, None]
        counter[..., 1] = epoch
        counter[..., 2] = stream
        counter[..., 3] = np.arange(counter.shape[1], dtype=np.uint64)
        drawn = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        words[start : start + len(rows)] = drawn.reshape(len(rows), -1)[:, :num_words]
    return words


def uniform(
    seed: int, epoch: int, index: npt.NDArray[np.int64], stream: int, num_draws: int
) -> npt.NDArray[np.float64]:
    """Uniform draws in [0, 1) with 32 random bits at (seed, epoch, index, stream).

    index: int64 [B]. Returns float64 [B, num_draws]; draw d of an index does not depend on num_draws or on the
    other indices.
    """
    return random_words(seed, epoch, index, stream, num_draws).astype(np.float64) * 2.0**-32


def permutation(seed: int, epoch: int, length: int, stream: int) -> npt.NDArray[np.int64]:
    """A random permutation of range(length) at (seed, epoch, stream): int64 [length].

    The indices sorted by 64 random bits each, ties by index: the same for ever, on every numpy.
    """
    words = random_words(seed, epoch, np.arange(length, dtype=np.int64), stream, 2)
    return np.argsort((words[:, 0] << _SHIFT_32) | words[:, 1], kind="stable")

"""The order in which the windows of a source come within an epoch: a pseudo-random bijection in closed form
(order version 1).

A source is read in chunks of neighbouring windows (2^18 tokens, about half a megabyte), since single reads of
8 KB at random places defeat the disk's read-ahead and object stores. The chunks of the whole source are
permuted; 64 of them are open at a time (a group, 2^24 tokens), and the windows of a group are permuted among
each other. So the order is random at both scales, and whoever reads it in turn needs 64 chunks at a time,
which it does not come back to in that epoch.

Both permutations are Feistel networks on Z_a x Z_b with a * b just above the size, and cycle walking: a
bijection on any size, with no table. Positions that would fall beyond the source's last window (its last
chunk is a part of one) are walked on likewise.

The order is a function of (seed, source name, epoch), the number of windows and the sequence length alone. It
must never change once runs exist, nor may the assignment of samples to sources (`data_pipeline.assignment`):
another order needs a new version, and the ledger records the version of each segment.
"""

from __future__ import annotations

import numpy as np
import xxhash

ORDER_VERSION = 1

_CHUNK_TOKENS = 2**18
_GROUP_CHUNKS = 64
_ROUNDS = 6

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFT, _CHUNKS, _WITHIN = np.uint64(1), np.uint64(2), np.uint64(3)


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def source_key(seed: int, name: str) -> int:
    """The 64 bits from which everything random about a source is drawn."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{name}".encode())


def _epoch_key(key: np.ndarray, purpose: np.uint64, epoch: np.ndarray) -> np.ndarray:
    return _mix(_mix(key + purpose * _GOLDEN) + (epoch + np.uint64(1)) * _GOLDEN)


def permute(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The image of `x` in [0, size) under the permutation of [0, size) that `key` selects; all uint64[n]."""
    a = np.maximum(np.sqrt(size.astype(np.float64)).astype(np.uint64), np.uint64(1))
    b = (size + a - np.uint64(1)) // a
    result = x.copy()
    walking = np.arange(len(x))
    with np.errstate(over="ignore"):
        while len(walking):
            result[walking] = _feistel(result[walking], a[walking], b[walking], key[walking])
            walking = walking[result[walking] >= size[walking]]
    return result


def _feistel(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = x // b, x % b
    for turn in range(_ROUNDS):
        round_key = _mix(key + np.uint64(turn) * _GOLDEN)
        if turn % 2:
            right = (right + _mix(round_key ^ left) % b) % b
        else:
            left = (left + _mix(round_key ^ right) % a) % a
    return left * b + right


def shifts(key: int | np.ndarray, epoch: int | np.ndarray, sequence_length: int) -> np.ndarray:
    """int64: how far the windows of an epoch are shifted along the source, in [0, sequence_length)."""
    keys, epochs = np.atleast_1d(np.asarray(key, np.uint64)), np.atleast_1d(np.asarray(epoch, np.uint64))
    with np.errstate(over="ignore"):
        return (_epoch_key(keys, _SHIFT, epochs) % np.uint64(sequence_length)).astype(np.int64)


def windows(
    key: int | np.ndarray,
    epoch: int | np.ndarray,
    position: np.ndarray,
    count: int | np.ndarray,
    sequence_length: int,
) -> np.ndarray:
    """int64[n]: the window that comes at each `position` of `epoch`.

    Args:
        key: source_key of the source, or one for each position.
        epoch, position: int[n], position in [0, count).
        count: the number of windows of the source (W), or one for each position.
    """
    p = np.array(position, np.uint64, ndmin=1)
    keys = np.broadcast_to(np.asarray(key, np.uint64), p.shape)
    epochs = np.broadcast_to(np.asarray(epoch, np.uint64), p.shape)
    counts = np.broadcast_to(np.asarray(count, np.uint64), p.shape)
    with np.errstate(over="ignore"):
        chunk_keys, within_keys = _epoch_key(keys, _CHUNKS, epochs), _epoch_key(keys, _WITHIN, epochs)
        walking = np.arange(len(p))
        while len(walking):
            p[walking] = _place(p[walking], counts[walking], chunk_keys[walking], within_keys[walking], sequence_length)
            walking = walking[p[walking] >= counts[walking]]
    return p.astype(np.int64)


def _place(
    p: np.ndarray, count: np.ndarray, chunk_key: np.ndarray, within_key: np.ndarray, sequence_length: int
) -> np.ndarray:
    """One step of the walk: a bijection on [0, `count` rounded up to whole chunks)."""
    chunk = np.minimum(np.uint64(max(1, _CHUNK_TOKENS // sequence_length)), count)
    chunks = (count + chunk - np.uint64(1)) // chunk
    group = p // (chunk * np.uint64(_GROUP_CHUNKS))
    first = group * np.uint64(_GROUP_CHUNKS)
    size = np.minimum(chunks - first, np.uint64(_GROUP_CHUNKS)) * chunk
    inside = permute(p - first * chunk, size, _mix(within_key + group * _GOLDEN))
    return permute(first + inside // chunk, chunks, chunk_key) * chunk + inside % chunk

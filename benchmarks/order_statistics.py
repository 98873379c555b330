"""How random the order of a source's windows is, and how local: figures of one epoch, beside those of a permutation
drawn uniformly (numpy's), which is as random as can be and reads every window from somewhere else.

    python benchmarks/order_statistics.py                    a source of 2B tokens, sequences of 4096
    python benchmarks/order_statistics.py --windows 100000 --sequence-length 2048

Prints one JSON line; a figure of ours is the median over `--keys` seeds.

serial_correlation     between the places of windows that come one after the other; 0 when there is none
step                   mean distance between them, as part of the source; 1/3 when they are independent
epoch_correlation      between the order of an epoch and that of the next
place_time_chi2        of the table (tenth of the epoch) x (tenth of the source), by its 81 degrees of freedom: 1
                       when where a window lies says nothing about when it comes. Above 1, chunks come together: a tenth
                       has so many fewer independent draws
prefix_ks              largest gap between the part of the source that lies before a place, and of the first tenth of
                       the epoch's windows
next_on_disk           part of the reads that begin where the one before ended
chunk_open             part of the reads in half a megabyte that one of the 4096 reads before was in: what read-ahead
                       and caches live on
chunks_per_batch       different half megabytes that 256 neighbouring samples come from
megabytes_per_epoch    read by 1 MiB blocks with a cache of 256 of them, over the size of the source
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
from arguments import positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline import order  # noqa: E402

CHUNK_TOKENS, OPEN_READS, BATCH, BLOCK_BYTES, CACHED = 2**18, 4096, 256, 1 << 20, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=positive, default=500_000)
    parser.add_argument("--sequence-length", type=positive, default=4096)
    parser.add_argument("--keys", type=positive, default=5)
    arguments = parser.parse_args()
    count, length = arguments.windows, arguments.sequence_length
    mine, uniform = [], []
    for seed in range(arguments.keys):
        key = order.source_key(seed, "web")
        mine.append(figures(*(order.windows(key, epoch, np.arange(count), count, length) for epoch in (0, 1)), length))
        random = np.random.default_rng(seed)
        uniform.append(figures(random.permutation(count), random.permutation(count), length))
    result: dict[str, object] = {"benchmark": "order_statistics", "windows": count, "sequence_length": length}
    for name in mine[0]:
        result[name] = round(statistics.median(run[name] for run in mine), 4)
        result["uniform_" + name] = round(statistics.median(run[name] for run in uniform), 4)
    print(json.dumps(result))


def figures(windows: np.ndarray, following: np.ndarray, length: int) -> dict[str, float]:
    """The statistics of one epoch's order; `following` is the order of the next."""
    count = len(windows)
    chunks = windows // max(1, CHUNK_TOKENS // length)
    tenths = np.histogram2d(np.arange(count), windows, bins=10, range=[[0, count], [0, count]])[0]
    expected = count / 100
    prefix = np.sort(windows[: count // 10])
    return {
        "serial_correlation": float(np.corrcoef(windows[:-1], windows[1:])[0, 1]),
        "step": float(np.abs(np.diff(windows)).mean() / count),
        "epoch_correlation": float(np.corrcoef(windows, following)[0, 1]),
        "place_time_chi2": float(((tenths - expected) ** 2 / expected).sum() / 81),
        "prefix_ks": float(np.abs(prefix / count - np.arange(len(prefix)) / len(prefix)).max()),
        "next_on_disk": float((np.diff(windows) == 1).mean()),
        "chunk_open": _open_part(chunks),
        "chunks_per_batch": statistics.mean(
            len(np.unique(chunks[i : i + BATCH])) for i in range(0, count - BATCH, 97 * BATCH)
        ),
        "megabytes_per_epoch": _fetched(windows, length) * BLOCK_BYTES / (count * length * 2),
    }


def _open_part(chunks: np.ndarray) -> float:
    """The part of the reads whose chunk was read within the last OPEN_READS."""
    by_chunk = np.argsort(chunks, kind="stable")
    same = np.diff(chunks[by_chunk]) == 0
    return float(((np.diff(by_chunk) <= OPEN_READS) & same).sum() / len(chunks))


def _fetched(windows: np.ndarray, length: int) -> int:
    """How many blocks are fetched for a part of the epoch by whoever keeps the last CACHED, for the whole of it."""
    part, kept, fetched = windows[: min(len(windows), 100_000)], OrderedDict(), 0
    for first in (part * length * 2).tolist():
        for block in range(first // BLOCK_BYTES, (first + length * 2) // BLOCK_BYTES + 1):
            if block in kept:
                kept.move_to_end(block)
                continue
            kept[block] = None
            fetched += 1
            if len(kept) > CACHED:
                kept.popitem(last=False)
    return round(fetched * len(windows) / len(part))


if __name__ == "__main__":
    main()

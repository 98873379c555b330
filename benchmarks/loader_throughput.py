"""Tokens/s that the loader delivers, against megatron-core's GPTDataset on the same files, one process each, in turns.

    python benchmarks/loader_throughput.py                     2 GB of tokens, sequences of 4096
    python benchmarks/loader_throughput.py --gigabytes 4 --rounds 5

``warm``: the files are in the page cache. ``cold``: they were dropped from it just before, and no more is read than
they hold, so that every block comes from the disk once or more, as from a corpus larger than memory. Each reads in its
own random order. GPTDataset's figure is that of `__getitem__` (tokens, labels, masks); ``*_ratio_raw`` compares with
the part of it that reads tokens, without the tensors. ``ranks_fed``: how many H100 (24,000 tokens/s each, the 8B model
at 40% MFU) one process keeps busy. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from arguments import positive

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
SEQUENCE, MICRO_BATCH, GLOBAL_BATCH = 4096, 4, 256
H100_TOKENS = 24_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, at most")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve, arguments.seconds)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        make(Path(folder), int(arguments.gigabytes * 5e8))
        sides = {side: _start(side, folder, arguments.seconds) for side in ("ours", "theirs", "raw")}
        rates: dict[str, list[float]] = {f"{state}_{side}": [] for state in ("cold", "warm") for side in sides}
        for _ in range(arguments.rounds):
            for state in ("cold", "warm"):
                for side, process in sides.items():
                    process.stdin.write("drop\n")  # its mappings; the last of them then drops the files themselves
                    process.stdin.flush()
                    process.stdout.readline()
                    touch(Path(folder), state)
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
                    if not answer:
                        raise SystemExit(f"{side} ended")
                    rates[f"{state}_{side}"].append(float(answer))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    result: dict[str, object] = {"benchmark": "loader_throughput", "gigabytes": arguments.gigabytes}
    for state in ("warm", "cold"):
        mine = rates[f"{state}_ours"]
        result[f"{state}_tokens_per_second"] = round(statistics.median(mine))
        result[f"{state}_megatron_tokens_per_second"] = round(statistics.median(rates[f"{state}_theirs"]))
        for name, side in (("ratio", "theirs"), ("ratio_raw", "raw")):
            ratios = [a / b for a, b in zip(mine, rates[f"{state}_{side}"], strict=True)]
            result[f"{state}_{name}"] = round(statistics.median(ratios), 2)
        result[f"{state}_ranks_fed"] = round(statistics.median(mine) / H100_TOKENS)
    print(json.dumps(result))


def _start(side: str, folder: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, __file__, "--seconds", str(seconds), "--serve", side, folder]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def make(folder: Path, tokens: int) -> None:
    """One corpus of random tokens in documents of 1050 on average, and the mixture that reads it."""
    from megatron_data import write_index

    random = np.random.default_rng(0)
    lengths = random.integers(100, 2000, tokens // 1050)
    write_index(folder / "all", lengths)
    total = int(lengths.sum())
    with open(folder / "all.bin", "wb") as file:
        for start in range(0, total, 1 << 24):
            file.write(random.integers(3, 32000, min(1 << 24, total - start), dtype=np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())
    (folder / "mixture.yaml").write_text(
        f"sequence_length: {SEQUENCE}\nseed: 1\nsources: {{all: {{paths: [all.bin]}}}}\n"
        f"phases: [{{name: all, tokens: {total // SEQUENCE * SEQUENCE - SEQUENCE}, weights: {{all: 1}}}}]\n"
    )


def touch(folder: Path, state: str) -> None:
    """Drop the tokens from the page cache, or read them into it."""
    with open(folder / "all.bin", "rb") as file:
        if state == "cold":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


def serve(side: str, folder: str, seconds: float) -> None:
    """Measure at each ``go``; leave the mapping at each ``drop``, since mapped blocks stay in the page cache."""
    read = None
    for line in sys.stdin:
        if line.strip() == "drop":
            read = None
            print("dropped", flush=True)
            continue
        read = ours(folder) if side == "ours" else theirs(folder, side == "raw")
        next(read)  # opened
        begun, tokens = time.perf_counter(), 0
        for count in read:
            tokens += count
            if time.perf_counter() - begun > seconds:
                break
        rate = tokens / (time.perf_counter() - begun)
        read.close()
        read = None
        print(rate, flush=True)


def ours(folder: str):
    from data_pipeline.ledger import Ledger
    from data_pipeline.loader import Loader
    from data_pipeline.mixture import load_mixture
    from data_pipeline.sources import open_sources
    from data_pipeline.stream import SampleStream

    mixture = load_mixture(Path(folder) / "mixture.yaml")
    sources = open_sources(mixture, vocab_size=32000)
    stream = SampleStream(Ledger.start(mixture, sources), sources)
    yield 0
    with Loader(stream, 0, GLOBAL_BATCH, MICRO_BATCH) as loader:
        for batch in loader:
            yield batch.shape[0] * SEQUENCE


def theirs(folder: str, raw: bool):
    import torch
    from megatron_data import gpt_dataset

    torch.set_num_threads(1)
    data = gpt_dataset(f"{folder}/all", None, SEQUENCE, f"{folder}/cache")
    yield 0
    for index in range(len(data)):
        if raw:
            data._query_document_sample_shuffle_indices(index)
        else:
            data[index]
        yield SEQUENCE


if __name__ == "__main__":
    main()

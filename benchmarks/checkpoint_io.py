"""What a checkpoint costs: saving against writing the same bytes, loading against reading them, and how long training
stands still.

    python benchmarks/checkpoint_io.py --folder /scratch --rounds 7

The 60M preset in fp32, 0.7 GB, into a temporary folder; where none is named, here.

One process, one rank. All kinds take turns, files are new each time and flushed to the disk; before a read they are
dropped from the page cache. Prints one JSON line; the ratios are medians over the rounds of neighbouring measurements:

    save     bytes/s of a synchronous save over those of a plain write with fsync (aim: at least 0.7)
    load     bytes/s of a load into the model over those of a plain read (of the bytes that it reads)
    check    bytes/s of checking the hashes over those of a plain read
    hashing  the part of the processor time of a save that goes into hashes
    stall    time that an asynchronous save keeps the loop from its next step, over the time of a synchronous one
             (aim: at most 0.15)
    lost     all that it costs the training until it is on disk, over the time of a synchronous one: on a machine whose
             processors are all busy with training, the writer's own work is added to the stall; where one is idle, or
             training is on a GPU, it is not
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from arguments import positive

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BLOCK = 1 << 24
BATCH, SEQUENCE = 1, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to be measured")
    parser.add_argument("--rounds", type=positive, default=5)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_io.", dir=arguments.folder))
    try:
        print(json.dumps({"benchmark": "checkpoint_io", **measure(folder, arguments.rounds)}))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, rounds: int) -> dict:
    from moe_train.checkpoint.load import load_checkpoint, what_is_wrong

    chunks, optimizer, topology, step = build()
    step()
    synchronous = saver(folder, False, chunks, optimizer, topology)
    background = saver(folder, True, chunks, optimizer, topology)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("write", "save", "read", "load", "check", "hash", "stall", "step", "lost")
    }
    content: memoryview | None = None
    for number in range(rounds + 1):
        if number % 2:  # what comes second finds a disk that is still busy
            clock(seconds["write"], lambda: write(folder / "raw", content))
        path = clock(seconds["save"], lambda: save(synchronous, folder, 2 * number + 1))
        size = sum(file.stat().st_size for file in path.iterdir())
        content = content or memoryview(bytearray(os.urandom(BLOCK) * (1 + size // BLOCK)))[:size]
        if number % 2 == 0:
            clock(seconds["write"], lambda: write(folder / "raw", content))
        seconds["hash"].append(hash_seconds(size))
        drop(folder / "raw")
        clock(seconds["read"], lambda: read(folder / "raw", content))
        (folder / "raw").unlink()
        for name, call in (
            ("load", lambda: load_checkpoint(path, chunks, optimizer, topology)),
            ("check", lambda: what_is_wrong(path, topology)),
        ):
            for file in path.iterdir():
                drop(file)
            clock(seconds[name], call)
        clock(seconds["step"], step)
        began = time.perf_counter()
        clock(seconds["stall"], lambda: background.save(2 * number + 2, STATE))
        steps = 0
        while background.busy:
            step()
            steps += 1
        seconds["lost"].append(time.perf_counter() - began - steps * seconds["step"][-1])
        background.wait()
        shutil.rmtree(folder / "checkpoints")
    for values in seconds.values():
        del values[0]  # first-time costs: fresh memory, imports
    return {
        "bytes": size,
        "rounds": rounds,
        "write_gb_per_second": round(size / statistics.median(seconds["write"]) / 1e9, 2),
        "read_gb_per_second": round(size / statistics.median(seconds["read"]) / 1e9, 2),
        "save": ratio(seconds["write"], seconds["save"]),
        "load": ratio(seconds["read"], seconds["load"]),
        "check": ratio(seconds["read"], seconds["check"]),
        "hashing": ratio(seconds["hash"], seconds["save"]),
        "stall": ratio(seconds["stall"], seconds["save"]),
        "lost": ratio(seconds["lost"], seconds["save"]),
    }


STATE = {"step": 0, "samples": 0, "tokens": 0}


def build():
    """(chunks, optimizer, topology, a function that takes one training step) of the 60M preset on one
    rank."""
    import torch

    from moe_train.config import OptimizerConfig, load_run
    from parallel import engine
    from parallel.layout import Layout

    topology = engine.start(Layout(1, 1, 1, None, 1, 1), seed=1)
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions
    from moe_train.training.optimizer import Optimizer, wrap_data_parallel
    from moe_train.training.step import Stepper

    run = load_run(
        ROOT / "configs" / "run" / "demo.yaml",
        [f"model={ROOT / 'configs' / 'model' / 'bench_60m.yaml'}"],
        with_mixture=False,
    )
    chunks = build_model(run.model, topology, ModelOptions())
    wrapped = wrap_data_parallel(chunks, overlap=False)
    optimizer = Optimizer(wrapped, OptimizerConfig(), bf16=False)
    stepper = Stepper(wrapped, topology, SEQUENCE, BATCH)
    ids = torch.randint(0, run.model.vocab_size, (BATCH, SEQUENCE + 1))

    def step() -> None:
        optimizer.zero_grad()
        stepper.train([ids])
        optimizer.update(1e-4, optimizer.gradient_norm())

    return chunks, optimizer, topology, step


def saver(folder: Path, background: bool, chunks, optimizer, topology):
    from moe_train.checkpoint.config import CheckpointConfig
    from moe_train.checkpoint.save import Checkpointer

    config = CheckpointConfig(**{"async": background}, keep_last=1000)
    return Checkpointer(folder / "checkpoints", config, chunks, optimizer, topology)


def save(checkpointer, folder: Path, number: int) -> Path:
    checkpointer.save(number, STATE)
    return folder / "checkpoints" / f"iter_{number:07d}"


def write(path: Path, content: memoryview) -> None:
    """So many bytes, from memory, in large blocks, to the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        while content:
            content = content[os.write(file, content[:BLOCK]) :]
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path, into: memoryview) -> None:
    """The file into memory that is there already, as that of a model is."""
    with open(path, "rb", buffering=0) as file:
        while into and (count := file.readinto(into[:BLOCK])):
            into = into[count:]


def hash_seconds(size: int) -> float:
    """What it takes to hash so many bytes that lie in memory."""
    import xxhash

    digest, block, began = xxhash.xxh3_128(), bytes(BLOCK), time.perf_counter()
    for _ in range(size // BLOCK):
        digest.update(block)
    return time.perf_counter() - began


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def clock(into: list[float], call):
    began = time.perf_counter()
    result = call()
    into.append(time.perf_counter() - began)
    return result


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(numerator, denominator)), 3)


if __name__ == "__main__":
    main()

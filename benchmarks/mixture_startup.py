"""From the mixture file to the first batch at 305 million samples (1.25T tokens at 4096): time and peak memory, with 6
and with 500 sources, against the index build of megatron-core's GPTDataset and BlendedDataset.

    python benchmarks/mixture_startup.py                  theirs on 1/100 of the samples, times 100
    python benchmarks/mixture_startup.py --part 10        theirs on 1/10 (more memory and time)

Ours runs whole, each in a process of its own: read the YAML, open the shards (files of the full size, without blocks on
disk), make the ledger, locate and read 16 sequences. Theirs builds its indices over documents of about 1000 tokens, for
the same weights and one epoch; its work grows at least in proportion to the samples, so that multiplying is in its
favour (shuffles of small arrays stay in the processor's cache). Imports count on neither side. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import positive

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
SAMPLES, SEQUENCE, DOCUMENT, BATCH = 305_000_000, 4096, 1000, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=positive, default=100, help="theirs is measured on 1/PART of the samples")
    parser.add_argument("--run", nargs=3, metavar=("SIDE", "SOURCES", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        side, sources, folder = arguments.run
        result = ours(Path(folder)) if side == "ours" else theirs(int(sources), Path(folder), arguments.part)
        print(json.dumps(result | {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}))
        return
    figures: dict[str, list[float]] = {
        key: [] for key in ("seconds", "megatron_seconds", "speedup", "peak_mb", "megatron_peak_mb")
    }
    for sources in (6, 500):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), sources)
            mine = min(
                (_child("ours", sources, folder, arguments.part) for _ in range(3)), key=lambda run: run["seconds"]
            )
        with tempfile.TemporaryDirectory() as folder:
            other = _child("theirs", sources, folder, arguments.part)
        figures["seconds"].append(round(mine["seconds"], 4))
        figures["megatron_seconds"].append(round(other["seconds"] * arguments.part, 1))
        figures["speedup"].append(round(other["seconds"] * arguments.part / mine["seconds"]))
        figures["peak_mb"].append(mine["peak_mb"])
        figures["megatron_peak_mb"].append(other["peak_mb"])
    print(json.dumps({
        "benchmark": "mixture_startup", "samples": SAMPLES, "sources": [6, 500],
        **figures, "peak_mb": max(figures["peak_mb"]),
        "megatron_measured_on_samples": SAMPLES // arguments.part, "megatron_extrapolated_times": arguments.part,
    }))  # fmt: skip


def _child(side: str, sources: int, folder: str, part: int) -> dict:
    command = [sys.executable, __file__, "--part", str(part), "--run", side, str(sources), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def shares(sources: int) -> list[float]:
    """Weights from heavy to light, as mixtures have them."""
    raw = [1 / (number + 1) for number in range(sources)]
    return [weight / sum(raw) for weight in raw]


def make(folder: Path, sources: int) -> None:
    """A mixture file and its corpora: each source of its share of 1.25T tokens."""
    from megatron_data import sparse_corpus

    lines = [f"sequence_length: {SEQUENCE}", "seed: 1234", "sources:"]
    for number, share in enumerate(shares(sources)):
        sparse_corpus(folder / f"s{number}", int(SAMPLES * SEQUENCE * share) + SEQUENCE, 2**30)
        lines.append(f"  s{number}: {{paths: [s{number}.bin]}}")
    weights = ", ".join(f"s{number}: {share:.6f}" for number, share in enumerate(shares(sources)))
    lines += ["phases:", f"  - {{name: stable, tokens: {SAMPLES * SEQUENCE}, weights: {{{weights}}}}}"]
    (folder / "mixture.yaml").write_text("\n".join(lines) + "\n")


def ours(folder: Path) -> dict:
    from data_pipeline.ledger import Ledger
    from data_pipeline.loader import Loader
    from data_pipeline.mixture import load_mixture
    from data_pipeline.sources import open_sources
    from data_pipeline.stream import SampleStream

    begun = time.perf_counter()
    mixture = load_mixture(folder / "mixture.yaml")
    sources = open_sources(mixture, vocab_size=32000)
    stream = SampleStream(Ledger.start(mixture, sources), sources)
    with Loader(stream, stream.num_samples // 2, BATCH, BATCH) as loader:
        batch = next(loader)
        seconds = time.perf_counter() - begun
    assert batch.shape == (BATCH, SEQUENCE + 1) and stream.num_samples == SAMPLES
    return {"seconds": seconds}


def theirs(sources: int, folder: Path, part: int) -> dict:
    import logging

    import torch
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron_data import gpt_config, gpt_dataset, sparse_corpus

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    samples, weights = SAMPLES // part, shares(sources)
    # half a percent more than its share for each, as megatron-core builds them, so that the blend cannot run out
    sizes = [int(samples * weight * 1.005) + 2 for weight in weights]
    for number, size in enumerate(sizes):
        sparse_corpus(folder / f"s{number}", (size + 1) * SEQUENCE + 1, DOCUMENT)
    begun = time.perf_counter()
    parts = [gpt_dataset(str(folder / f"s{n}"), size, SEQUENCE, str(folder / "cache")) for n, size in enumerate(sizes)]
    BlendedDataset(parts, weights, samples, gpt_config(SEQUENCE, None))
    return {"seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    main()

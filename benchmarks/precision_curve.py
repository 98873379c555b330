"""How far the demo's loss curve in bf16 is from that in fp32, beside how far another seed of the initial weights takes
it.

    python benchmarks/precision_curve.py                     the whole demo four times: minutes each, on two processes
    python benchmarks/precision_curve.py --work runs/other schedule.warmup=40K       with keys of the run file changed

Two seeds, each in both precisions, with the same data in the same order. Builds the demo's corpora where they are
missing. Runs are kept in --work; a call that was cut off goes on where they are. Prints one JSON line, in nats per
token: `bf16` and `bf16_second_seed`, against fp32 of the same seed; `second_seed`, fp32 against fp32; of each

largest, mean      of the distance of the two curves, each averaged over --window steps
bias               the mean difference over the last half of the steps: what would grow if one trained worse
held_out           the difference on each source's held-out text, after the last step

and `ratio`: the mean distance of bf16 from fp32, over that between the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from arguments import positive

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_train.demo import report  # noqa: E402

RUNS = {
    "fp32": ("training.precision=fp32",),
    "bf16": ("training.precision=bf16",),
    "fp32_second_seed": ("training.precision=fp32", "training.seed=4321"),
    "bf16_second_seed": ("training.precision=bf16", "training.seed=4321"),
}
PAIRS = {
    "bf16": ("bf16", "fp32"),
    "bf16_second_seed": ("bf16_second_seed", "fp32_second_seed"),
    "second_seed": ("fp32_second_seed", "fp32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/precision"), help="where the runs are kept")
    parser.add_argument("--window", type=positive, default=10, help="steps of the moving average")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="keys of the run file, changed in all runs")
    arguments = parser.parse_args()
    work, changes = arguments.work.resolve(), arguments.changes
    curves = {name: train(work / name, (*overrides, *changes)) for name, overrides in RUNS.items()}
    result = {"benchmark": "precision_curve", "steps": len(curves["fp32"]), "window": arguments.window}
    found = {name: distances(curves[one], curves[other], arguments.window) for name, (one, other) in PAIRS.items()}
    ratio = (found["bf16"]["mean"] + found["bf16_second_seed"]["mean"]) / 2 / found["second_seed"]["mean"]
    print(json.dumps(result | found | {"ratio": round(ratio, 2)}))


def train(run: Path, overrides: tuple[str, ...]) -> list[report.Row]:
    """The metrics of the demo's run in this folder, trained or resumed as far as it is not complete."""
    from rich.console import Console

    from moe_train.demo.build import build
    from moe_train.demo.run import BUILD, PROCESSES, RUN_FILE

    os.chdir(ROOT)  # the demo's paths are relative to where it runs
    build(BUILD, Console(stderr=True))
    command = [
        sys.executable,
        "-m",
        "moe_train",
        "pretrain",
        RUN_FILE,
        "--nproc",
        str(PROCESSES),
        f"output_dir={run}",
        *overrides,
    ]
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    subprocess.run(command, stdout=sys.stderr, env={"OMP_NUM_THREADS": str(threads), **os.environ}, check=True)
    return report.read_metrics(run)


def distances(rows: list[report.Row], reference: list[report.Row], window: int) -> dict[str, object]:
    """How far the curve of `rows` is from that of `reference`, both over the same tokens."""
    if [row["tokens"] for row in rows] != [row["tokens"] for row in reference]:
        raise SystemExit("the runs saw different numbers of tokens: remove them and start again")
    gaps = [row["loss"] - other["loss"] for row, other in zip(rows, reference)]
    smooth = [abs(fmean(gaps[end - window : end])) for end in range(window, len(gaps) + 1)]
    (_, losses), (_, reference_losses) = report.last_validation(rows), report.last_validation(reference)
    return {
        "largest": round(max(smooth), 4),
        "mean": round(fmean(smooth), 4),
        "bias": round(fmean(gaps[len(gaps) // 2 :]), 4),
        "held_out": {source: round(loss - reference_losses[source], 4) for source, loss in losses.items()},
    }


if __name__ == "__main__":
    main()

"""One training step of the 60M preset against Hugging Face's JetMoE: forward, backward, clipping and AdamW, same batch,
same cores.

    python benchmarks/step_vs_hf.py                 fp32 and bf16, batch 4 x 512, two threads
    python benchmarks/step_vs_hf.py --rounds 9
    python benchmarks/step_vs_hf.py --profile ours --precision bf16      where the time of a step goes

Each side runs in a process of its own and the two take turns step by step, so that a change of the machine's speed
meets both. Prints one JSON line: for each precision the seconds of either side (median) and ``ratio`` = ours / theirs,
the median of the ratios of neighbouring steps. Hugging Face's side is given sdpa attention, no KV cache, and torch's
fused AdamW. Router losses are on in ours and, as in its default, off in theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from arguments import positive

ROOT = Path(__file__).resolve().parents[1]
BATCH, SEQUENCE, LEARNING_RATE = 4, 512, 5e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=7, help="measured steps of each side")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append")
    parser.add_argument("--profile", choices=["ours", "theirs"], help="shares of one step by kind of operation instead")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments.side, arguments.precision[0], arguments.threads)
        return
    if arguments.profile:
        precision = (arguments.precision or ["fp32"])[0]
        print(
            json.dumps(
                {"benchmark": "step_vs_hf", "profile": arguments.profile, precision: profile(arguments, precision)}
            )
        )
        return
    result = {"benchmark": "step_vs_hf", "batch": [BATCH, SEQUENCE], "threads": arguments.threads}
    for precision in arguments.precision or ["fp32", "bf16"]:
        result[precision] = compare(precision, arguments.rounds, arguments.threads)
    print(json.dumps(result))


def compare(precision: str, rounds: int, threads: int) -> dict[str, float]:
    """Take turns, after two warm-up steps each."""
    sides = {side: _start(side, precision, threads) for side in ("ours", "theirs")}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 2):
        for side, process in sides.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"the process of {side} ended")
            if number >= 2:
                seconds[side].append(float(answer))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["theirs"])]
    return {
        "ours_seconds": round(statistics.median(seconds["ours"]), 4),
        "theirs_seconds": round(statistics.median(seconds["theirs"]), 4),
        "ratio": round(statistics.median(ratios), 4),
    }


def _start(side: str, precision: str, threads: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "--side", side, "--precision", precision, "--threads", str(threads)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention kernel": ("aten::_scaled_dot_product",),
    "allocation and zeroing": ("aten::fill_", "aten::empty", "aten::zero"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone"),
    "moving rows": ("aten::index", "aten::_index_put", "aten::gather", "aten::scatter", "aten::sort"),
    "AdamW": ("aten::_fused_adamw",),
}
"""Kinds of operations by the beginning of their names; what fits none is elementwise work, reductions and overhead."""


def profile(arguments: argparse.Namespace, precision: str) -> dict[str, float]:
    """The share of each kind of operation in the time of the third step."""
    import torch

    step, batch = _prepare(arguments.profile, precision, arguments.threads)
    step(batch())
    step(batch())
    windows = batch()
    with torch.profiler.profile() as recorded:
        step(windows)
    spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "the rest")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(time / total, 3) for kind, time in spent.items()}


def serve(side: str, precision: str, threads: int) -> None:
    """One step for each line read; prints its seconds."""
    step, batch = _prepare(side, precision, threads)
    for _ in sys.stdin:
        windows = batch()
        began = time.perf_counter()
        step(windows)
        print(time.perf_counter() - began, flush=True)


def _prepare(side: str, precision: str, threads: int):
    """(a function that takes a step, a function that draws a batch)."""
    import torch

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(threads)
    from moe_train.config import load_model

    config = load_model(ROOT / "configs/model/bench_60m.yaml")
    generator = torch.Generator().manual_seed(0)
    step = {"ours": our_step, "theirs": their_step}[side](config, precision)
    return step, lambda: torch.randint(0, config.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)


def our_step(config, precision: str):
    """The training program's own step, on one rank."""
    import torch

    from moe_train.training.config import OptimizerConfig
    from parallel import engine
    from parallel.layout import Layout

    topology = engine.start(Layout(1, 1, 1, None, 1, 1), seed=1)
    from moe_train.model.build import DTYPES, build_model
    from moe_train.model.options import ModelOptions
    from moe_train.training.optimizer import Optimizer, wrap_data_parallel
    from moe_train.training.router_monitor import RouterMonitor
    from moe_train.training.step import Stepper

    model = build_model(config, topology, ModelOptions(dtype=DTYPES[precision]))
    monitor = RouterMonitor(model, topology)
    wrapped = wrap_data_parallel(model, overlap=False)
    optimizer = Optimizer(wrapped, OptimizerConfig(lr=LEARNING_RATE), bf16=precision == "bf16")
    stepper = Stepper(wrapped, topology, SEQUENCE, BATCH)

    def step(windows: torch.Tensor) -> None:
        optimizer.zero_grad()
        monitor.reset()
        stepper.train([windows])
        optimizer.update(LEARNING_RATE, optimizer.gradient_norm())

    return step


def their_step(config, precision: str):
    """Hugging Face's model with torch's optimizer, as its documentation would have it."""
    import torch
    from rivals import jetmoe_config
    from transformers import JetMoeForCausalLM

    model = JetMoeForCausalLM(jetmoe_config(config)).train()
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(windows: torch.Tensor) -> None:
        optimizer.zero_grad()
        logits = model(windows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()

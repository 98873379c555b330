"""One training step of a slice of JetMoE-8B on one GPU: full width, all experts, as many layers as fit with their
optimizer.

    python benchmarks/h100_step.py --out profiles                        all that fit, 4 micro-batches of 4 x 4096
    python benchmarks/h100_step.py --only ours,ours-fp8-blockwise,megatron-te --rounds 3
    python benchmarks/h100_step.py --quick                               2 steps of each, without the profiler
    python benchmarks/h100_step.py --model bench_60m --layers 1 --sequence-length 128 --steps 1     tries it on a CPU

Contestants, each in a process of its own, one after the other, with the same layers and the same batch:

    ours                    this project in bf16, with torch's kernels, as where Transformer Engine is not installed
    ours-te                 the same with Transformer Engine's
    ours-fp8-RECIPE         Transformer Engine's in FP8: delayed, tensorwise, blockwise, mxfp8
    ours-share, ours-te-share, ours-fp8-RECIPE-share
                            what one of 8 expert-parallel ranks computes, with synthetic peers: see `contestants.ours`
                            for what of it is measured and what is not
    huggingface-sdpa, huggingface-eager     transformers' JetMoE with torch's AdamW (all of it in bf16)
    megatron-local, megatron-te
                            megatron-core's GPTModel of the same size, with grouped-query attention; local: as where
                            Transformer Engine is not installed

huggingface-eager and megatron-local write attention scores. Where those of one layer and micro-batch cannot fit the 15%
of the GPU's memory that the slice leaves, the two are left out (``left_out`` has them) unless ``--only`` names them.
12 bytes a score are counted: in softmax's backward its fp32 output and two gradients are there at once.

One that fails or does not fit has ``error`` in its entry, and the others go on. ``learned`` is the routing that comes
out of the first weights, ``balanced`` gives every expert as many tokens, in turn; a contestant takes the two
alternately, ``--blocks`` times. ``--rounds`` goes through all contestants again, so that a change of the GPU's clocks
meets all of them.

Prints one JSON line: for every contestant and routing the median seconds of a step, tokens/s, TFLOP/s, the part of the
device's dense bf16 peak (MFU, for FP8 too), peak memory, milliseconds of each part of a step (`moe-train profile` says
what they are; other programs have `other` and `idle`), how often the host waits for the GPU, by operation and by line
of Python, and how many of Transformer Engine's matrix products were FP8; ``ratios`` are tokens/s over those of the
first contestant with the same routing. ``--out`` gets a trace of each, its kernels by name with their time, and
results.json: after every contestant what the line would be by then, so that a command that is cut off leaves what it
has. Progress is on stderr. `moe-train plan layout --measured` goes on from the line or from results.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from arguments import positive

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
OURS = ("ours", "ours-te", *(f"ours-fp8-{recipe}" for recipe in RECIPES))
CONTESTANTS = (
    *OURS,
    *(f"{name}-share" for name in OURS),
    "huggingface-sdpa",
    "huggingface-eager",
    "megatron-local",
    "megatron-te",
)
WITHOUT_TRANSFORMER_ENGINE = ("ours", "ours-share", "megatron-local")
WITH_SCORES = ("huggingface-eager", "megatron-local")
ROOM = 0.85
"""Of the GPU's memory, for what the planner counts of ours; the rest is for others, cuBLAS and fragmentation."""
SCORE_BYTES = 12
"""Of an attention score at the least, where scores are written."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help="some contestants, as a,b,c; else all but those whose attention scores cannot fit",
    )
    parser.add_argument("--model", default="jetmoe_8b", help="a preset or a model file")
    parser.add_argument("--layers", type=positive, help="instead of as many as fit")
    parser.add_argument("--sequence-length", type=positive, default=4096)
    parser.add_argument("--micro-batch-size", type=positive, default=4)
    parser.add_argument("--micro-batches", type=positive, default=4, help="of a step")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of all that is not FP8")
    parser.add_argument("--steps", type=positive, default=5, help="of a block")
    parser.add_argument("--blocks", type=positive, default=3, help="of each routing, in turn")
    parser.add_argument("--rounds", type=positive, default=1, help="through all contestants")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a contestant is given up")
    parser.add_argument("--quick", action="store_true", help="one block of 2 steps, no profile")
    parser.add_argument("--out", help="a folder for results.json, traces and kernels")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.only or () if name not in CONTESTANTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: there is none of that name; there are {', '.join(CONTESTANTS)}")
    if arguments.out:
        try:
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {arguments.out}: {error.strerror}")
    if arguments.quick:
        arguments.steps, arguments.blocks = min(arguments.steps, 2), 1
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.child:
        answer_as_child(arguments)
        return
    machine = in_child("machine", [], 120)
    if "error" in machine:
        print(f"error: {machine['error']}", file=sys.stderr)
        raise SystemExit(2)
    layers = ["--layers", str(machine["layers"])]
    names = arguments.only or [name for name in CONTESTANTS if name not in machine["left_out"]]
    if machine["left_out"]:
        print(f"left out: {', '.join(machine['left_out'])} (their attention scores cannot fit)", file=sys.stderr)
    results: dict[str, dict[str, Any]] = {}
    answer = record(machine, results, arguments)  # at once: what an earlier command left there is not this one's
    for number in range(arguments.rounds):
        for name in names:
            began = time.monotonic()
            print(f"{name}: ", end="", file=sys.stderr, flush=True)
            one = in_child(name, layers, arguments.limit)
            if number == 0:
                results[name] = one
            else:
                merge(results[name], one)
            said = one.get("error") or ", ".join(
                f"{kind} {min(each['seconds']):.4g} s a step" for kind, each in routings(one)
            )
            print(f"{said} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
            answer = record(machine, results, arguments)
    print(json.dumps(answer))


# ---- the parent: starts one child at a time, which has the GPU to itself


def in_child(name: str, more: list[str], limit: float) -> dict[str, Any]:
    """What ``name`` answers in a process of its own; ``error`` where it fails, dies or takes longer than ``limit``
    seconds."""
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--child", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {limit:g} s"}
    try:
        return json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2]
        return {"error": f"ended with status {done.returncode}: {last}"}


def routings(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The measured routings of a contestant; none where it failed."""
    return [(kind, result[kind]) for kind in ("learned", "balanced") if kind in result]


def merge(result: dict[str, Any], later: dict[str, Any]) -> None:
    """Add a later round's times; what else was found out stays the first round's."""
    if "error" in later:
        result.setdefault("error", later["error"])
    for kind, measured in routings(later):
        if kind in result:
            result[kind]["seconds"] += measured["seconds"]


def record(
    machine: dict[str, Any], results: dict[str, dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The answer by now, which ``--out`` gets too."""
    for result in results.values():
        finish(result, arguments)
    answer = {**machine, "contestants": results, "ratios": ratios(results)}
    if arguments.out:
        file = Path(arguments.out) / "results.json"
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(answer) + "\n", encoding="utf-8")
        os.replace(partial, file)
    return answer


def finish(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """From times to the figures that are compared."""
    from moe_train.training.throughput import Throughput

    for _, measured in routings(result):
        speed = Throughput(1, result["device"])
        tokens = arguments.micro_batches * arguments.micro_batch_size * arguments.sequence_length
        seconds = statistics.median(measured["seconds"])
        measured.update(speed.measure(tokens, seconds, result["flops_per_token"]))


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Tokens/s over those of the first contestant that has this routing."""
    answer: dict[str, dict[str, float]] = {}
    for kind in ("learned", "balanced"):
        rates = {name: result[kind]["tokens_per_second"] for name, result in results.items() if kind in result}
        for name, rate in rates.items():
            answer.setdefault(name, {})[kind] = round(rate / next(iter(rates.values())), 4)
    return answer


# ---- a child


def answer_as_child(arguments: argparse.Namespace) -> None:
    """Print one line: what was found, or the error's first line."""
    if arguments.child in WITHOUT_TRANSFORMER_ENGINE:
        for name in ("transformer_engine", "transformer_engine_torch"):
            sys.modules[name] = None  # what imports it finds that it is not there: megatron-core's Adam and norms, too
    try:
        answer = describe(arguments) if arguments.child == "machine" else measure(arguments.child, arguments)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        meant = isinstance(error, SystemExit) or hasattr(error, "exit_code")  # one line that says all
        answer = {"error": lines[0] if meant else f"{type(error).__name__}: {lines[0]}"}
    print("\n" + json.dumps(answer), flush=True)


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions, and the slice that is measured."""
    import torch

    from moe_train.config import load_model
    from parallel.engine import device_name

    whole = load_model(arguments.model)
    layers = arguments.layers or fitted_layers(whole, arguments)
    return {
        "benchmark": "h100_step",
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("transformer-engine", "megatron-core", "transformers")},
        },
        "model": arguments.model,
        "layers": layers,
        "parameters": whole.model_copy(update={"num_layers": layers}).num_parameters(),
        "left_out": [] if arguments.only else left_out(whole, arguments),
        "batch": [arguments.micro_batches, arguments.micro_batch_size, arguments.sequence_length],
        "precision": arguments.precision,
        "recompute": arguments.recompute,
        "steps": [arguments.rounds, arguments.blocks, arguments.steps],
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fitted_layers(model, arguments: argparse.Namespace) -> int:
    """Layers that fit the GPU with fp32 gradients and AdamW's state, by the planner's count of bytes."""
    import torch

    from moe_train.plan.activations import Workload, logits_bytes, stage_bytes
    from moe_train.plan.memory import ELEMENT, state_bytes
    from moe_train.plan.shards import place
    from parallel.layout import Layout

    if not torch.cuda.is_available():
        raise SystemExit(
            "there is no GPU here; to try it on a CPU: --model bench_60m --layers 1 --sequence-length 128 --steps 1"
        )
    room = ROOM * torch.cuda.get_device_properties(0).total_memory
    layout = Layout(1, 1, 1, None, 1, 1)
    for layers in range(model.num_layers, 0, -1):
        slice_ = model.model_copy(update={"num_layers": layers})
        element = ELEMENT[arguments.precision]
        work = Workload(slice_, layout, arguments.sequence_length, arguments.micro_batch_size, element, True)
        needed = sum(state_bytes(slice_, layout, place(layout, 0), arguments.precision).values())
        needed += stage_bytes(work, 0, arguments.micro_batches, arguments.recompute, False) + logits_bytes(work)
        if needed <= room:
            return layers
    raise SystemExit("not one layer fits: give --recompute full or a smaller --sequence-length")


def left_out(model, arguments: argparse.Namespace) -> list[str]:
    """Those that cannot fit the GPU because they write attention scores."""
    import torch

    if not torch.cuda.is_available():
        return []
    heads = model.attention.num_kv_heads * model.attention.queries_per_kv_head
    scores = arguments.micro_batch_size * heads * arguments.sequence_length**2
    room = (1 - ROOM) * torch.cuda.get_device_properties(0).total_memory
    return list(WITH_SCORES) if SCORE_BYTES * scores > room else []


def prepare(name: str, model, arguments: argparse.Namespace):
    """Build a contestant. Raises `contestants.Unavailable`, or whatever the program raises."""
    from contestants import ours

    program, _, rest = name.partition("-")
    batch = (arguments.micro_batches, arguments.micro_batch_size, arguments.sequence_length)
    if program == "ours":
        kernels = rest.removesuffix("share").rstrip("-") or "torch"
        return ours(model, kernels, batch, arguments.precision, arguments.recompute, rest.endswith("share"))
    from rivals import huggingface, megatron

    if program == "huggingface":
        return huggingface(model, rest, arguments.precision)
    return megatron(model, rest, batch, arguments.precision, arguments.recompute)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build one contestant and take its steps on random tokens, the routings in turn."""
    import torch

    from moe_train.config import load_model
    from moe_train.profile.run import time_steps
    from parallel.engine import device_name

    model = load_model(arguments.model).model_copy(update={"num_layers": arguments.layers})
    gpu = torch.cuda.is_available()
    contestant = prepare(name, model, arguments)
    shape = (arguments.micro_batches, arguments.micro_batch_size, arguments.sequence_length + 1)
    windows = torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(
        "cuda" if gpu else "cpu"
    )

    def step() -> None:
        contestant.step(windows)

    measured: dict[str, dict[str, Any]] = {kind: {"seconds": []} for kind in contestant.routings}
    for block in range(arguments.blocks):
        for kind, found in measured.items():
            with contestant.balanced() if kind == "balanced" else nullcontext():
                if block == 0:
                    step(), step()  # allocations, compilation, the choice of kernels
                    if gpu:
                        torch.cuda.reset_peak_memory_stats()
                found["seconds"].append(time_steps(step, arguments.steps, gpu))
                if block == 0:
                    found["peak_memory"] = torch.cuda.max_memory_allocated() if gpu else None
    if not arguments.quick:
        for kind, found in measured.items():
            with contestant.balanced() if kind == "balanced" else nullcontext():
                found.update(look_inside(step, f"{name}-{kind}", arguments))
    return {
        "device": device_name(),
        "parameters": contestant.parameters,
        "flops_per_token": contestant.model.flops_per_token(arguments.sequence_length),
        **measured,
    }


def look_inside(step, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the parts of a step, and where the host waits; traces and kernels go to ``--out``."""
    import torch

    from moe_train.profile.operations import waiting_lines
    from moe_train.profile.run import record_steps
    from parallel.transformer_engine import counted_products

    lines = waiting_lines(step, ROOT)
    products = {}
    if name.startswith(("ours-te", "ours-fp8")):
        with counted_products() as count:
            step()
        products = {"te_products": {"total": count.total, "fp8": count.fp8}}
    out = Path(arguments.out) / name if arguments.out else None
    found = record_steps(step, min(2, arguments.steps), torch.cuda.is_available(), out)
    milliseconds = {**found.parts, "idle": found.idle}
    return {
        "milliseconds": {part: round(1e3 * seconds, 3) for part, seconds in milliseconds.items() if seconds},
        "host_waits": found.host_waits,
        "waiting_lines": lines,
        **products,
    }


if __name__ == "__main__":
    main()

"""One training step of a slice of JetMoE-8B on one GPU: full width, all experts, as many layers as fit with their optimizer.

    python benchmarks/h100_step.py                                       bf16, 4096 tokens, learned and balanced routing
    python benchmarks/h100_step.py --recompute selective --micro-batch-size 2
    python benchmarks/h100_step.py --model bench_60m --layers 1 --sequence-length 128     tries the script on a CPU

Prints one JSON line: for either routing tokens/s, TFLOP/s, the part of the device's peak (MFU), peak memory, and the milliseconds of each
part of a step (`moe-train profile` says what they are). ``learned`` is the router as it comes out of its first weights; ``balanced``
sends every expert as many tokens, in turn, with the same gates. ``fitted`` are the layers that the memory planner finds room
for. One rank stands for the dense part of a run without tensor parallelism; nothing is sent between GPUs.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROOM = 0.9
"""Of the GPU's memory, for what the planner counts; the rest is for NCCL, cuBLAS and fragmentation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="jetmoe_8b", help="a preset or a model file")
    parser.add_argument("--layers", type=int, help="instead of as many as fit")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", help="a folder for the traces")
    arguments = parser.parse_args()

    import torch

    from moe_train.config import load_model

    whole = load_model(arguments.model)
    layers = arguments.layers or fitted_layers(whole, arguments)
    model = whole.model_copy(update={"num_layers": layers})
    result = {
        "benchmark": "h100_step",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "model": arguments.model,
        "layers": layers,
        "parameters": model.num_parameters(),
        "batch": [arguments.micro_batches, arguments.micro_batch_size, arguments.sequence_length],
        "precision": arguments.precision,
        "recompute": arguments.recompute,
    }
    for routing in ("learned", "balanced"):
        with balanced_routing() if routing == "balanced" else nullcontext():
            out = Path(arguments.out) / routing if arguments.out else None
            result[routing] = measure(model, arguments, out)
    print(json.dumps(result))


def fitted_layers(model, arguments: argparse.Namespace) -> int:
    """Layers that fit the GPU with fp32 gradients and AdamW's state, by the planner's count of bytes."""
    import torch

    from moe_train.plan.activations import Workload, logits_bytes, stage_bytes
    from moe_train.plan.memory import ELEMENT, state_bytes
    from moe_train.plan.shards import place
    from parallel.layout import Layout

    if not torch.cuda.is_available():
        raise SystemExit("no GPU: give --layers")
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


def measure(model, arguments: argparse.Namespace, out: Path | None) -> dict:
    """Build the slice, take steps on random tokens, and let go of it."""
    import gc

    import torch

    from moe_train.profile.run import device_name, profile_steps
    from moe_train.training.config import OptimizerConfig
    from moe_train.training.throughput import Throughput
    from parallel import engine
    from parallel.layout import Layout

    topology = engine.start(Layout(1, 1, 1, None, 1, 1), seed=1)
    from moe_train.model.build import DTYPES, build_model
    from moe_train.model.options import ModelOptions
    from moe_train.training.optimizer import Optimizer, wrap_data_parallel
    from moe_train.training.step import Stepper

    options = ModelOptions(dtype=DTYPES[arguments.precision], recompute=arguments.recompute)
    wrapped = wrap_data_parallel(build_model(model, topology, options), overlap=topology.device.type == "cuda")
    optimizer = Optimizer(wrapped, OptimizerConfig(), bf16=arguments.precision == "bf16")
    stepper = Stepper(wrapped, topology, arguments.sequence_length, arguments.micro_batch_size)
    shape = (arguments.micro_batches, arguments.micro_batch_size, arguments.sequence_length + 1)
    windows = torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(topology.device)

    def step() -> None:
        optimizer.zero_grad()
        stepper.train(list(windows))
        optimizer.update(1e-6, optimizer.gradient_norm())

    speed = Throughput(model.flops_per_token(arguments.sequence_length), 1, device_name(topology))
    tokens = windows.numel() // (arguments.sequence_length + 1) * arguments.sequence_length
    figures = asdict(profile_steps(step, arguments.steps, topology, speed, tokens, out))
    del wrapped, optimizer, stepper
    gc.collect()
    engine.stop()
    parts = {**figures.pop("parts"), "idle": figures.pop("idle")}
    return {**figures, "milliseconds": {name: round(1e3 * seconds, 2) for name, seconds in parts.items()}}


@contextmanager
def balanced_routing() -> Iterator[None]:
    """Every expert as many tokens: slot j of token t goes to expert ``(t * k + j) mod E``, with the gates that the router gave."""
    import torch

    from moe_train.model.router import Router

    route = Router.forward

    def in_turn(router, x_th, tokens):
        gates_tk, experts_tk, sent_tk = route(router, x_th, tokens)
        pairs = torch.arange(experts_tk.numel(), device=experts_tk.device).view_as(experts_tk)
        return gates_tk, pairs % router.num_experts, sent_tk

    Router.forward = in_turn
    try:
        yield
    finally:
        Router.forward = route


if __name__ == "__main__":
    main()

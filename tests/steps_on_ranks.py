"""Training steps of a small model on any layout, as every rank of a test's pool runs them."""

from __future__ import annotations

import os
import re
from unittest import mock

import torch

from moe_train.config import OptimizerConfig
from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig, ModelConfig, RouterConfig
from parallel import engine
from parallel.layout import Layout
from tests.small_models import loud_gates

MICRO_BATCH, GLOBAL_BATCH = 2, 4


def small_model(**changes) -> ModelConfig:
    """4 layers, 4 kv heads, 4 experts top-2 for attention and MLP, an odd vocabulary."""
    values = dict(
        vocab_size=51,
        hidden_size=32,
        num_layers=4,
        attention=MixtureOfAttentionConfig(num_kv_heads=4, head_dim=8, num_experts=4, top_k=2),
        mlp=MixtureOfMLPConfig(ffn_hidden_size=24, num_experts=4, top_k=2),
        router=RouterConfig(load_balancing_coef=0.02, z_coef=0.004),
        init_std=0.1,
    )
    return ModelConfig(**{**values, **changes})


def make_layout(world_size: int, tensor=1, pipeline=1, virtual_pipeline=None, expert=1) -> Layout:
    return Layout(world_size, tensor, pipeline, virtual_pipeline, expert, world_size // tensor // pipeline)


def build(
    layout: Layout,
    model: ModelConfig,
    precision="fp32",
    recompute="none",
    sharded_attention=True,
    document_end=None,
    offload=None,
    lr=3e-3,
    seed=5,
    row_multiple=None,
    overlap=False,
    kernels="torch",
    fp8_recipe=None,
    dispatcher="alltoall",
    in_turn=1,
):
    """(chunks, stepper for S = 15, optimizer, monitor, topology) of one rank."""
    topology = engine.start(layout, seed=seed)
    import moe_train.training.optimizer
    from moe_train.model.build import DTYPES, build_model
    from moe_train.model.options import ModelOptions
    from moe_train.training.optimizer import Optimizer, wrap_data_parallel
    from moe_train.training.router_monitor import RouterMonitor
    from moe_train.training.step import Stepper

    options = ModelOptions(
        DTYPES[precision],
        seed,
        recompute,
        sharded_attention,
        document_end=document_end,
        kernels=kernels,
        fp8_recipe=fp8_recipe,
        dispatcher=dispatcher,
        in_turn=in_turn,
    )
    chunks = build_model(model, topology, options)
    loud_gates(chunks)
    if row_multiple is not None:
        for module in (module for chunk in chunks for module in chunk.modules() if hasattr(module, "dispatcher")):
            module.dispatcher.row_multiple = row_multiple
    monitor = RouterMonitor(chunks, topology, gates=True)
    with mock.patch.object(moe_train.training.optimizer, "BUCKET_SIZE", 3000):  # several buckets of a small model
        wrapped = wrap_data_parallel(chunks, overlap=overlap)
    optimizer = Optimizer(wrapped, OptimizerConfig(lr=lr, offload=offload), bf16=precision != "fp32")
    return chunks, Stepper(wrapped, topology, 15, MICRO_BATCH, in_turn), optimizer, monitor, topology


def run_steps(
    built, steps: range, vocab_size: int, lr=3e-3, micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH
) -> list[dict]:
    """Take ``steps`` (their numbers seed the data) and return loss, gradient norm and what the routers did in each."""
    from moe_train.training.adaptive import AdaptiveCoefficients
    from moe_train.training.depth_monitor import DepthMonitor

    chunks, stepper, optimizer, monitor, topology = built
    data, coefficients, depths = topology.layout.data, AdaptiveCoefficients(chunks), DepthMonitor(chunks, topology)
    figures = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        windows = torch.randint(0, vocab_size, (global_batch, 16), generator=generator).to(topology.device)
        optimizer.zero_grad()
        monitor.reset()
        depths.reset()
        loss = stepper.train(list(windows.split(micro_batch))[topology.data_rank :: data])
        norm = optimizer.gradient_norm()
        own = torch.tensor([loss / topology.layout.tensor], device=topology.device).double()
        parts = [own, monitor.totals, depths.totals]
        loss, routers, through = topology.sum_over_world(torch.cat(parts)).split([len(part) for part in parts])
        optimizer.update(lr, norm)
        count = global_batch // micro_batch
        balance, z = monitor.losses(routers, count)
        drop_rates = monitor.drop_rates(routers)
        coefficients.update(drop_rates)
        figures.append(
            {
                "loss": float(loss) / count,
                "balance": balance,
                "z": z,
                "norm": norm,
                "counts": monitor.counts(routers),
                "routers": monitor.figures(routers),
                "depths": depths.figures(through, global_batch * (windows.shape[1] - 1)),
                "drop_rates": drop_rates,
                "coefficients": coefficients.values,
            }
        )
    return figures


def train(
    layout: dict, steps: int = 10, model: dict | None = None, micro_batch: int = MICRO_BATCH, **options
) -> list[dict]:
    """``steps`` steps on ``layout`` (tensor, pipeline, ...) over the ranks of this process group."""
    config = small_model(**(model or {}))
    world_size = int(os.environ["WORLD_SIZE"])
    built = build(make_layout(world_size, **layout), config, **options)
    built[1].micro_batch_size = micro_batch
    return run_steps(built, range(steps), config.vocab_size, micro_batch=micro_batch)


def save(
    layout: dict,
    folder: str,
    steps: int,
    more: int,
    micro_batch: int = MICRO_BATCH,
    model: dict | None = None,
    **options,
) -> list[dict]:
    """Take ``steps`` steps, save to ``folder``, take ``more``; the figures of the latter."""
    from pathlib import Path

    from moe_train.checkpoint.config import CheckpointConfig
    from moe_train.checkpoint.save import Checkpointer

    config = small_model(**(model or {}))
    built = build(make_layout(int(os.environ["WORLD_SIZE"]), **layout), config, **options)
    built[1].micro_batch_size = micro_batch
    run_steps(built, range(steps), config.vocab_size, micro_batch=micro_batch)
    chunks, _, optimizer, _, topology = built
    checkpointer = Checkpointer(Path(folder), CheckpointConfig(), chunks, optimizer, topology)
    checkpointer.save(steps, {"step": steps, "samples": steps * GLOBAL_BATCH, "tokens": 0})
    figures = run_steps(built, range(steps, steps + more), config.vocab_size, micro_batch=micro_batch)
    checkpointer.wait()
    return figures


def resume(
    layout: dict, checkpoints: list[str], steps: int, more: int, model: dict | None = None, **options
) -> list[list[dict]]:
    """From each checkpoint, built with other initial weights: the figures of ``more`` steps."""
    from pathlib import Path

    from moe_train.checkpoint.load import load_checkpoint

    config = small_model(**(model or {}))
    figures = []
    for checkpoint in checkpoints:
        built = build(make_layout(int(os.environ["WORLD_SIZE"]), **layout), config, seed=77, **options)
        state = load_checkpoint(Path(checkpoint), built[0], built[2], built[4])
        assert state["step"] == steps
        figures.append(run_steps(built, range(steps, steps + more), config.vocab_size))
    return figures


def clock_beside_a_late_rank(layout: dict, late: int, stopped: str) -> list[str]:
    """What the clock of this rank saw of a step in which ``late`` does not begin its last micro-batch before another
    rank's clock has stopped (and made the file ``stopped``), or for a minute."""
    import time
    from pathlib import Path

    config = small_model()
    built = build(make_layout(int(os.environ["WORLD_SIZE"]), **layout), config)
    chunks, stepper, _, _, topology = built
    run_steps(built, range(1), config.vocab_size)
    seen, stop = [], stepper.clock.stop

    def forward(*_) -> None:
        end = time.monotonic() + 60
        while topology.rank == late and seen and not Path(stopped).exists():
            if time.monotonic() > end:
                seen.append("waited in vain")
                return
            time.sleep(0.01)
        seen.append("forward")

    def stopping() -> None:
        stop()
        seen.append("stop")
        if topology.rank != late:
            Path(stopped).touch()

    chunks[0].register_forward_pre_hook(forward)  # called for each of two micro-batches
    stepper.clock.stop = stopping
    stepper.clock.start()
    run_steps(built, range(1, 2), config.vocab_size, micro_batch=1)
    return seen if stepper.clock.seconds() > 0 else [*seen, "no time"]


def drift(layout: dict, parameter: str | None = None, rank: int = 0, gather: bool = True, **options) -> str:
    """What the comparison of copies says after some steps, when ``rank`` has one other bit in ``parameter``; whether or
    not weights are gathered before it."""
    from moe_train.training.replicas import check_replicas

    config = small_model()
    built = build(make_layout(int(os.environ["WORLD_SIZE"]), **layout), config, **options)
    run_steps(built, range(3), config.vocab_size)
    chunks, topology = built[0], built[-1]
    if gather:
        built[2].gather_weights()
    if parameter and topology.rank == rank:
        (held,) = [each for chunk in chunks for each in chunk.parameters() if each.placement.name == parameter]
        held.detach().view(-1).view(torch.int32)[0] ^= 1
    try:
        check_replicas(chunks, topology)
    except Exception as error:
        return f"{error.exit_code}: {error}"
    return "none"


def evaluate_between_steps(layout: dict, **options) -> list[float]:
    """Losses of three steps, each followed by an evaluation."""
    config = small_model()
    built = build(make_layout(int(os.environ["WORLD_SIZE"]), **layout), config, **options)
    windows = torch.randint(0, config.vocab_size, (MICRO_BATCH, 16), generator=torch.Generator().manual_seed(99))
    windows, losses = windows.to(built[-1].device), []
    for step in range(3):
        losses.append(run_steps(built, range(step, step + 1), config.vocab_size)[0]["loss"])
        losses += built[1].evaluate([windows]).tolist()
    return losses


def waits_of_a_step(layout: dict, model: dict | None = None, kernels: str = "torch") -> list[str]:
    """Where the host waits for what looks like a GPU in the second step, forward to update.

    Where the expert dispatch has its numbers on the way to the host, it waits for them once.
    """
    from tests.cuda_look_alike.host_waits import host_waits

    config = small_model(**(model or {}))
    layout = make_layout(int(os.environ["WORLD_SIZE"]), **layout)
    built = build(layout, config, precision="bf16", overlap=True, kernels=kernels)
    _, stepper, optimizer, monitor, topology = built
    run_steps(built, range(1), config.vocab_size)
    windows = torch.randint(0, config.vocab_size, (GLOBAL_BATCH, 16), generator=torch.Generator().manual_seed(1))
    windows = windows.to(topology.device)
    with host_waits() as waits:
        optimizer.zero_grad()
        monitor.reset()
        stepper.train(list(windows.split(MICRO_BATCH)))
        optimizer.update(1e-3, optimizer.gradient_norm())
    return waits


def travels_of_a_step(layout: dict, in_turn: int) -> list[int]:
    """How many matrix products and attentions were computed while the rows of each exchange travelled, forward and
    backward, in a step of two micro-batches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from parallel.dispatch import travel

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += bool(re.match(r"aten\.(mm|addmm|_scaled_dot_product)", str(function)))
            return function(*args, **(kwargs or {}))

    config = small_model()
    built = build(make_layout(int(os.environ["WORLD_SIZE"]), **layout), config, in_turn=in_turn)
    built[1].micro_batch_size = 1
    products, travelled = Products(), []
    begin, end = travel._Trip.begin, travel._Trip.end

    def beginning(trip, *args, **kwargs) -> None:
        begin(trip, *args, **kwargs)
        trip.products = products.count

    def ending(trip) -> torch.Tensor:
        travelled.append(products.count - trip.products)
        return end(trip)

    sequences = 2 * built[-1].layout.data
    with mock.patch.object(travel._Trip, "begin", beginning), mock.patch.object(travel._Trip, "end", ending), products:
        run_steps(built, range(1), config.vocab_size, micro_batch=1, global_batch=sequences)
    return travelled


def train_by_deep_ep(layout: dict, **options) -> list[dict]:
    """:func:`train` with the dispatcher ``flex``, over a DeepEP of gloo's making."""
    from megatron.core.transformer.moe import fused_a2a

    from tests.deep_ep_on_cpu import deep_ep_on_cpu

    with deep_ep_on_cpu():
        figures = train(layout, dispatcher="flex", **options)
        assert fused_a2a._buffer is not None, "nothing went through DeepEP's buffer"
    return figures

"""What takes part in `h100_step.py`, and this project's own step as one of the contestants; `rivals.py` has the
others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from moe_train.model.config import ModelConfig
from parallel.layout import Layout

LEARNING_RATE = 1e-6  # small: the weights, and with them the routing, stay as they are
ALONE = Layout(1, 1, 1, None, 1, 1)
SHARED_BY = 8
"""Ranks that share the experts, for the share of one."""


class Unavailable(Exception):
    """This program cannot run here; the message says why."""


@dataclass
class Contestant:
    """One program, ready to take steps."""

    step: Callable[[torch.Tensor], None]
    """Takes windows of token ids ``[micro-batches, micro-batch size, S + 1]``: all gradients of a step, clipping,
    AdamW."""
    balanced: Callable[[], AbstractContextManager]
    """While it is entered every expert gets as many tokens, in turn, with the gates that the router gave."""
    model: ModelConfig
    """What its operations are counted by."""
    parameters: int
    routings: tuple[str, ...] = ("learned", "balanced")


def ours(
    model: ModelConfig, kernels: str, batch: tuple[int, int, int], precision: str, recompute: str, share: bool
) -> Contestant:
    """This project's step on one rank, as its trainer takes it, without reading data.

    Args:
        kernels: ``torch``, ``te``, or ``fp8-RECIPE`` (which needs Transformer Engine).
        share: only an eighth of the experts is held and stepped by this rank. Rows that a real run would send to the
            other ranks stand in for as many rows that those would send here, sorted by expert already. Measured:
            everything that one of 8 ranks computes, with balanced peers, and its waiting for the numbers of rows. Not
            measured: the exchanges (of numbers, of rows, of gradients), and the sorting of what comes from several
                ranks where a rank has several experts.
    """
    from parallel import engine

    topology = engine.start(ALONE, seed=1)
    from moe_train.model.build import build_model
    from moe_train.training.config import OptimizerConfig
    from moe_train.training.optimizer import Optimizer, wrap_data_parallel
    from moe_train.training.router_monitor import RouterMonitor
    from moe_train.training.step import Stepper

    micro_batches, size, length = batch
    held = dataclasses.replace(topology, layout=_shared(model)) if share else topology
    chunks = build_model(model, held, _options(kernels, precision, recompute))
    for chunk in chunks:
        _fill(chunk, model.init_std)
    monitor = RouterMonitor(chunks, topology)
    wrapped = wrap_data_parallel(chunks, overlap=True)  # as on a GPU
    optimizer = Optimizer(wrapped, OptimizerConfig(lr=LEARNING_RATE), bf16=precision != "fp32")
    stepper = Stepper(wrapped, topology, length, size)

    def step(windows: torch.Tensor) -> None:
        with _rows_of_peers() if share else nullcontext():
            optimizer.zero_grad()
            monitor.reset()
            stepper.train(list(windows))
            optimizer.update(LEARNING_RATE, optimizer.gradient_norm())

    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    return Contestant(
        step, _our_routing_in_turn, model, parameters, ("balanced",) if share else ("learned", "balanced")
    )


def _options(kernels: str, precision: str, recompute: str):
    """The options of a model with these kernels. Weights are drawn on the device instead, which takes seconds, not
    minutes."""
    from moe_train.model.build import DTYPES
    from moe_train.model.options import ModelOptions

    values: dict = {"dtype": DTYPES[precision], "recompute": recompute, "initialize": False}
    if kernels != "torch":
        from parallel.transformer_engine import choose_kernels

        recipe = kernels.partition("-")[2] or None
        values |= {"kernels": choose_kernels("transformer_engine", recipe), "fp8_recipe": recipe}
    return ModelOptions(**values)


def _shared(model: ModelConfig) -> Layout:
    experts = {part.num_experts for part in (model.attention, model.mlp) if part.num_experts}
    if not experts or any(number % SHARED_BY for number in experts):
        raise Unavailable(f"{SHARED_BY} ranks do not divide the experts of this model")
    return Layout(SHARED_BY, 1, 1, None, SHARED_BY, SHARED_BY)


@torch.no_grad()
def _fill(module: torch.nn.Module, std: float) -> None:
    """First weights, drawn on the device: ones for norms, zeros for biases, N(0, std) for the rest."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, std)
        else:
            parameter.fill_(float(not name.endswith("bias")))


@contextmanager
def _rows_of_peers() -> Iterator[None]:
    """What would go to an expert of another rank goes to the expert of that place on this rank: as many rows as
    balanced peers would send, and what it keeps."""
    from parallel.dispatch.alltoall import AllToAllDispatcher
    from parallel.dispatch.rows import ExpertRows

    count_alone = AllToAllDispatcher.exchange_counts

    def count(dispatcher, count_e: torch.Tensor, places: int) -> ExpertRows:
        held = dispatcher.num_experts // SHARED_BY
        rows = ExpertRows(count_alone(dispatcher, count_e, places).per_expert.view(SHARED_BY, held).sum(0))
        _ = rows.counts  # the host waits for them, as it does with peers
        return rows

    with replaced(AllToAllDispatcher, "exchange_counts", count):
        yield


@contextmanager
def _our_routing_in_turn() -> Iterator[None]:
    from moe_train.model.router import Router

    route = Router.forward

    def in_turn(router, *arguments):
        gates_tk, experts_tk, sent_tk = route(router, *arguments)
        return gates_tk, experts_in_turn(experts_tk, router.num_experts), sent_tk

    with replaced(Router, "forward", in_turn):
        yield


def experts_in_turn(experts_tk: torch.Tensor, experts: int) -> torch.Tensor:
    """``[T, k]``: expert ``(t * k + j) mod E`` for slot j of token t."""
    return torch.arange(experts_tk.numel(), device=experts_tk.device).view_as(experts_tk) % experts


@contextmanager
def replaced(owner, name: str, by) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)

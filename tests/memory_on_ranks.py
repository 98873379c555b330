"""What one rank really allocates: model, gradients and optimizer state, and what a backward pass keeps."""

from __future__ import annotations

import os

import torch

from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig, ModelConfig
from tests.steps_on_ranks import build, make_layout, run_steps, small_model


def wide_model(**changes) -> ModelConfig:
    """Wide enough that activations are not all overhead."""
    values = dict(
        vocab_size=300,
        hidden_size=64,
        num_layers=4,
        attention=MixtureOfAttentionConfig(num_kv_heads=4, head_dim=16, num_experts=4, top_k=2),
        mlp=MixtureOfMLPConfig(ffn_hidden_size=96, num_experts=4, top_k=2),
    )
    return ModelConfig(**{**values, **changes})


def state_bytes(layout: dict, model: dict, precision: str, sharded_attention: bool) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state after a step."""
    config = small_model(**model)
    shape = make_layout(int(os.environ["WORLD_SIZE"]), **layout)
    built = build(shape, config, precision, sharded_attention=sharded_attention)
    run_steps(built, range(1), config.vocab_size)
    chunks, stepper, optimizer, _, _ = built
    buffers = [buffer for chunk in stepper.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    held = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers}
    assert all(parameter.untyped_storage().data_ptr() in held for chunk in chunks for parameter in chunk.parameters())
    state = 0
    for shard in optimizer.shards():
        tensors = [shard.exp_avg, shard.exp_avg_sq]
        if shard.main.untyped_storage().data_ptr() not in held:
            tensors.append(shard.main)
        state += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {
        "weights": sum(buffer.param_data.untyped_storage().nbytes() for buffer in buffers),
        "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers),
        "optimizer": state,
    }


class _Held:
    """A saved tensor; its storage counts as long as one of them lives."""

    def __init__(self, meter: Meter, tensor: torch.Tensor):
        self.tensor, self.meter = tensor, meter
        storage = tensor.untyped_storage()
        self.key = storage.data_ptr()
        count, size = meter.storages.get(self.key, (0, storage.nbytes()))
        meter.storages[self.key] = (count + 1, size)
        if count == 0:
            meter.now += size
            meter.peak = max(meter.peak, meter.now)

    def __del__(self):
        count, size = self.meter.storages[self.key]
        if count > 1:
            self.meter.storages[self.key] = (count - 1, size)
        else:
            del self.meter.storages[self.key]
            self.meter.now -= size


class Meter(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that the tensors saved for backward take at a time, each storage once, weights left
    out."""

    def __init__(self, weights: set[int]):
        self.storages: dict[int, tuple[int, int]] = {}
        self.now = self.peak = 0

        def pack(tensor):
            return tensor if tensor.untyped_storage().data_ptr() in weights else _Held(self, tensor)

        super().__init__(pack, lambda held: held.tensor if isinstance(held, _Held) else held)


def activation_bytes(
    layout: dict, model: dict, recompute: str, length: int, in_turn: int = 1, document_end: int | None = None
) -> int:
    """The peak of what is kept for backward during one step of two micro-batches of two sequences a data
    rank."""
    from moe_train.training.step import Stepper

    config = wide_model(**model)
    shape = make_layout(int(os.environ["WORLD_SIZE"]), **layout)
    _, stepper, optimizer, _, topology = build(shape, config, recompute=recompute, document_end=document_end)
    stepper = Stepper(stepper.chunks, topology, length, 2, in_turn)
    weights = {
        buffer.param_data.untyped_storage().data_ptr()
        for chunk in stepper.chunks
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
    }
    generator = torch.Generator().manual_seed(topology.data_rank)
    windows = torch.randint(0, config.vocab_size, (4, length + 1), generator=generator)
    optimizer.zero_grad()
    meter = Meter(weights)
    with meter:
        stepper.train(list(windows.split(2)))
    return meter.peak

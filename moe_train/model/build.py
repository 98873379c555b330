"""From a model config and a topology to this rank's part of the model."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from moe_train.model.config import ModelConfig
from moe_train.model.options import ModelOptions
from moe_train.model.transformer import Transformer
from parallel.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Precision -> what parameters and activations are kept in."""


def engine_config(config: ModelConfig, topology: Topology, options: ModelOptions) -> TransformerConfig:
    """What megatron-core's layers, dispatcher, schedules and data parallelism need to know.

    Only the engine reads it; the network itself is built from ``config``. Weights are initialised by us, so
    megatron-core is told not to.
    """
    layout = topology.layout
    virtual, dtype, recipe = topology.virtual_stages > 1, options.dtype, options.fp8_recipe
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.attention.num_kv_heads * config.attention.queries_per_kv_head,
        num_query_groups=config.attention.num_kv_heads,
        kv_channels=config.attention.head_dim,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_moe_experts=max(config.mlp.num_experts, config.attention.num_experts) or None,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.tensor > 1,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=topology.virtual_stages if virtual else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        init_model_with_meta_device=topology.device.type == "meta",
        gradient_accumulation_fusion=options.kernels == "transformer_engine",
        # Else the gradient of a step's first micro-batch is not added to the buffer but takes the place of what is
        # there: of those that take turns, the backward of the last comes first.
        disable_parameter_transpose_cache=options.in_turn > 1,
        fp8="hybrid" if recipe else None,
        fp8_recipe=recipe or "delayed",
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        variable_seq_lengths=False,
        # With two pipeline ranks previous and next are the same peer and batched messages of virtual stages would
        # cross.
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
        # Streams wait for each message; that the host waits for the device too is, so megatron-core, for older versions
        # of torch.
        batch_p2p_sync=False,
    )


def build_model(config: ModelConfig, topology: Topology, options: ModelOptions) -> list[Transformer]:
    """The chunks of the model on this rank: one, or as many as there are virtual pipeline stages."""
    engine = engine_config(config, topology, options)
    return [Transformer(config, engine, topology, options, stage) for stage in range(topology.virtual_stages)]

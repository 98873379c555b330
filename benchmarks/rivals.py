"""Other programs that train (almost) the same model, behind the same function as ours.

``huggingface`` is transformers' JetMoE with torch's optimizer. ``megatron`` is megatron-core's GPTModel with its own
data parallelism and optimizer: grouped-query attention of as many query heads as a token has in a mixture of attention,
and the same experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch
from contestants import ALONE, LEARNING_RATE, Contestant, Unavailable, experts_in_turn, replaced

from moe_train.convert.hf_config import hf_config
from moe_train.model.config import GroupedQueryAttentionConfig, ModelConfig
from parallel import cuda_settings


def huggingface(model: ModelConfig, attention: str, precision: str) -> Contestant:
    """transformers' JetMoE as its documentation would have it trained: torch's fused AdamW, clipping, no KV cache, no
    router losses.

    In bf16 weights, gradients and moments are bf16, which is 8 bytes of a parameter where the others have 18.

    Args:
        attention: ``sdpa`` or ``eager``.
    """
    from transformers.models.jetmoe import modeling_jetmoe

    cuda_settings.export(ALONE)  # the allocator that ours has
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        network = modeling_jetmoe.JetMoeForCausalLM(jetmoe_config(model, attention)).train()
    if precision == "bf16":
        network = network.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(windows: torch.Tensor) -> None:
        optimizer.zero_grad()
        for window in windows:
            logits = network(window[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
            (loss / len(windows)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    gating = modeling_jetmoe.JetMoeTopKGating
    route = gating.forward

    def in_turn(router, hidden):
        order, _, gates, sizes, logits = route(router, hidden)
        at_home = torch.empty_like(gates)
        at_home[order] = gates
        order = experts_in_turn(order, len(sizes)).sort(stable=True)[1]
        sizes = [len(order) // len(sizes) + (expert < len(order) % len(sizes)) for expert in range(len(sizes))]
        return order, order // router.top_k, at_home[order], sizes, logits

    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Contestant(step, lambda: replaced(gating, "forward", in_turn), model, parameters)


def jetmoe_config(model: ModelConfig, attention: str = "sdpa"):
    """transformers' config of the same model."""
    from transformers import JetMoeConfig

    return JetMoeConfig.from_dict(hf_config(model, "float32", None), attn_implementation=attention)


def megatron(
    model: ModelConfig, layers: str, batch: tuple[int, int, int], precision: str, recompute: str
) -> Contestant:
    """megatron-core's GPTModel, wrapped and stepped as its own training program does it.

    Args:
        layers: ``local``: its layers without Transformer Engine (experts one after the other; the attention is computed
            again backward, without which its scores fill the memory); ``te``: Transformer Engine's with what it offers
            fused.
        recompute: ``none`` or ``full``; ``selective`` is the attention's.
    """
    from parallel import engine

    topology = engine.start(ALONE, seed=1)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe import moe_utils, router

    te = layers == "te"
    if te:
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            raise Unavailable("Transformer Engine is not installed")
    gpu = topology.device.type == "cuda"
    if not hasattr(moe_utils, "te_general_gemm") or not gpu:  # it forgets to say so without Transformer Engine
        moe_utils.te_general_gemm = None
    if not gpu:  # a CPU has one generator, which nothing here draws from
        get_cuda_rng_tracker().fork = lambda *_: nullcontext()
    model = _as_gpt(model)
    micro_batches, size, length = batch
    bf16 = precision != "fp32"
    config = TransformerConfig(**_gpt_config(model, te, bf16, recompute), use_cpu_initialization=not gpu)
    if te:
        spec = specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.mlp.num_experts, moe_grouped_gemm=True
        )
    else:
        spec = specs.get_gpt_layer_local_spec(num_experts=model.mlp.num_experts, normalization="RMSNorm")
    network = GPTModel(
        config,
        spec,
        model.vocab_size,
        length,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=model.tie_embeddings,
    ).to(topology.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=40_000_000
        ),
        Float16Module(config, network) if bf16 else network,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped.no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        ),
        [wrapped],
        use_gloo_process_groups=False,
    )
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True
    positions = torch.arange(length, device=topology.device).expand(size, -1)
    # True is what may not be looked at. Transformer Engine's attention is causal by itself.
    mask = None if te else torch.ones(length, length, dtype=torch.bool, device=topology.device).triu(1)[None, None]
    schedule = get_forward_backward_func()

    def forward(iterator, network):
        window = next(iterator)
        loss_bs = network(window[:, :-1], positions, mask, labels=window[:, 1:].contiguous())
        return loss_bs, lambda loss_bs: (loss_bs.float().mean(), {})

    def step(windows: torch.Tensor) -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward,
            data_iterator=iter(windows),
            model=[wrapped],
            num_microbatches=micro_batches,
            seq_length=length,
            micro_batch_size=size,
            forward_only=False,
        )
        optimizer.step()

    def prefer_in_turn(logits: torch.Tensor) -> torch.Tensor:
        """Instead of its random logits: the experts whose turn it is are far ahead of the others."""
        rows, experts = logits.reshape(-1, logits.shape[-1]).shape
        turn_tk = experts_in_turn(logits.new_empty(rows, model.mlp.top_k), experts)
        return logits + torch.zeros_like(logits).view(rows, experts).scatter_(1, turn_tk, 100.0).view_as(logits)

    @contextmanager
    def balanced() -> Iterator[None]:
        with (
            replaced(config, "moe_router_force_load_balancing", True),
            replaced(router, "apply_random_logits", prefer_in_turn),
        ):
            yield

    return Contestant(step, balanced, model, parameters)


def _as_gpt(model: ModelConfig) -> ModelConfig:
    """The model whose mixture of attention is grouped-query attention of as many query heads as a token has in it."""
    attention = model.attention
    if attention.kind == "gqa":
        return model
    heads = attention.num_kv_heads * attention.top_k
    same = GroupedQueryAttentionConfig(
        num_heads=heads, num_kv_heads=attention.num_kv_heads, head_dim=attention.head_dim
    )
    return model.model_copy(update={"attention": same})


def _gpt_config(model: ModelConfig, te: bool, bf16: bool, recompute: str) -> dict:
    attention = model.attention
    values = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_kv_heads,
        kv_channels=attention.head_dim,
        ffn_hidden_size=model.mlp.ffn_hidden_size,
        num_moe_experts=model.mlp.num_experts,
        moe_router_topk=model.mlp.top_k,
        moe_ffn_hidden_size=model.mlp.ffn_hidden_size,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_z_loss_coeff=0.001,
        moe_router_dtype="fp32",
        moe_grouped_gemm=te,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        init_method_std=model.init_std,
        # its head needs Apex's
        gradient_accumulation_fusion=te and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        moe_permute_fusion=te,
        apply_rope_fusion=te,
        cross_entropy_loss_fusion=True,
        # off by default, and on in its own training program: else SwiGLU writes tensors of the FFN's width in fp32
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
    )
    if recompute == "full":
        values |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif recompute == "selective" or not te:
        values |= dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return values

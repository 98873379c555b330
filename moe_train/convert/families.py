"""The models of Hugging Face that are converted: the keys of their ``config.json``, and their tensors. Needs no torch.

A family is two tables. One says which key of theirs is which key of our model config, and which keys of ours it takes
for granted (no model with other values is one of theirs). The other says which of their tensors make up each of our
parameters. What would change the mathematics and has no counterpart here is refused by key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe_train.model.config import ModelConfig

Z_COEF_KEY, SCOPE_KEY = "router_z_loss_coef", "router_loss_scope"
"""Keys of our own, for router losses that transformers does not have: it carries them unread."""

ALL = slice(None)


class Part(NamedTuple):
    """A tensor of theirs: ``ours[index]``, in the shape ``shape`` (None: that of ours)."""

    hf_name: str
    index: tuple = ()
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """A kind of model that transformers has.

    Attributes:
        keys: our key (dotted) -> theirs; several of ours may be one of theirs.
        fixed: our key -> the only value that a model of this family has.
        defaults: what transformers takes for a key that ``config.json`` leaves out.
        must_be: their key -> (whether a value will do, why not).
        tensors: our name below ``layers.{i}.`` -> their tensors below ``model.layers.{i}.``.
        synonyms: other names of their keys.
        complete: fills in what transformers computes from other keys; returns (key, reason) to refuse.
        extra: keys that are written, but say nothing that is not said by others.
        unfit: why a model that fits `fixed` cannot be written all the same.
        special_ids: those of its own tokenizer, which transformers takes where nothing is said.
    """

    name: str
    model_type: str
    keys: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    must_be: dict[str, tuple[Callable[[Any], bool], str]]
    tensors: Callable[[ModelConfig], dict[str, list[Part]]]
    synonyms: dict[str, str] = field(default_factory=dict)
    complete: Callable[[dict[str, Any]], tuple[str, str] | None] = lambda values: None
    extra: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    unfit: Callable[[ModelConfig], str | None] = lambda config: None
    special_ids: dict[str, int | None] = field(
        default_factory=lambda: {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    )

    @property
    def architecture(self) -> str:
        """Of transformers' class."""
        return f"{self.name}ForCausalLM"


_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_sequence_length": "max_position_embeddings",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "attention.num_kv_heads": "num_key_value_heads",
    "mlp.ffn_hidden_size": "intermediate_size",
}

_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "attention_dropout": (lambda value: not value, "there is no dropout here"),
    "quantization_config": (lambda value: value is None, "quantised weights are not converted"),
    "sliding_window": (lambda value: value is None, "attention here sees everything before it"),
}

_PLAIN = {
    **_UNSUPPORTED,
    "attention_bias": (lambda value: not value, "projections here have no bias"),
    "mlp_bias": (lambda value: not value, "projections here have no bias"),
    "clip_qkv": (lambda value: value is None, "queries, keys and values are not clipped here"),
    "router_jitter_noise": (lambda value: not value, "there is no noise on the routers' input here"),
}


# --- JetMoE -------------------------------------------------------------------------------------------------


def _jetmoe_tensors(config: ModelConfig) -> dict[str, list[Part]]:
    _, width, hidden = config.attention.weights(config)["kv.weight"].shape
    return {
        "attention_norm.weight": [Part("input_layernorm.weight")],
        "attention.router.weight": [Part("self_attention.experts.router.layer.weight")],
        "attention.kv.weight": [Part("self_attention.kv_proj.weight", (), (2 * width, hidden))],
        "attention.query.weight": [Part("self_attention.experts.input_linear.weight")],
        "attention.output.weight": [Part("self_attention.experts.output_linear.weight")],
        "attention.bias": [Part("self_attention.experts.bias")],
        "mlp_norm.weight": [Part("post_attention_layernorm.weight")],
        "mlp.router.weight": [Part("mlp.router.layer.weight")],
        "mlp.gate_up.weight": [Part("mlp.input_linear.weight")],
        "mlp.down.weight": [Part("mlp.output_linear.weight")],
        "mlp.bias": [Part("mlp.bias")],
    }


def _complete_jetmoe(values: dict[str, Any]) -> tuple[str, str] | None:
    """The query heads are the kv heads times the experts of a token; else the file is another model's."""
    heads, kv, top_k = (
        values.get(key) for key in ("num_attention_heads", "num_key_value_heads", "num_experts_per_tok")
    )
    if heads is not None and isinstance(kv, int) and isinstance(top_k, int) and heads != kv * top_k:
        return "num_attention_heads", (f"is not num_key_value_heads {kv} x num_experts_per_tok {top_k} = {kv * top_k}")
    if isinstance(values["aux_loss_coef"], int | float):
        values.setdefault(Z_COEF_KEY, values["aux_loss_coef"] / 10)  # as the authors weight it
    return None


JETMOE = Family(
    name="JetMoe",
    model_type="jetmoe",
    keys={
        **_COMMON,
        "attention.head_dim": "kv_channels",
        "attention.num_experts": "num_local_experts",
        "attention.top_k": "num_experts_per_tok",
        "mlp.num_experts": "num_local_experts",
        "mlp.top_k": "num_experts_per_tok",
        "mlp.activation": "activation_function",
        "router.load_balancing_coef": "aux_loss_coef",
        "router.z_coef": Z_COEF_KEY,
        "router.scope": SCOPE_KEY,
    },
    fixed={
        "attention.kind": "mixture",
        "attention.bias": True,
        "mlp.kind": "mixture",
        "mlp.bias": True,
        "layer_norm_eps": 1e-6,  # its layers build their norms without one
        "router.renormalize": True,
        "router.bias": False,
        "router.normalize_logits": False,
    },
    defaults={
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 12,
        "num_key_value_heads": 16,
        "kv_channels": 128,
        "intermediate_size": 5632,
        "max_position_embeddings": 4096,
        "activation_function": "silu",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.01,
    },
    must_be={
        **_UNSUPPORTED,
        "bias": (lambda value: value is True, "JetMoE's blocks always have their bias"),
        "glu": (lambda value: value is True, "the MLP experts here are always gated"),
    },
    tensors=_jetmoe_tensors,
    synonyms={  # of the authors' configuration, and one alias
        "num_layers": "num_hidden_layers",
        "moe_num_experts": "num_local_experts",
        "moe_top_k": "num_experts_per_tok",
        "ffn_hidden_size": "intermediate_size",
        "head_dim": "kv_channels",
    },
    complete=_complete_jetmoe,
    extra=lambda config: {
        "num_attention_heads": config.attention.num_kv_heads * config.attention.top_k,
        "output_router_logits": False,
    },
)


# --- the others: grouped-query attention --------------------------------------------------------------------

_GROUPED = {
    **_COMMON,
    "layer_norm_eps": "rms_norm_eps",
    "attention.num_heads": "num_attention_heads",
    "attention.head_dim": "head_dim",
    "mlp.activation": "hidden_act",
}

_EXPERTS = {
    "mlp.top_k": "num_experts_per_tok",
    "router.load_balancing_coef": "router_aux_loss_coef",
    "router.z_coef": Z_COEF_KEY,
    "router.scope": SCOPE_KEY,
}


def _attention_tensors(config: ModelConfig) -> dict[str, list[Part]]:
    attention, hidden = config.attention, config.hidden_size
    group, rows = attention.queries_per_kv_head, attention.kv_width
    return {
        "attention_norm.weight": [Part("input_layernorm.weight")],
        "attention.qkv.weight": [
            Part("self_attn.q_proj.weight", (ALL, slice(0, group)), (attention.width, hidden)),
            Part("self_attn.k_proj.weight", (ALL, group), (rows, hidden)),
            Part("self_attn.v_proj.weight", (ALL, group + 1), (rows, hidden)),
        ],
        "attention.output.weight": [Part("self_attn.o_proj.weight")],
        "attention.query_norm.weight": [Part("self_attn.q_norm.weight")],
        "attention.key_norm.weight": [Part("self_attn.k_norm.weight")],
        "mlp_norm.weight": [Part("post_attention_layernorm.weight")],
    }


def _expert_tensors(config: ModelConfig, block: str, gate: str, up: str, down: str) -> dict[str, list[Part]]:
    """Experts of a mixture, each with three tensors of these names."""
    hidden, ffn, experts = config.hidden_size, config.mlp.ffn_hidden_size, range(config.mlp.num_experts)
    halves = ((gate, slice(0, ffn)), (up, slice(ffn, 2 * ffn)))
    return {
        "mlp.router.weight": [Part(f"{block}.gate.weight")],
        "mlp.gate_up.weight": [
            Part(f"{block}.experts.{expert}.{name}.weight", (expert, rows), (ffn, hidden))
            for expert in experts
            for name, rows in halves
        ],
        "mlp.down.weight": [
            Part(f"{block}.experts.{expert}.{down}.weight", (expert,), (hidden, ffn)) for expert in experts
        ],
    }


def _llama_tensors(config: ModelConfig) -> dict[str, list[Part]]:
    shape = (config.mlp.ffn_hidden_size, config.hidden_size)
    return {
        **_attention_tensors(config),
        "mlp.gate_up.weight": [
            Part("mlp.gate_proj.weight", (0,), shape),
            Part("mlp.up_proj.weight", (1,), shape),
        ],
        "mlp.down.weight": [Part("mlp.down_proj.weight")],
    }


def _complete_heads(values: dict[str, Any]) -> tuple[str, str] | None:
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        if hidden % heads:
            return "num_attention_heads", f"does not divide hidden_size {hidden}, and there is no head_dim"
        values["head_dim"] = hidden // heads
    return None


def _complete_olmoe(values: dict[str, Any]) -> tuple[str, str] | None:
    if problem := _complete_heads(values):
        return problem
    heads, hidden, head_dim = values["num_attention_heads"], values["hidden_size"], values["head_dim"]
    if isinstance(heads, int) and isinstance(head_dim, int) and heads * head_dim != hidden:
        return "head_dim", f"is not hidden_size {hidden} / num_attention_heads {heads}"
    return None


def _heads_of_llama(config: ModelConfig) -> str | None:
    if config.hidden_size % config.attention.num_heads:
        return f"attention.num_heads {config.attention.num_heads} must divide hidden_size {config.hidden_size}"
    return None


def _heads_of_olmoe(config: ModelConfig) -> str | None:
    if config.attention.width != config.hidden_size:
        return f"num_heads x head_dim, {config.attention.width}, must be the hidden_size {config.hidden_size}"
    return None


_GROUPED_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

LLAMA = Family(
    name="Llama",
    model_type="llama",
    keys=_GROUPED,
    fixed={"attention.kind": "gqa", "attention.qk_norm": False, "mlp.kind": "dense"},
    defaults={
        **_GROUPED_DEFAULTS,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    must_be=_PLAIN,
    tensors=_llama_tensors,
    complete=_complete_heads,
    extra=lambda config: {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    unfit=_heads_of_llama,
)

MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    keys={**_GROUPED, **_EXPERTS, "mlp.num_experts": "num_local_experts"},
    fixed={
        "attention.kind": "gqa",
        "attention.qk_norm": False,
        "mlp.kind": "mixture",
        "mlp.bias": False,
        "router.renormalize": True,
        "router.bias": False,
        "router.normalize_logits": False,
    },
    defaults={
        **_GROUPED_DEFAULTS,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    must_be=_PLAIN,
    tensors=lambda config: _attention_tensors(config) | _expert_tensors(config, "block_sparse_moe", "w1", "w3", "w2"),
    synonyms={"num_experts": "num_local_experts"},
    complete=_complete_heads,
    extra=lambda config: {"sliding_window": None, "router_jitter_noise": 0.0, "output_router_logits": False},
)

OLMOE = Family(
    name="Olmoe",
    model_type="olmoe",
    keys={
        **_GROUPED,
        **_EXPERTS,
        "mlp.num_experts": "num_experts",
        "router.renormalize": "norm_topk_prob",
    },
    fixed={
        "attention.kind": "gqa",
        "attention.qk_norm": True,
        "mlp.kind": "mixture",
        "mlp.bias": False,
        "router.bias": False,
        "router.normalize_logits": False,
    },
    defaults={
        **_GROUPED_DEFAULTS,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 2048,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    must_be=_PLAIN,
    tensors=lambda config: (
        _attention_tensors(config) | _expert_tensors(config, "mlp", "gate_proj", "up_proj", "down_proj")
    ),
    synonyms={"num_local_experts": "num_experts"},
    complete=_complete_olmoe,
    extra=lambda config: {"attention_bias": False, "clip_qkv": None, "output_router_logits": False},
    unfit=_heads_of_olmoe,
    special_ids={"bos_token_id": None, "eos_token_id": 50279, "pad_token_id": 1},
)

FAMILIES = (JETMOE, LLAMA, MIXTRAL, OLMOE)

"""Hugging Face's ``config.json`` of a JetMoE, to and from our model config. Needs no torch.

Two dialects are read: that of transformers, and that of the authors' code, whose names transformers
swallows silently while it keeps its own defaults. What would change the mathematics and has no counterpart
here is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from moe_train.errors import UserError
from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig, ModelConfig, RouterConfig

DEFAULTS: dict[str, Any] = {
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
    "initializer_range": 0.01,
}
"""What transformers' JetMoeConfig takes for a key that config.json leaves out."""

SYNONYMS = {
    "num_layers": "num_hidden_layers",
    "moe_num_experts": "num_local_experts",
    "moe_top_k": "num_experts_per_tok",
    "ffn_hidden_size": "intermediate_size",
    "head_dim": "kv_channels",
}
"""Names of the authors' configuration (and one alias) -> transformers'."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}

Z_COEF_KEY, SCOPE_KEY = "router_z_loss_coef", "router_loss_scope"
"""Keys of our own, for router losses that transformers' JetMoE does not have: it carries them unread."""

_MUST_BE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda value: value == "jetmoe", "only jetmoe is converted"),
    "bias": (lambda value: value is True, "JetMoE's blocks here always have their bias"),
    "glu": (lambda value: value is True, "the MLP experts here are always gated"),
    "attention_dropout": (lambda value: value == 0, "there is no dropout here"),
    "rope_scaling": (lambda value: value is None, "scaled rotary embeddings are not supported"),
    "quantization_config": (lambda value: value is None, "quantised weights are not converted"),
}


def model_config(values: dict[str, Any], source: str) -> ModelConfig:
    """The model that a ``config.json`` describes.

    Args:
        values: its content.
        source: its path, for errors.

    Raises:
        UserError: a key has a wrong type, contradicts another, or asks for what this model cannot do.
    """
    for key, (allowed, reason) in _MUST_BE.items():
        if key in values and not allowed(values[key]):
            raise UserError(f"{source}: {key}: {values[key]!r}: {reason}")
    values = _with_one_name_each(values, source)
    theta = _rope_theta(values, source)
    value = {key: values.get(key, default) for key, default in DEFAULTS.items()}
    _check_heads(values, value, source)
    if value["activation_function"] not in ACTIVATIONS:
        raise UserError(
            f"{source}: activation_function: {value['activation_function']!r} is not one of"
            f" {', '.join(ACTIVATIONS)}"
        )
    experts = {"num_experts": value["num_local_experts"], "top_k": value["num_experts_per_tok"]}
    router = {"load_balancing_coef": value["aux_loss_coef"]}
    if Z_COEF_KEY in values:
        router["z_coef"] = values[Z_COEF_KEY]
    elif isinstance(value["aux_loss_coef"], int | float):
        router["z_coef"] = value["aux_loss_coef"] / 10  # as the authors weight it
    if SCOPE_KEY in values:
        router["scope"] = values[SCOPE_KEY]
    try:
        return ModelConfig(
            vocab_size=value["vocab_size"],
            hidden_size=value["hidden_size"],
            num_layers=value["num_hidden_layers"],
            attention=MixtureOfAttentionConfig(
                num_kv_heads=value["num_key_value_heads"], head_dim=value["kv_channels"], **experts
            ),
            mlp=MixtureOfMLPConfig(
                ffn_hidden_size=value["intermediate_size"],
                activation=ACTIVATIONS[value["activation_function"]],
                **experts,
            ),
            router=RouterConfig(**router),
            norm_eps=value["rms_norm_eps"],
            rope_theta=theta,
            max_sequence_length=value["max_position_embeddings"],
            init_std=value["initializer_range"],
            tie_embeddings=value["tie_word_embeddings"],
        )
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(error)}") from None


def hf_config(config: ModelConfig, dtype: str, special_ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of ``config.json`` for ``config``, as transformers writes it.

    Args:
        dtype: torch's name of the weights' type, such as ``bfloat16``.
        special_ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
        UserError: transformers' JetMoE cannot express this model.
    """
    attention, mlp = config.attention, config.mlp
    for key in ("num_experts", "top_k"):
        one, other = getattr(attention, key), getattr(mlp, key)
        if one != other:
            raise UserError(
                f"attention.{key} {one} and mlp.{key} {other} differ, and Hugging Face's JetMoE has one"
                " number for both: this model cannot be exported"
            )
    return {
        "architectures": ["JetMoeForCausalLM"],
        "model_type": "jetmoe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": attention.num_kv_heads,
        "num_attention_heads": attention.num_kv_heads * attention.top_k,
        "kv_channels": attention.head_dim,
        "num_local_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "intermediate_size": mlp.ffn_hidden_size,
        "activation_function": mlp.activation,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        # Both spellings: transformers 5 reads the first, transformers 4 and others the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "output_router_logits": False,
        "aux_loss_coef": config.router.load_balancing_coef,
        Z_COEF_KEY: config.router.z_coef,
        SCOPE_KEY: config.router.scope,
        "use_cache": True,
        **special_ids,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _with_one_name_each(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Synonyms replaced by transformers' names; both given must agree."""
    values = dict(values)
    for synonym, name in SYNONYMS.items():
        if synonym not in values:
            continue
        given = values.pop(synonym)
        if values.setdefault(name, given) != given:
            raise UserError(
                f"{source}: {synonym}: {given!r} contradicts {name}: {values[name]!r}; they mean the same"
            )
    return values


def _rope_theta(values: dict[str, Any], source: str) -> Any:
    """theta, from ``rope_parameters`` or ``rope_theta``."""
    given = values.get("rope_theta")
    parameters = values.get("rope_parameters")
    if parameters is None:
        return 10000.0 if given is None else given
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise UserError(f"{source}: rope_parameters: {parameters!r}: only rope_type default is supported")
    theta = parameters.get("rope_theta", 10000.0 if given is None else given)
    if given is not None and given != theta:
        raise UserError(f"{source}: rope_theta: {given!r} contradicts rope_parameters.rope_theta: {theta!r}")
    return theta


def _check_heads(values: dict[str, Any], value: dict[str, Any], source: str) -> None:
    """The query heads are the kv heads times the experts of a token; else the file is another model's."""
    heads, kv, top_k = (
        values.get("num_attention_heads"),
        value["num_key_value_heads"],
        value["num_experts_per_tok"],
    )
    if heads is not None and isinstance(kv, int) and isinstance(top_k, int) and heads != kv * top_k:
        raise UserError(
            f"{source}: num_attention_heads: {heads!r} is not num_key_value_heads {kv} x"
            f" num_experts_per_tok {top_k} = {kv * top_k}"
        )


_THEIR_KEY = {
    "num_layers": "num_hidden_layers",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "kv_channels",
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "ffn_hidden_size": "intermediate_size",
    "load_balancing_coef": "aux_loss_coef",
    "z_coef": Z_COEF_KEY,
    "scope": SCOPE_KEY,
    "norm_eps": "rms_norm_eps",
    "max_sequence_length": "max_position_embeddings",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = str(problem["loc"][-1]) if problem["loc"] else ""
    return f"{_THEIR_KEY.get(key, key)}: {problem['input']!r}: {problem['msg']}"

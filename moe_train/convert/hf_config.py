"""Hugging Face's ``config.json`` to and from our model config. Needs no torch.

The dialect of transformers is read, and for JetMoE that of the authors' code too, whose names transformers swallows
silently while it keeps its own defaults. What would change the mathematics and has no counterpart here is refused.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from data_pipeline.yaml_marks import as_yaml
from moe_train.convert.families import FAMILIES, JETMOE, Family
from moe_train.errors import UserError
from moe_train.model.config import ModelConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


def model_config(values: dict[str, Any], source: str) -> ModelConfig:
    """The model that a ``config.json`` describes.

    Args:
        values: its content; without a ``model_type`` it is taken for a JetMoE.
        source: its path, for errors.

    Raises:
        UserError: a key has a wrong type, contradicts another, or asks for what this model cannot do.
    """
    family = _family_of_file(values, source)
    for key, (allowed, reason) in family.must_be.items():
        if key in values and not allowed(values[key]):
            raise UserError(f"{source}: {key}: {as_yaml(values[key])}: {reason}")
    values = _with_one_name_each(values, family, source)
    values["rope_theta"] = _rope_theta(values, family, source)
    values = {**family.defaults, **values}
    if problem := family.complete(values):
        key, reason = problem
        raise UserError(f"{source}: {key}: {as_yaml(values[key])} {reason}")
    activation = family.keys["mlp.activation"]
    if values[activation] not in ACTIVATIONS:
        raise UserError(f"{source}: {activation}: {as_yaml(values[activation])} is not one of {', '.join(ACTIVATIONS)}")
    values[activation] = ACTIVATIONS[values[activation]]
    ours = {key: values[theirs] for key, theirs in family.keys.items() if theirs in values}
    try:
        return ModelConfig.model_validate(_nested(ours | family.fixed))
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(error, family)}") from None


def family_of(config: ModelConfig) -> Family:
    """The family of Hugging Face's that can express a model. Raises UserError, one line, where there is none."""
    if config.depth is not None:
        raise UserError("this model cannot be exported: Hugging Face has none whose tokens pass layers by (depth)")
    ours = _flat(config)
    kinds = ("attention.kind", "mlp.kind")
    reasons = []
    for family in FAMILIES:
        if all(family.fixed[kind] == ours[kind] for kind in kinds):
            reason = _misfit(family, ours) or _routers_differ(config) or family.unfit(config)
            if reason is None:
                return family
            reasons.append(f"Hugging Face's {family.name}: {reason}")
    kind = " and ".join(f"{key} {ours[key]}" for key in kinds)
    raise UserError(f"this model cannot be exported: {'; '.join(reasons) or f'no model there has {kind}'}")


def hf_config(config: ModelConfig, dtype: str, special_ids: dict[str, int | None] | None) -> dict[str, Any]:
    """The content of ``config.json`` for ``config``, as transformers writes it.

    Args:
        dtype: torch's name of the weights' type, such as ``bfloat16``.
        special_ids: bos_token_id, eos_token_id and pad_token_id; None: those of the family's own tokenizer.

    Raises:
        UserError: transformers cannot express this model.
    """
    family = family_of(config)
    ours = _flat(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: ours[key] for key, theirs in family.keys.items()},
        # Both spellings: transformers 5 reads this one, transformers 4 and others rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        **family.extra(config),
        "use_cache": True,
        **(family.special_ids if special_ids is None else special_ids),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _family_of_file(values: dict[str, Any], source: str) -> Family:
    kind = values.get("model_type", JETMOE.model_type)
    known = {family.model_type: family for family in FAMILIES}
    if kind not in known:
        raise UserError(f"{source}: model_type: {as_yaml(kind)}: what is converted is {', '.join(known)}")
    return known[kind]


def _misfit(family: Family, ours: dict[str, Any]) -> str | None:
    """Why a model is not one of this family."""
    for key, value in family.fixed.items():
        if ours[key] != value:
            return f"{key} is always {as_yaml(value)}, not {as_yaml(ours[key])}"
    said: dict[str, str] = {}
    for key, theirs in family.keys.items():
        other = said.setdefault(theirs, key)
        if ours[other] != ours[key]:
            return f"{other} {ours[other]} and {key} {ours[key]} differ, and it has one key for both, {theirs}"
    return None


def _with_one_name_each(values: dict[str, Any], family: Family, source: str) -> dict[str, Any]:
    """Synonyms replaced by transformers' names; both given must agree."""
    values = dict(values)
    for synonym, name in family.synonyms.items():
        if synonym not in values:
            continue
        given = values.pop(synonym)
        if values.setdefault(name, given) != given:
            raise UserError(
                f"{source}: {synonym}: {as_yaml(given)} contradicts {name}: {as_yaml(values[name])}; they mean the same"
            )
    return values


def _rope_theta(values: dict[str, Any], family: Family, source: str) -> Any:
    """theta, from ``rope_parameters`` (``rope_scaling``, where it says something, as transformers 4 calls them) or
    ``rope_theta``."""
    default = family.defaults["rope_theta"]
    given = values.get("rope_theta")
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    parameters = values.get(key)
    if parameters is None:
        return default if given is None else given
    where = f"{source}: {key}: {as_yaml(parameters)}"
    if not isinstance(parameters, dict) or parameters.get("rope_type", parameters.get("type", "default")) != "default":
        raise UserError(f"{where}: only rope_type default is supported, no scaled rotary embeddings")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: whole heads are turned here, not parts")
    theta = parameters.get("rope_theta", default if given is None else given)
    if given is not None and given != theta:
        raise UserError(f"{source}: rope_theta: {as_yaml(given)} contradicts {key}.rope_theta: {as_yaml(theta)}")
    return theta


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        part, _, name = key.rpartition(".")
        (result.setdefault(part, {}) if part else result)[name] = value
    return result


def _flat(config: ModelConfig) -> dict[str, Any]:
    """The way back of :func:`_nested`; ``router`` is the one that the mixtures have."""
    own = [config.router_of(part) for part in ("mlp", "attention") if getattr(config, part).num_experts]
    parts = config.model_dump() | {"router": (own or [config.router])[0].model_dump()}
    parts = {key: value if isinstance(value, dict) else {"": value} for key, value in parts.items()}
    return {f"{part}.{name}" if name else part: value for part, inner in parts.items() for name, value in inner.items()}


def _routers_differ(config: ModelConfig) -> str | None:
    if config.attention.num_experts and config.mlp.num_experts:
        if config.router_of("attention") != config.router_of("mlp"):
            return "the routers of attention and mlp differ"
    return None


def _first_problem(error: ValidationError, family: Family) -> str:
    problem = error.errors()[0]
    path = [str(key) for key in problem["loc"]]
    key = ".".join([path[0], path[-1]] if len(path) > 1 else path)  # without the kind between them
    return f"{family.keys.get(key, key)}: {as_yaml(problem['input'])}: {problem['msg']}"

"""What may change when a run is resumed: one table, which `docs/resume.md` repeats for people.

A run is a function of its config and its ledger. Keys that do not touch what is computed are free; those that
do, but that people rightly change during a run, are recorded in events.jsonl; those that would make it
another run are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.yaml_marks import as_yaml
from moe_train.errors import UserError

if TYPE_CHECKING:
    from moe_train.config import RunConfig

Rule = Literal["free", "recorded", "refused"]

RULES: dict[str, tuple[Rule, str]] = {
    "output_dir": ("free", "a run's folder may be moved"),
    "model": ("refused", "another shape is another model"),
    "model.router.load_balancing_coef": ("recorded", "changes the loss from here on"),
    "model.router.z_coef": ("recorded", "changes the loss from here on"),
    "model.router.scope": ("recorded", "changes the loss from here on"),
    "model.router.load_balancing": ("recorded", "changes the loss from here on"),
    "model.router.adaptive": ("recorded", "changes the loss from here on"),
    "model.router.capacity_factor": ("recorded", "changes what is dropped from here on"),
    "model.router.drop_by": ("recorded", "changes what is dropped from here on"),
    "model.depth.coef": ("recorded", "changes the loss from here on"),
    "model.max_sequence_length": ("recorded", "a limit; no weight depends on it"),
    "data.mixture": (
        "recorded",
        "the ledger judges the mixture itself: its future may be edited, its past not",
    ),
    "data.document_mask": ("recorded", "changes what a token sees from here on"),
    "data.validation": ("free", "measures, does not train"),
    "parallel": ("free", "how ranks share the work does not change it"),
    "training.micro_batch_size": ("recorded", "the router losses are averaged over it"),
    "training.global_batch_size": ("recorded", "changes the steps from here on"),
    "training.batch_size_warmup": ("recorded", "changes the steps from here on"),
    "training.precision": ("refused", "another arithmetic; branch the run instead"),
    "training.fp8_recipe": ("recorded", "other roundings from here on"),
    "training.kernels": ("recorded", "the same arithmetic, but not to the last bit"),
    "training.seed": ("refused", "the initial weights came from it"),
    "training.max_steps": ("free", "only says when to stop"),
    "training.max_wall_time": ("free", "only says when to stop"),
    "training.recompute": ("recorded", "the same arithmetic, but not always to the last bit on GPUs"),
    "training.deterministic": ("recorded", "the same arithmetic, but not always to the last bit on GPUs"),
    "optimizer": ("recorded", "changes the updates from here on"),
    "schedule": ("recorded", "changes the learning rate from here on"),
    "checkpoint": ("free", "when to save and what to keep"),
    "faults.on_nonfinite": ("recorded", "decides which updates are left out"),
    "faults.on_spike": ("recorded", "decides which updates are left out"),
    "faults.spike_deviations": ("recorded", "decides which updates are left out"),
    "faults.max_skips": ("free", "only says when to stop"),
    "faults.check_replicas": ("free", "looks, does not touch"),
    "faults.step_timeout": ("free", "only says when to stop"),
    "logging": ("free", "what is shown"),
    "launch": ("free", "where it runs"),
}
"""Key, or section for every key below it -> (rule, why). The longest entry that fits a key counts."""


@dataclass(frozen=True)
class Change:
    """A key with another value than at the last start; values as in config.yaml."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.old)} -> {_shown(self.new)}"


def rule_of(key: str) -> Rule:
    """The rule of a dotted key of a run file; a mixture's own router has the rules of the model's. Raises KeyError for
    a key that the table does not cover."""
    parts = re.sub(r"^model\.(attention|mlp)\.router\b", "model.router", key).split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in RULES:
            return RULES[prefix][0]
    raise KeyError(key)


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Every key whose value differs, in the order of the file."""
    parts = [(name, getattr(config.model, name)) for name in ("attention", "mlp") for config in (old, new)]
    own = {name for name, part in parts if getattr(part, "router", None)}
    before, after = (dict(_leaves(_dump(config, own))) for config in (old, new))
    keys = dict.fromkeys([*before, *after])
    return [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def check_resume(old: RunConfig, new: RunConfig) -> list[Change]:
    """The changes that are to be recorded in events.jsonl, when a run started with `old` goes on with `new`.

    Raises UserError, one line with each key and both its values, when one of them may not change.
    """
    found = changes(old, new)
    refused = [change for change in found if rule_of(change.key) == "refused"]
    if refused:
        listed = ", ".join(str(change) for change in refused)
        raise UserError(
            f"{new.output_dir}: the run there cannot go on with other values of {listed};"
            " restore them, or set another output_dir for a new run"
        )
    return [change for change in found if rule_of(change.key) == "recorded"]


def _dump(config: RunConfig, own: set[str]) -> dict[str, Any]:
    """The config as plain data, with the whole router of the mixtures ``own``, their own or the model's."""
    data = config.model_dump(mode="json", by_alias=True)
    for name in own:
        if "router" in data["model"][name]:
            data["model"][name]["router"] = config.model.router_of(name).model_dump(mode="json")
    return data


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else as_yaml(value)

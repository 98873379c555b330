"""A measured step of one GPU, taken apart so that it can stand for the computation of any stage of a layout.

It comes from the JSON line of `benchmarks/h100_step.py`, or from the profile.json of `moe-train profile` on one rank.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.plan.hardware import Hardware

SHARED_BY = 8
"""Expert-parallel ranks, of which a contestant whose name ends with -share is one."""


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of one optimizer step of one GPU, and of what it is made of."""

    source: str
    device: str
    layers: int
    parameters: int
    micro_batches: int
    micro_batch_size: int
    sequence_length: int
    recompute: str
    routing: str
    expert_ranks: int
    """1: all experts were there. Else one rank's share of them was."""
    stepped: int
    """Parameters that the optimizer updated."""
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    head_seconds: float
    """Of all micro-batches, forward and backward."""
    optimizer_seconds: float

    @property
    def layer_seconds(self) -> float:
        """Of one layer and micro-batch: everything but head and optimizer, embedding and idle time included."""
        rest = self.step_seconds - self.head_seconds - self.optimizer_seconds
        return rest / (self.layers * self.micro_batches)

    def compute(self, layers: int) -> float:
        """Seconds of one micro-batch through so many layers and the head."""
        return layers * self.layer_seconds + self.head_seconds / self.micro_batches

    def update(self, elements: float) -> float:
        """Seconds of the update of so many parameters."""
        return self.optimizer_seconds * elements / self.stepped

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layer_seconds": self.layer_seconds}


def read_measured(path: str, contestant: str, routing: str) -> MeasuredStep:
    """Read a measured step; `contestant` and `routing` choose one of those that the benchmark measured.

    Raises UserError: no such file, something else, or without that contestant.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").strip()
        found = json.loads(lines)
    except OSError as error:
        raise UserError(
            f"--measured {path}: {error.strerror}; give the line of h100_step.py or a profile.json"
        ) from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--measured {path} is not one JSON object: give the line of h100_step.py or a profile.json")
    try:
        if "contestants" in found:
            return _of_benchmark(found, path, contestant, routing)
        return _of_profile(found, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--measured {path}: no step of one GPU with its parts is in it (missing: {error})") from None


def _of_benchmark(found: dict[str, Any], path: str, contestant: str, routing: str) -> MeasuredStep:
    measured = {name: each for name, each in found["contestants"].items() if name.startswith("ours")}
    entry = measured.get(contestant, {})
    if routing not in entry:
        there = ", ".join(
            f"{name} ({kind})" for name, each in measured.items() for kind in ("learned", "balanced") if kind in each
        )
        why = f" ({entry['error']})" if "error" in entry else ""
        raise UserError(
            f"--measured {path}: no {contestant} with {routing} routing in it{why}; there is {there or 'none of ours'}"
        )
    step = entry[routing]
    if "milliseconds" not in step:
        raise UserError(f"--measured {path}: {contestant} has no times of its parts; measure without --quick")
    micro_batches, size, length = found["batch"]
    return MeasuredStep(
        source=f"{path}: {contestant}, {found['date']}",
        device=found["device"],
        layers=found["layers"],
        parameters=found["parameters"],
        micro_batches=micro_batches,
        micro_batch_size=size,
        sequence_length=length,
        recompute=found["recompute"],
        routing=routing,
        expert_ranks=SHARED_BY if contestant.endswith("-share") else 1,
        stepped=entry["parameters"],
        step_seconds=step["step_seconds"],
        tokens_per_second=step["tokens_per_second"],
        mfu=step["mfu"],
        **_parts({part: spent / 1e3 for part, spent in step["milliseconds"].items()}, step["step_seconds"]),
    )


def _of_profile(found: dict[str, Any], path: str) -> MeasuredStep:
    slice_ = found["slice"]
    if slice_["world_size"] != 1:
        raise UserError(
            f"--measured {path}: of {slice_['world_size']} ranks, whose exchanges are in it; profile with --nproc 1"
        )
    return MeasuredStep(
        source=path,
        device=found["device"],
        **{
            key: slice_[key]
            for key in ("layers", "parameters", "micro_batches", "micro_batch_size", "sequence_length", "recompute")
        },
        routing="learned",
        expert_ranks=1,
        stepped=slice_["parameters"],
        step_seconds=found["step_seconds"],
        tokens_per_second=found["tokens_per_second"],
        mfu=found["mfu"],
        **_parts(found["parts"], found["step_seconds"]),
    )


def _parts(parts: dict[str, float], step_seconds: float) -> dict[str, float]:
    """Kernels take as long under the profiler as without it; what is idle does not. Where they overlap they are
    scaled."""
    busy = sum(spent for part, spent in parts.items() if part != "idle")
    scale = min(1.0, step_seconds / busy)
    return {"head_seconds": parts["head"] * scale, "optimizer_seconds": parts["optimizer"] * scale}


def check_measured(measured: MeasuredStep, config: RunConfig, hardware: Hardware) -> None:
    """Raise UserError unless it is a step of this run's model, at its length, on this hardware."""
    model, length = config.model, config.mixture.sequence_length
    whole = model.model_copy(update={"num_layers": measured.layers}).num_parameters()
    if whole != measured.parameters:
        raise UserError(
            f"{measured.source}: {measured.layers} layers of it have {measured.parameters:,} parameters, of this run's "
            f"model {whole:,}; measure a slice of the same model"
        )
    if length != measured.sequence_length:
        raise UserError(
            f"{measured.source}: measured at {measured.sequence_length} tokens, and the run has {length}; measure at "
            "these"
        )
    if hardware.name.lower() not in measured.device.lower():
        raise UserError(
            f"{measured.source}: measured on {measured.device}, which is no {hardware.name}; name its hardware by --gpu"
        )


def assumptions(measured: MeasuredStep, hardware: Hardware) -> list[str]:
    """What is taken for granted between the measured step and the figures that follow from it."""
    experts = (
        f"the measured rank had its share of the experts, one of {measured.expert_ranks}; other divisions are left out"
        if measured.expert_ranks > 1
        else "the experts of a rank take as long for as many rows, whether all of them are there or a part, with more "
        "rows each; waiting for the numbers of rows that come is not counted"
    )
    routing = "every rank gets as many rows (balanced routing)"
    if measured.routing == "learned":
        routing = "every rank gets as many rows, though the measured routing, of the first weights, was uneven"
    return [
        f"a layer takes as long as the mean of the {measured.layers} measured, whatever their number on a GPU; "
        "embedding and idle time count as theirs; the last stage, which has the head as well, is the slowest",
        "the update takes time in proportion to the parameters that a rank updates",
        experts,
        routing,
        "micro-batch size and recomputation as measured, no tensor parallelism",
        *(
            f"{constant} {value.value:g}: {value.source}"
            for constant, value in (
                ("nvlink_gbs", hardware.nvlink_gbs),
                ("nvlink_efficiency", hardware.nvlink_efficiency),
                ("network_gbs", hardware.network_gbs),
                ("network_efficiency", hardware.network_efficiency),
            )
        ),
        "nothing hides the exchanges between expert ranks and pipeline stages, nor the gathering of weights; gradients "
        "are reduced behind two thirds of the last micro-batch",
    ]

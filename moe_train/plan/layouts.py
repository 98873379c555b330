"""`moe-train plan layout`: every legal layout of a run on some nodes, the fastest that fit first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_train.config import RunConfig
from moe_train.config_file import parse_override
from moe_train.errors import UserError
from moe_train.plan import shards
from moe_train.plan.activations import dispatch_bytes, logits_bytes, stage_bytes
from moe_train.plan.hardware import Constant, Hardware, load_hardware
from moe_train.plan.measured import MeasuredStep, assumptions, check_measured, read_measured
from moe_train.plan.memory import fp8_bytes, workload
from moe_train.plan.quantities import gib, table
from moe_train.plan.step_time import StepTime, model_flops_utilisation, step_time
from parallel.errors import LayoutError
from parallel.layout import Layout

RECOMPUTE = ("none", "selective", "full")
"""From the fastest to the smallest: the first that fits is taken."""

SEARCHED = {
    "parallel": ("tensor", "pipeline", "virtual_pipeline", "expert"),
    "training": ("micro_batch_size", "recompute"),
}
"""The keys of a run file that differ between layouts."""


@dataclass(frozen=True)
class Candidate:
    """A legal layout: its config, memory of the largest rank, and expected time."""

    config: RunConfig
    layout: Layout
    bytes: int
    bytes_worst: int
    time: StepTime
    mfu: float
    tokens_per_second_per_gpu: float

    def as_dict(self) -> dict[str, Any]:
        """Plain units; `patch` is what to change in the run file."""
        layout, training = self.layout, self.config.training
        patch = {
            "parallel": {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "virtual_pipeline": layout.virtual_pipeline,
                "expert": layout.expert,
            },
            "training": {"micro_batch_size": training.micro_batch_size, "recompute": training.recompute},
        }
        return {
            **{name: getattr(layout, name) for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "data")},
            **patch["training"],
            "bytes": self.bytes,
            "bytes_worst_case": self.bytes_worst,
            "bubble": self.time.bubble / self.time.seconds,
            "traffic_bytes": self.time.traffic,
            "step_seconds": self.time.seconds,
            "seconds": {
                name: getattr(self.time, name)
                for name in ("compute", "bubble", "tensor", "expert", "pipeline", "data", "update")
            },
            "mfu": self.mfu,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "patch": patch,
        }


def layout(
    run: str,
    overrides: list[str],
    *,
    nodes: int | None = None,
    gpu: str = "h100",
    calibrate: str | None = None,
    measured: str | None = None,
    contestant: str | None = None,
    routing: str | None = None,
    micro_batches: list[int] | None = None,
    best: int = 10,
    as_json: bool = False,
) -> None:
    """Print the `best` layouts of a run.

    Args:
        overrides: those of `SEARCHED` keys hold for all layouts, except with `calibrate`, whose run they describe.
        nodes: of `gpu`; None: those of the run file's section launch.
        calibrate: a metrics.jsonl (or a run's folder) of this run file, with its layout, on these nodes: the
            compute efficiency of the hardware file is replaced by the one that gives its step time.
        measured: a step of one GPU (`moe_train.plan.measured`) that takes the place of the modelled computation;
            `contestant` and `routing` are those of the benchmark; None: ours, balanced.
        micro_batches: micro-batch sizes to try; None: powers of two; the one measured.

    Raises an error with ``exit_code`` 2, one line; also when nothing fits.
    """
    from moe_train.plan.run_file import load_plan

    config, hardware = load_plan(run, overrides), load_hardware(gpu)
    world = (nodes or config.launch.nodes) * hardware.node_size
    held = held_keys(config, overrides) if calibrate is None else {}
    if "micro_batch_size" in held:
        if micro_batches:
            raise UserError("give --micro-batch or training.micro_batch_size, not both")
        micro_batches = [held.pop("micro_batch_size")]
    step = None
    if calibrate is not None:
        if measured is not None:
            raise UserError("give --calibrate or --measured, not both")
        hardware = calibrated(config, world, hardware, calibrate)
    if measured is not None:
        step = read_measured(measured, contestant or "ours", routing or "balanced")
        check_measured(step, config, hardware)
        if micro_batches not in (None, [step.micro_batch_size]):
            raise UserError(
                f"micro-batch size: the measured step has micro-batches of {step.micro_batch_size}; leave it out"
            )
        if held.get("recompute", step.recompute) != step.recompute:
            raise UserError(f"training.recompute: the measured step has {step.recompute}; leave it out")
        micro_batches = [step.micro_batch_size]
    elif contestant is not None or routing is not None:
        raise UserError(
            "--contestant and --routing choose from the file that --measured names; give that, or leave them out"
        )
    everything = list(candidates(config, world, hardware, micro_batches, step, held))
    fitting = sorted((c for c in everything if c.bytes <= hardware.usable_bytes), key=lambda c: c.time.seconds)
    if not fitting:
        raise UserError(
            f"none of {len(everything)} layouts of {world} {hardware.name} fits: the smallest needs"
            f" {gib(min((c.bytes for c in everything), default=0))} of {gib(hardware.usable_bytes)};"
            " take more nodes or a smaller model"
            if everything
            else f"no layout divides this run over {world} {hardware.name}; choose another"
            " training.global_batch_size, number of nodes"
            + (" or --micro-batch" if micro_batches else "")
            + (f", or leave out {' and '.join(held)}" if held else "")
        )
    answer = {
        "world_size": world,
        "gpu": hardware.name,
        "compute_efficiency": None if step else hardware.compute_efficiency.model_dump(),
        "measured": step.as_dict() if step else None,
        "assumptions": assumptions(step, hardware) if step else None,
        "legal": len(everything),
        "fitting": len(fitting),
        "best": [candidate.as_dict() for candidate in fitting[:best]],
    }
    print(json.dumps(answer) if as_json else render(answer))


def candidates(
    config: RunConfig,
    world: int,
    hardware: Hardware,
    micro_batches: list[int] | None = None,
    measured: MeasuredStep | None = None,
    held: dict[str, Any] | None = None,
) -> Iterator[Candidate]:
    """Every legal layout with the least recomputation that fits (full, where none does); with a `measured` step those
    that it can stand for; those alone that have what is `held` (of `SEARCHED`, by the last part of the key)."""
    batch, held = config.training.global_batch_size, held or {}
    sizes = micro_batches or [size for size in (1, 2, 4, 8, 16) if batch % size == 0]
    recomputations = [measured.recompute] if measured else [held["recompute"]] if "recompute" in held else RECOMPUTE
    for parallel in _divisions(config, world):
        if any(value != held.get(name, value) for name, value in parallel.items()):
            continue
        if measured and (parallel["tensor"] > 1 or measured.expert_ranks not in (1, parallel["expert"])):
            continue
        for size in sizes:
            try:
                changed = _changed(config, parallel, size, "none")
                shape = changed.layout(world)
            except (LayoutError, ValueError):
                continue
            for recompute in recomputations:
                candidate = evaluate(_changed(config, parallel, size, recompute), shape, hardware, measured)
                if candidate.bytes <= hardware.usable_bytes:
                    break
            yield candidate


def held_keys(config: RunConfig, overrides: list[str]) -> dict[str, Any]:
    """The last parts of the `SEARCHED` keys that `overrides` name, and their values in `config`."""
    held = {}
    for section, names in SEARCHED.items():
        for name in names:
            if any(parse_override(text)[0] == (section, name) for text in overrides):
                held[name] = getattr(getattr(config, section), name)
    if held.get("virtual_pipeline") == 1:
        held["virtual_pipeline"] = None  # as layouts have it
    return held


def evaluate(config: RunConfig, shape: Layout, hardware: Hardware, measured: MeasuredStep | None = None) -> Candidate:
    """Memory and time of one layout with the config's micro-batch size and recomputation."""
    training = config.training
    sharded = config.parallel.attention_experts == "sharded"
    work = workload(config, shape)
    count = work.count(training.global_batch_size)
    largest = [0, 0]
    first = ()
    for stage in sorted({0, shape.pipeline - 1}):
        buffers = shards.buffers(config.model, shape, stage, sharded)
        first = buffers if stage == 0 else first
        owned = (0 if training.precision == "fp32" else 4) + (0 if config.optimizer.offload else 8)
        state = sum(b.size * (work.element + 4) + b.size // b.ranks * owned for b, _ in buffers)
        state += fp8_bytes(config.model, shape, stage, training.precision, sharded)
        if stage == shape.pipeline - 1:
            state += logits_bytes(work)
        for index, worst in enumerate((False, True)):
            kept = stage_bytes(work, stage, count, training.recompute, worst) + dispatch_bytes(work, worst)
            largest[index] = max(largest[index], state + kept)
    time = step_time(work, hardware, first, count, training.recompute, measured)
    rate = config.tokens_per_step / time.seconds / shape.world_size
    mfu = model_flops_utilisation(config.model, work.sequence_length, rate, hardware)
    return Candidate(config, shape, largest[0], largest[1], time, mfu, rate)


def calibrated(config: RunConfig, world: int, hardware: Hardware, metrics: str) -> Hardware:
    """The hardware with the compute efficiency that gives the measured step time of this run and layout."""
    from scipy.optimize import brentq

    from moe_train.plan.cost import measured_rate

    shape = config.layout(world)
    measured = config.tokens_per_step / measured_rate(metrics)

    def with_efficiency(value: float) -> Hardware:
        source = f"calibrated by {metrics}: {measured:.4g} s a step on {world} GPUs"
        return hardware.model_copy(update={"compute_efficiency": Constant(value=value, source=source)})

    def excess(value: float) -> float:
        return evaluate(config, shape, with_efficiency(value)).time.seconds - measured

    least = 1e-6
    if excess(1.0) > 0 or excess(least) < 0:
        raise UserError(
            f"--calibrate {metrics}: {measured:.4g} s a step is {'less' if excess(1.0) > 0 else 'more'} than {world}"
            f" {hardware.name} could take; is it from this run file, layout and number of nodes?"
        )
    return with_efficiency(float(brentq(excess, least, 1.0, rtol=1e-12)))


def _divisions(config: RunConfig, world: int) -> Iterator[dict[str, int | None]]:
    """Sizes that divide what they must; the batch is checked by `RunConfig.layout`."""
    model = config.model
    for tensor in _divisors(model.attention.num_kv_heads):
        for pipeline in _divisors(model.num_layers):
            if world % (tensor * pipeline):
                continue
            data = world // (tensor * pipeline)
            for virtual in _divisors(model.num_layers // pipeline) if pipeline > 1 else [1]:
                for expert in _divisors(model.mlp.num_experts or model.attention.num_experts or 1):
                    if (tensor * data) % expert == 0:
                        yield {
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "virtual_pipeline": virtual if virtual > 1 else None,
                            "expert": expert,
                        }


def _changed(config: RunConfig, parallel: dict, micro_batch: int, recompute: str) -> RunConfig:
    training = config.training.model_copy(
        update={"micro_batch_size": micro_batch, "recompute": recompute, "batch_size_warmup": None}
    )
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel), "training": training})
    if training.global_batch_size % micro_batch:
        raise ValueError("does not divide")
    return changed


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def render(answer: dict[str, Any]) -> str:
    """The best layouts as a table, and the first as a patch of the run file."""
    import yaml

    columns = [
        "layout",
        "VPP",
        "EP",
        "DP",
        "micro-batch",
        "recompute",
        "memory",
        "bubble",
        "TP sent",
        "EP sent",
        "DP sent",
    ]
    columns += ["step", "MFU", "tokens/s/GPU"]
    rows = [
        [
            f"TP{row['tensor']} PP{row['pipeline']}",
            str(row["virtual_pipeline"] or 1),
            str(row["expert"]),
            str(row["data"]),
            str(row["micro_batch_size"]),
            row["recompute"],
            gib(row["bytes"]),
            f"{row['bubble']:.1%}",
            *(f"{row['traffic_bytes'][kind] / 1e9:.1f} GB" for kind in ("tensor", "expert", "data")),
            f"{row['step_seconds']:.2f} s",
            f"{row['mfu']:.1%}",
            f"{row['tokens_per_second_per_gpu']:,.0f}",
        ]
        for row in answer["best"]
    ]
    title = f"{answer['world_size']} {answer['gpu']}: {answer['fitting']} of {answer['legal']} legal layouts fit"
    if answer["measured"]:
        lines = [*_render_measured(answer), table(f"EXTRAPOLATED, measured by nobody: {title}", columns, rows)]
    else:
        efficiency = answer["compute_efficiency"]
        lines = [table(title, columns, rows)]
        lines.append(f"compute efficiency {efficiency['value']:.3f}: {efficiency['source']}")
    lines.append("the best as a patch of the run file (the micro-batch size is part of the arithmetic):")
    lines.append(yaml.safe_dump(answer["best"][0]["patch"], sort_keys=False).rstrip())
    return "\n".join(lines)


def _render_measured(answer: dict[str, Any]) -> list[str]:
    """What was measured, and what is assumed between it and what follows."""
    step = answer["measured"]
    share = f"one of {step['expert_ranks']} ranks' share of the experts, " if step["expert_ranks"] > 1 else ""
    mfu = f", MFU {step['mfu']:.1%}" if step["mfu"] is not None else ""
    return [
        f"MEASURED on one {step['device']} ({step['source']}):",
        f"  {step['layers']} layers, {share}{step['routing']} routing, {step['micro_batches']} micro-batches of"
        f" {step['micro_batch_size']} x {step['sequence_length']} tokens, recompute {step['recompute']}",
        f"  {step['step_seconds']:.4g} s a step, {step['tokens_per_second']:,.0f} tokens/s{mfu}",
        f"  of it a layer {1e3 * step['layer_seconds']:.3g} ms and the head"
        f" {1e3 * step['head_seconds'] / step['micro_batches']:.3g} ms of each micro-batch, the update"
        f" {1e3 * step['optimizer_seconds']:.3g} ms",
        "ASSUMED:",
        *(f"- {each}" for each in answer["assumptions"]),
    ]

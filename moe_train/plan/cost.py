"""`moe-train plan cost`: days, GPU-hours, money, energy and disk of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data_pipeline.units import format_count
from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.plan.hardware import Hardware, load_hardware
from moe_train.plan.quantities import part, positive, table
from moe_train.units import Duration, format_time

MEASURED_STEPS = 200
"""The last steps of a metrics.jsonl whose median throughput counts as measured."""


def cost(
    run: str,
    overrides: list[str],
    *,
    nodes: int | None = None,
    gpu: str = "h100",
    price: float = 2.0,
    mfu: float | None = None,
    tokens_per_second_per_gpu: float | None = None,
    metrics: str | None = None,
    as_json: bool = False,
) -> None:
    """Print what a run costs.

    Args:
        nodes: nodes of `gpu`; None: those of the run file's section launch.
        price: of one GPU for one hour.
        mfu, tokens_per_second_per_gpu, metrics: the speed (one of them): a part of the peak, a rate, or a
            metrics.jsonl that was measured on this many GPUs. Without any, what `plan layout` expects.

    Raises an error with ``exit_code`` 2, one line.
    """
    from moe_train.plan.run_file import load_plan

    config, hardware = load_plan(run, overrides), load_hardware(gpu)
    gpus = (nodes or config.launch.nodes) * hardware.node_size
    rate, basis = speed(config, hardware, gpus, mfu, tokens_per_second_per_gpu, metrics)
    answer = estimate(config, hardware, gpus, rate, positive(price, "--price"))
    if answer["mfu"] > 1:
        raise UserError(
            f"{rate:,.0f} tokens/s a GPU ({basis}) would be {answer['mfu']:.0%} of the peak of one {hardware.name};"
            " give the rate of one GPU, of this run's model"
        )
    answer["speed_from"] = basis
    print(json.dumps(answer) if as_json else render(answer))


def speed(
    config: RunConfig,
    hardware: Hardware,
    gpus: int,
    mfu: float | None,
    rate: float | None,
    metrics: str | None,
) -> tuple[float, str]:
    """(tokens per second per GPU, where that comes from)."""
    if sum(given is not None for given in (mfu, rate, metrics)) > 1:
        raise UserError("give one of --mfu, --tokens-per-second and --metrics")
    if rate is not None:
        return positive(rate, "--tokens-per-second"), "given"
    if metrics is not None:
        return measured_rate(metrics) / gpus, f"measured: {metrics}"
    flops = config.model.flops_per_token(config.mixture.sequence_length)
    if mfu is not None:
        return part(mfu, "--mfu") * hardware.peak_flops / flops, f"an MFU of {mfu:.1%}"
    from moe_train.plan.layouts import evaluate

    expected = evaluate(config, config.layout(gpus), hardware)
    return (
        expected.tokens_per_second_per_gpu,
        f"expected by `plan layout`'s model: an MFU of {expected.mfu:.1%}",
    )


def measured_rate(path: str) -> float:
    """Median tokens per second (of all GPUs) over the last steps of a metrics.jsonl, or of a run's folder."""
    import statistics

    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rates = [
            positive(json.loads(line)["tokens_per_second"], "tokens_per_second") for line in lines[-MEASURED_STEPS:]
        ]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a metrics.jsonl or a run's folder") from None
    except (ValueError, KeyError, TypeError, UserError):
        raise UserError(f"{file} is not a metrics.jsonl of a run: a line has no tokens_per_second over 0") from None
    if not rates:
        raise UserError(f"{file} holds no step yet; let the run take a few")
    return statistics.median(rates)


def estimate(config: RunConfig, hardware: Hardware, gpus: int, rate: float, price: float) -> dict[str, Any]:
    """Everything in plain units: hours, days, currency of `price`, kWh, bytes, tokens."""
    length = config.mixture.sequence_length
    steps, samples = config.training.end(config.mixture.num_samples, length)
    tokens = samples * length
    hours = tokens / (rate * gpus) / 3600
    flops = config.model.flops_per_token(length)
    phases, seen = [], 0
    for phase in config.mixture.phases:
        if seen < tokens:
            phases.append({"name": phase.name, "first_token": seen, "starts_after_days": seen / (rate * gpus) / 86400})
        seen += phase.tokens
    return {
        "gpus": gpus,
        "gpu": hardware.name,
        "tokens": tokens,
        "flops": flops * tokens,
        "tokens_per_second_per_gpu": rate,
        "mfu": rate * flops / hardware.peak_flops,
        "days": hours / 24,
        "gpu_hours": hours * gpus,
        "price_per_gpu_hour": price,
        "cost": hours * gpus * price,
        "kwh": hours * gpus * hardware.watts.value / 1000,
        "phases": phases,
        "checkpoints": _disk(config, steps, tokens),
    }


def _disk(config: RunConfig, steps: int, tokens: int) -> dict[str, int]:
    """How many checkpoints stay at the end of the run, and their bytes: weights, main copy and two
    moments."""
    per_element = 12 if config.training.precision == "fp32" else 14
    size = config.model.num_parameters() * per_element
    checkpoint = config.checkpoint

    def ran(unit: Duration) -> int:
        return tokens if unit.steps is None else steps

    written = max(1, -(-ran(checkpoint.interval) // checkpoint.interval.amount))
    kept = min(written, checkpoint.keep_last)
    if checkpoint.keep_every is not None:
        kept += ran(checkpoint.keep_every) // checkpoint.keep_every.amount
    kept = min(kept, written)
    return {"bytes_each": size, "written": written, "kept": kept, "bytes_kept": kept * size}


def render(answer: dict[str, Any]) -> str:
    """The estimate as two columns."""
    disk = answer["checkpoints"]
    rows = [
        ["run", f"{format_count(answer['tokens'])} tokens, {answer['flops']:.3g} operations"],
        ["on", f"{answer['gpus']} {answer['gpu']}"],
        ["speed", f"{answer['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, MFU {answer['mfu']:.1%}"],
        ["speed from", answer["speed_from"]],
        [
            "time",
            f"{answer['days']:.1f} days" if answer["days"] >= 1 else format_time(math.ceil(86400 * answer["days"])),
        ],
        ["GPU-hours", _amount(answer["gpu_hours"])],
        ["cost", f"{_amount(answer['cost'])} at {answer['price_per_gpu_hour']:g} a GPU-hour"],
        ["energy", f"{_amount(answer['kwh'])} kWh"],
        ["checkpoints", f"{disk['kept']} kept of {disk['written']}, {_size(disk['bytes_kept'])}"],
        ["one checkpoint", _size(disk["bytes_each"])],
    ]
    for phase in answer["phases"]:
        start = f"day {phase['starts_after_days']:.3g}, {format_count(phase['first_token'])} tokens"
        rows.append([f"phase {phase['name']} from", start])
    return table("cost", ["what", "value"], rows)


def _amount(value: float) -> str:
    """Whole numbers where there are many, three digits where there are few."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(size: int) -> str:
    """Bytes as disks are sold, in powers of 1000."""
    unit, factor = next((each for each in (("TB", 1e12), ("GB", 1e9)) if size >= each[1]), ("MB", 1e6))
    return f"{size / factor:.3g} {unit}"

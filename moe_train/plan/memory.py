"""`moe-train plan memory`: bytes of each rank, part by part, and whether the largest fits its GPU."""

from __future__ import annotations

import json
from typing import Any

from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.model.config import ModelConfig
from moe_train.plan import shards
from moe_train.plan.activations import Workload, dispatch_bytes, logits_bytes, stage_bytes
from moe_train.plan.hardware import Hardware, load_hardware
from moe_train.plan.quantities import gib, table
from moe_train.plan.shards import Place
from parallel.layout import Layout

ELEMENT = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Bytes of a weight and of an activation. fp8 keeps bf16 weights, and its products' inputs are not counted smaller."""
FP8_COPIES = 2
"""Bytes of the FP8 copies that are kept of a product's weight between the micro-batches of a step: it, and its
transpose."""


def state_bytes(
    model: ModelConfig,
    layout: Layout,
    place: Place,
    precision: str,
    *,
    sharded_attention: bool = True,
    overlap: bool = False,
) -> dict[str, int]:
    """Bytes of weights, of fp32 gradients, and of this rank's share of the optimizer's state.

    The state is two fp32 moments, and an fp32 copy of the weights unless they are fp32 themselves. With FP8 the weights
    include the copies of those that products take.
    """
    element = ELEMENT[precision]
    size = owned = 0
    for buffer, expert in shards.buffers(model, layout, place.stage, sharded_attention, overlap):
        size += buffer.size
        owned += buffer.owned(place.expert_data if expert else place.data)
    return {
        "weights": size * element + fp8_bytes(model, layout, place.stage, precision, sharded_attention),
        "gradients": size * 4,
        "optimizer": owned * (8 if precision == "fp32" else 12),
    }


def fp8_bytes(model: ModelConfig, layout: Layout, stage: int, precision: str, sharded_attention: bool) -> int:
    """Bytes of the FP8 copies of a rank's weights."""
    return FP8_COPIES * shards.product_elements(model, layout, stage, sharded_attention) if precision == "fp8" else 0


def workload(config: RunConfig, layout: Layout) -> Workload:
    """What goes through one rank of `layout` at a time."""
    training = config.training
    return Workload(
        config.model,
        layout,
        config.mixture.sequence_length,
        training.micro_batch_size,
        ELEMENT[training.precision],
        config.parallel.attention_experts == "sharded",
        config.parallel.dispatcher,
        config.parallel.in_turn,
        config.data.document_mask,
    )


PARTS = ("weights", "gradients", "optimizer", "activations", "dispatch", "logits")
"""What lies on the GPU at the peak; `snapshot` (of an asynchronous checkpoint) lies in the host's memory."""


def rank_bytes(config: RunConfig, layout: Layout, place: Place, *, overlap: bool = True) -> dict[str, int]:
    """Bytes of one rank by part, with balanced routing; ``worst`` is what all tokens going to its experts
    adds. ``overlap``: on a GPU, where gradients come in buckets and the head works on larger chunks."""
    training = config.training
    sharded = config.parallel.attention_experts == "sharded"
    work = workload(config, layout)
    count = work.count(training.global_batch_size)
    result = state_bytes(config.model, layout, place, training.precision, sharded_attention=sharded, overlap=overlap)
    kept = [stage_bytes(work, place.stage, count, training.recompute, worst) for worst in (False, True)]
    sent = [dispatch_bytes(work, worst) for worst in (False, True)]
    result["activations"], result["dispatch"] = kept[0], sent[0]
    device = "cuda" if overlap else "cpu"
    result["logits"] = logits_bytes(work, device) if place.stage == layout.pipeline - 1 else 0
    result["worst"] = kept[1] - kept[0] + sent[1] - sent[0]
    # A save copies the state that this rank owns and its range of the weights.
    per_element = 8 if training.precision == "fp32" else 12
    weights = result["optimizer"] // per_element * ELEMENT[training.precision]
    result["snapshot"] = result["optimizer"] + weights if config.checkpoint.async_save else 0
    if config.optimizer.offload is not None:  # the moments lie in the host's memory then
        result["optimizer"] -= result["optimizer"] // per_element * 8
    result["total"] = sum(result[part] for part in PARTS)
    result["total_worst"] = result["total"] + result["worst"]
    return result


def report(config: RunConfig, world_size: int, hardware: Hardware | None) -> dict[str, Any]:
    """Every distinct rank's bytes, the largest one, and whether it fits `hardware`."""
    layout = config.layout(world_size)
    ranks = [
        {
            "rank": place.rank,
            "stage": place.stage,
            **rank_bytes(config, layout, place, overlap=hardware is not None),
        }
        for place in shards.places(layout)
    ]
    largest = max(ranks, key=lambda row: row["total_worst"])
    answer: dict[str, Any] = {
        "world_size": world_size,
        "layout": vars(layout),
        "precision": config.training.precision,
        "recompute": config.training.recompute,
        "largest_rank": largest["rank"],
        "ranks": ranks,
    }
    if hardware is not None:
        answer["gpu"] = hardware.name
        answer["usable_bytes"] = hardware.usable_bytes
        answer["fits"] = largest["total"] <= hardware.usable_bytes
        answer["fits_worst_case"] = largest["total_worst"] <= hardware.usable_bytes
    return answer


def memory(
    run: str,
    overrides: list[str],
    *,
    nodes: int | None = None,
    nproc: int | None = None,
    gpu: str = "h100",
    as_json: bool = False,
) -> None:
    """Print the bytes of a run's ranks.

    Args:
        nodes: nodes of `gpu`; or
        nproc: ranks; neither: the nodes of the run file's section launch.
        gpu: a preset or file of hardware, or ``none`` (CPUs: nothing to fit into).

    Raises an error with ``exit_code`` 2, one line: a mistake in the run file, a layout that does not divide.
    """
    from moe_train.plan.run_file import load_plan

    config = load_plan(run, overrides)
    hardware = None if gpu == "none" else load_hardware(gpu)
    if nodes is not None and nproc is not None:
        raise UserError("give --nodes or --nproc, not both")
    per_node = hardware.node_size if hardware else 1
    world = nproc if nproc is not None else (nodes or config.launch.nodes) * per_node
    answer = report(config, world, hardware)
    print(json.dumps(answer) if as_json else render(answer))


def render(answer: dict[str, Any]) -> str:
    """One row a stage (its largest rank), and the verdict."""
    largest: dict[int, dict[str, Any]] = {}
    for row in answer["ranks"]:
        if row["total_worst"] > largest.get(row["stage"], {"total_worst": -1})["total_worst"]:
            largest[row["stage"]] = row
    columns = ["stage", "rank", *PARTS, "total", "worst case", "snapshot (host)"]
    rows = [
        [str(stage), str(row["rank"])] + [gib(row[part]) for part in (*PARTS, "total", "total_worst", "snapshot")]
        for stage, row in sorted(largest.items())
    ]
    layout = answer["layout"]
    title = f"largest rank of each stage: {answer['world_size']} ranks, tensor {layout['tensor']},"
    title += f" pipeline {layout['pipeline']}, expert {layout['expert']}, data {layout['data']},"
    title += f" {answer['precision']}, recompute {answer['recompute']}"
    lines = [table(title, columns, rows)]
    lines.append("worst case: every token of an expert group goes to the experts of one rank")
    if "fits" in answer:
        top = max(answer["ranks"], key=lambda row: row["total_worst"])
        usable = f"{gib(answer['usable_bytes'])} usable of one {answer['gpu']}"
        if answer["fits_worst_case"]:
            verdict = "fits, also in the worst case of routing"
        else:
            verdict = "fits with balanced routing, not in the worst case" if answer["fits"] else "does not fit"
        lines.append(f"{verdict}: rank {top['rank']} is the largest, {usable}")
    return "\n".join(lines)

"""How long before a time limit a run must be asked to save: a step, a checkpoint, and a margin."""

from __future__ import annotations

import math
from statistics import median

from launch.cluster import ClusterConfig
from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.training.run_folder import RunFolder, last_steps
from moe_train.units import format_time

BYTES_PER_PARAMETER = 16
"""Weight, main copy and two moments in fp32: the most that a checkpoint holds."""
UNKNOWN_STEP_SECONDS = 60.0
GPU_FLOPS = 150e12
"""A low guess of what a GPU reaches, for runs that have measured nothing yet."""
MARGIN_SECONDS = 60.0
"""The ranks agree to stop after a step; validation may be in the way; the job must still requeue itself."""


def checkpoint_bytes(config: RunConfig) -> int:
    """The size of one checkpoint, at most."""
    return config.model.num_parameters() * BYTES_PER_PARAMETER


def step_seconds(config: RunConfig, gpus: int) -> float:
    """What a step takes: measured by an earlier start in the run's folder, else estimated."""
    last = last_steps(RunFolder(config.output_dir).metrics_path, 100)
    measured = [line["step_seconds"] for line in last if line.get("step_seconds")]
    if measured:
        return median(measured)
    if not gpus:
        return UNKNOWN_STEP_SECONDS
    flops = config.model.flops_per_token(config.mixture.sequence_length) * config.tokens_per_step
    return flops / (gpus * GPU_FLOPS)


def lead_seconds(config: RunConfig, cluster: ClusterConfig, nodes: int, limit: float) -> int:
    """Seconds before the limit at which Slurm is to warn the job.

    Raises UserError when the job's time is too short for it.
    """
    if cluster.warning is not None:
        lead = math.ceil(cluster.warning)
    else:
        write = checkpoint_bytes(config) / (cluster.checkpoint_gigabytes_per_second * 1e9)
        lead = math.ceil((step_seconds(config, nodes * cluster.gpus_per_node) + write + MARGIN_SECONDS) / 30) * 30
    if lead >= limit:
        raise UserError(
            f"launch.time {format_time(limit)} leaves nothing to train in: saving takes {format_time(lead)} of it; "
            "give a longer --time, or set `warning` in the cluster file"
        )
    return lead

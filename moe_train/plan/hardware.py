"""A GPU and the node it sits in, from configs/hardware/NAME.yaml: each constant with its source."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.yaml_marks import read_yaml, validate
from moe_train.config_file import find_config, shown


class Constant(BaseModel):
    """A number and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float = Field(gt=0)
    source: str = Field(min_length=1)


class Hardware(BaseModel):
    """What a planner needs to know of a GPU. GB are 1e9 bytes, rates are of one GPU and one direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    peak_tflops: Constant
    memory_gb: Constant
    memory_usable: Constant
    memory_bandwidth_gbs: Constant
    gpus_per_node: Constant
    nvlink_gbs: Constant
    nvlink_efficiency: Constant
    network_gbs: Constant
    network_efficiency: Constant
    compute_efficiency: Constant
    watts: Constant

    @property
    def peak_flops(self) -> float:
        """Dense bf16 operations per second."""
        return self.peak_tflops.value * 1e12

    @property
    def usable_bytes(self) -> float:
        """Memory that tensors can have."""
        return self.memory_gb.value * 1e9 * self.memory_usable.value

    @property
    def node_size(self) -> int:
        return int(self.gpus_per_node.value)

    def bandwidth(self, ranks_apart: int) -> float:
        """Bytes per second between ranks of one group that spans `ranks_apart` consecutive GPUs."""
        if ranks_apart <= self.node_size:
            return self.nvlink_gbs.value * 1e9 * self.nvlink_efficiency.value
        return self.network_gbs.value * 1e9 * self.network_efficiency.value


def load_hardware(named: str | os.PathLike[str]) -> Hardware:
    """The hardware file at a path, or the preset of that name (``h100``). Raises an error of one line
    otherwise."""
    return validate(Hardware, read_yaml(shown(find_config(named, "hardware", Path.cwd()))))

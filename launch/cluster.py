"""The description of a cluster: `configs/cluster/*.yaml`. Needs no torch.

    cluster = load_cluster("h100_pyxis")            # a preset, or the path of a file
    cluster.tasks_per_node, cluster.container.image

`configs/cluster/h100_pyxis.yaml` is the reference: it has every key with a comment.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from data_pipeline.yaml_marks import PlacedError, read_yaml, validate
from moe_train.config_file import find_config, shown
from moe_train.training.config import Section
from moe_train.units import Seconds

_WORD = re.compile(r"[^\s\"'`$\\;#%]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _word(value: str) -> str:
    """What goes into a line of the batch script as it stands."""
    if not _WORD.fullmatch(value):
        raise ValueError(f"{value!r} cannot go into a batch script; leave out spaces, quotes and $ ; # % \\")
    return value


def _line(value: str) -> str:
    if "\n" in value or not value.strip():
        raise ValueError("must be one line that is not empty")
    return value


def _option(value: str) -> str:
    if not re.fullmatch(r"--?[A-Za-z][^\n]*", value):
        raise ValueError(f"{value!r} is not an option; write for example --mail-type=FAIL")
    return value


def _url(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s\"'\\]+", value):
        raise ValueError(f"{value!r} is not a URL; write https://...")
    return value


def _absolute(value: str) -> str:
    if not os.path.isabs(value):
        raise ValueError(f"{value!r} is not an absolute path; write it in full")
    return _line(value)


Word = Annotated[str, AfterValidator(_word)]
Line = Annotated[str, AfterValidator(_line)]
Option = Annotated[str, AfterValidator(_option)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]


class Container(Section):
    """A pyxis/enroot container in which the ranks run."""

    image: Line
    """An image file (.sqsh), or what enroot imports, such as ``nvcr.io#nvidia/pytorch:25.05-py3``."""
    mounts: list[Word] = []
    """``/on/the/host:/in/the/container[:ro]``; one path alone stands for both."""

    @field_validator("mounts")
    @classmethod
    def _are_mounts(cls, mounts: list[str]) -> list[str]:
        for number, mount in enumerate(mounts):
            parts = mount.split(":")
            if len(parts) > 3 or "," in mount or not all(part.startswith("/") for part in parts[:2]):
                message = f"{mount!r} is not a mount; write /on/the/host:/in/the/container, or one absolute path"
                raise PlacedError((number,), message)
        return mounts


class PreflightConfig(Section):
    """What every node is looked at for before each start."""

    timeout: Seconds = 180.0
    """How long a node may take to answer, and a test of the network to end."""
    free_gigabytes: float = Field(1.0, ge=0)
    """What the run's folder and the node's scratch must have."""
    clock_skew: Seconds = 5.0
    """How far a node's clock may be off the others'."""
    gigabytes_per_second: float | None = Field(None, gt=0)
    """Bus bandwidth that an all-reduce over all ranks must reach; null: it is measured and not judged."""


class ClusterConfig(Section):
    """A cluster: what its controller wants to hear, and what a process finds on its nodes."""

    name: Word
    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    sbatch: list[Option] = []
    """Further options for sbatch, such as ``--mail-type=FAIL``."""

    gpus_per_node: int = Field(0, ge=0)
    """0: nodes without GPUs, which run on CPUs."""
    gpu_type: Word | None = None
    """As the controller calls it (``h100``); null: any."""
    tasks_per_node: int = Field(0, ge=0)
    """Ranks on a node; 0: one a GPU, or one on nodes without."""
    cpus_per_task: int | None = Field(None, ge=1)
    memory: Word | None = None
    """Of a node, as Slurm writes it; ``"0"`` is all of it."""
    exclusive: bool = True
    """Whole nodes."""

    launcher: Literal["srun", "torchrun"] = "srun"
    """srun starts each rank as a task of its own: exit status and signals survive. torchrun starts one task a node."""
    container: Container | None = None
    modules: list[Word] = []
    venv: AbsolutePath | None = None
    python: Line | None = None
    """The interpreter; null: ``python`` in a container, a virtual environment or with modules, else the one that
    submits."""
    setup: list[Line] = []
    """Lines of shell that the batch script runs before the ranks."""
    env: dict[str, str] = {}
    scratch: AbsolutePath | None = None
    """A node's own disk: TMPDIR of the ranks."""

    preflight: PreflightConfig | None = PreflightConfig()
    """null: the nodes are not looked at."""

    alert_command: Line | None = None
    """A command line that gets one more argument, a message, when a run stops, fails, stalls or goes on."""
    alert_webhook: Annotated[str, AfterValidator(_url)] | None = None
    """A URL that gets ``{"text": message}`` by POST, as chat programs take it."""

    warning: Seconds | None = None
    """How long before the time limit a run is asked to save; null: from a step and a checkpoint of the run."""
    checkpoint_gigabytes_per_second: float = Field(2.0, gt=0)
    """What the shared disk takes when the whole run writes a checkpoint."""
    max_restarts: int = Field(3, ge=0)
    """Restarts after failures without a new checkpoint between them."""
    dollars_per_gpu_hour: float | None = Field(None, ge=0)
    """For `launch status`; of a node-hour where there are no GPUs."""

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not _NAME.fullmatch(name):
                raise PlacedError((name,), "is not the name of an environment variable")
            if "\n" in value:
                raise PlacedError((name,), "has a line break; write one line")
        return env

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, data: object) -> object:
        """Variables are text, and ``CUDA_DEVICE_MAX_CONNECTIONS: 1`` is how everybody writes them; so is ``memory:
        0``."""
        if isinstance(data, dict):
            data = dict(data)
            if isinstance(data.get("env"), dict):
                data["env"] = {
                    key: str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
                    for key, value in data["env"].items()
                }
            if type(data.get("memory")) is int:
                data["memory"] = str(data["memory"])
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if self.gpus_per_node and self.tasks_per_node not in (0, self.gpus_per_node):
            message = (
                f"{self.tasks_per_node} is not gpus_per_node {self.gpus_per_node}: a rank has one GPU; leave it out"
            )
            raise PlacedError(("tasks_per_node",), message)
        if self.gpu_type and not self.gpus_per_node:
            raise PlacedError(("gpu_type",), "needs gpus_per_node; give both or neither")
        if self.container and self.venv:
            raise PlacedError(
                ("venv",), "is not seen inside a container; install into the image, or leave container out"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        """Processes of the run on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def priced_units_per_node(self) -> int:
        """What `dollars_per_gpu_hour` is paid for: GPUs, or a node without."""
        return self.gpus_per_node or 1


def load_cluster(path: str | os.PathLike[str]) -> ClusterConfig:
    """The cluster file at `path`, or the preset of that name.

    Raises an error with ``exit_code`` 2, one line that names file, line, key and remedy.
    """
    return validate(ClusterConfig, read_yaml(shown(find_config(path, "cluster", Path.cwd()))))

"""What a job is made of: run, cluster, nodes and time, as the command line and the files say together."""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import ClusterConfig, load_cluster
from launch.lead import lead_seconds
from launch.mounts import inside
from launch.node import Settings
from moe_train.config import RunConfig, load_run
from moe_train.config_file import find_config, load_document
from moe_train.errors import UserError
from moe_train.units import parse_time

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LAUNCHER = re.compile(r"(--)?(output_dir=|launch\.|launch=)")


@dataclass(frozen=True)
class Job:
    """A run on a cluster, ready to be checked and rendered."""

    run_file: Path
    overrides: tuple[str, ...]
    config: RunConfig
    cluster: ClusterConfig
    nodes: int
    seconds: float
    """The time limit."""
    lead: int
    """Seconds before the limit at which the run is asked to save."""
    chain: int
    spares: int
    """Nodes that are allocated beyond `nodes`, to take the place of unfit ones."""
    submit_dir: Path
    strict: bool = True
    """False: a path that no mount brings into the container is written as it is, for somebody to read."""

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.nodes * self.cluster.ranks_per_node

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def notes(self) -> Path:
        """The launcher's own folder in the run's."""
        return self.run_dir / "launch"

    @property
    def script_path(self) -> Path:
        return self.notes / "job.sbatch"

    @property
    def name(self) -> str:
        """The job's name. Slurm runs jobs of one name one after another in a chain, so a chain's tells its folder from
        others."""
        name = re.sub(r"[^A-Za-z0-9_.+-]", "_", self.run_dir.name) or "run"
        return name if self.chain == 1 else f"{name}-{zlib.crc32(os.fsencode(self.run_dir)):08x}"

    @property
    def python(self) -> str:
        """The interpreter of the ranks."""
        cluster = self.cluster
        if cluster.python:
            return cluster.python
        return "python" if cluster.container or cluster.venv or cluster.modules else sys.executable

    def inside(self, path: Path) -> str:
        """Where the ranks find a path of this machine. Raises UserError when they do not, unless not `strict`."""
        try:
            return inside(str(path), self.cluster.container)
        except UserError:
            if self.strict:
                raise
            return str(path)

    def command(self) -> list[str]:
        """What each rank runs, in the container where there is one. Reads the files anew at every start."""
        run_file, output = (self.inside(path) for path in (self.run_file, self.run_dir))
        # Where it runs is settled by now, and the cluster file need not be visible to the ranks.
        overrides = [text for text in self.overrides if not _LAUNCHER.match(text)]
        # Quoted: an override's value is read as YAML, where " #" begins a remark.
        folder = f"output_dir={json.dumps(output, ensure_ascii=False)}"
        return ["-m", "moe_train", "pretrain", run_file, folder, "launch.cluster=null", *overrides]

    def preflight(self) -> list[str]:
        """What one task a node runs before the ranks; empty where the nodes are not to be looked at."""
        wanted = self.cluster.preflight
        if wanted is None:
            return []
        settings = Settings(
            nodes=self.nodes + self.spares,
            wanted=self.nodes,
            ranks_per_node=self.cluster.ranks_per_node,
            gpus=self.cluster.gpus_per_node,
            notes=self.inside(self.notes),
            run_dir=self.inside(self.run_dir),
            disks=(self.cluster.scratch or "/tmp",),
            free_gigabytes=wanted.free_gigabytes,
            clock_skew=wanted.clock_skew,
            gigabytes_per_second=wanted.gigabytes_per_second,
            timeout=wanted.timeout,
        )
        return ["-m", "launch.preflight", settings.to_json()]


def named_variables(run_file: Path, overrides: Sequence[str], config: RunConfig) -> dict[str, str]:
    """The environment variables that the run's YAML files and overrides name, with their values here."""
    files = {mark.file for mark in load_document(run_file, overrides).marks.values() if mark.line}
    texts = [Path(file).read_text(encoding="utf-8") for file in {*files, str(run_file), config.data.mixture}]
    names = {name for text in (*texts, *overrides) for name in _VARIABLE.findall(text)}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def load_job(
    run: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    time: str | None = None,
    chain: int = 1,
    spares: int = 0,
    strict: bool = True,
) -> Job:
    """The job of the run file `run` on the cluster that it names.

    Raises an error with ``exit_code`` 2, one line: a mistake in a file or an option, a layout that does not divide.
    """
    run_file = find_config(run, "run", Path.cwd()).resolve()
    config = load_run(run, overrides)
    if config.launch.cluster is None:
        raise UserError(f"{run}: launch.cluster is not set; add launch.cluster=h100 (a preset or a file of your own)")
    cluster = load_cluster(config.launch.cluster)
    nodes = nodes or config.launch.nodes
    try:
        seconds = parse_time(time) if time is not None else config.launch.time
    except ValueError as error:
        raise UserError(f"--time {time}: {error}") from None
    if not seconds or seconds < 60:
        raise UserError(f"{run}: launch.time is not set, or under a minute; add --time 12h")
    config.layout(nodes * cluster.ranks_per_node)
    if spares and cluster.preflight is None:
        raise UserError(
            f"--spares {spares}: {config.launch.cluster} has preflight: null, so nobody would know when to use them; "
            "remove that line"
        )
    return Job(
        run_file=run_file,
        overrides=tuple(overrides),
        config=config,
        cluster=cluster,
        nodes=nodes,
        seconds=seconds,
        lead=lead_seconds(config, cluster, nodes, seconds),
        chain=chain,
        spares=spares,
        submit_dir=Path.cwd(),
        strict=strict,
    )

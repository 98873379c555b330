"""What can be checked before a node is allocated: the run itself, its files seen through the mounts, the disk, the
folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.mixture import MixtureConfig
from data_pipeline.storage import is_remote
from launch.cluster import Container
from launch.job import Job
from launch.lead import checkpoint_bytes
from launch.mounts import inside, outside
from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.training.preflight import check_run, completion


def problems(job: Job) -> Iterator[str]:
    """What would stop the run later, a line each, the cheapest to mend first."""
    yield from _visible(job)
    yield from _environment(job)
    yield from _disk(job)
    try:
        config = seen_from_here(job.config, job.cluster.container)
        check_run(config, job.ranks, "auto")
    except Exception as error:
        if not isinstance(getattr(error, "exit_code", None), int):
            raise
        yield str(error)
    done = completion(job.config)
    if done:
        yield done


def seen_from_here(config: RunConfig, container: Container | None) -> RunConfig:
    """`config` with the paths of its mixture as this machine sees them: through the mounts of the container.

    Raises UserError for a path that no mount brings into the container.
    """
    if container is None:
        return config
    mixture = config.mixture
    sources = {
        name: source.model_copy(update={"paths": [_host(path, container) for path in source.paths]})
        for name, source in mixture.sources.items()
    }
    tokenizer = _host(mixture.tokenizer, container) if mixture.tokenizer else None
    seen: MixtureConfig = mixture.model_copy(update={"sources": sources, "tokenizer": tokenizer})
    copy = config.model_copy()
    vars(copy)["mixture"] = seen  # where the cached property keeps what it read
    return copy


def _host(path: str, container: Container) -> str:
    if is_remote(path):
        return path
    found = outside(path, container)
    if found is not None:
        return found
    inside(path, container)  # a relative path of the mixture: named from the host's side; raises where no mount has it
    return path


def _visible(job: Job) -> Iterator[str]:
    container = job.cluster.container
    for path in (job.run_file, Path(job.config.data.mixture), job.run_dir, job.submit_dir):
        try:
            inside(str(path), container)
        except UserError as error:
            yield str(error)


def _environment(job: Job) -> Iterator[str]:
    cluster = job.cluster
    if cluster.container:
        image = cluster.container.image
        if image.startswith("/") and not os.path.exists(image):
            yield f"container.image {image}: there is no such file; build it, or name another in the cluster file"
        for mount in cluster.container.mounts:
            host = mount.partition(":")[0]
            if not os.path.exists(host):
                yield f"container.mounts: {host} does not exist on this machine; correct the cluster file"
    if cluster.venv and not os.path.exists(os.path.join(cluster.venv, "bin", "python")):
        yield f"venv {cluster.venv} has no bin/python; create it, or name another in the cluster file"
    if job.python.startswith("/") and not cluster.container and not os.access(job.python, os.X_OK):
        yield f"python {job.python} cannot be run; name another in the cluster file"


def _disk(job: Job) -> Iterator[str]:
    folder = job.run_dir
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        yield f"output_dir {job.run_dir} cannot be written; choose another"
        return
    kept = (job.config.checkpoint.keep_last or 1) + 1  # one is written before the oldest goes
    there = sum(1 for _ in (job.run_dir / "checkpoints").glob("iter_*"))
    need = max(1, kept - there) * checkpoint_bytes(job.config)
    free = shutil.disk_usage(folder).free
    if free < need:
        yield (
            f"output_dir {job.run_dir}: {free / 1e9:.0f} GB are free and checkpoints need up to {need / 1e9:.0f} GB; "
            "make room, choose another folder, or lower checkpoint.keep_last"
        )

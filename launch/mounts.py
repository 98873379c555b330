"""Paths on the host and in the container: which is which, by the container's mounts.

The run file, its mixture and the run's folder are named as the host sees them (they were found there); what a mixture
names is looked for inside the container.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from launch.cluster import Container
from moe_train.errors import UserError


def mounts(container: Container) -> list[tuple[str, str]]:
    """(host, container) of each mount, the most specific first."""
    pairs = []
    for mount in container.mounts:
        host, _, rest = mount.partition(":")
        pairs.append((host, rest.partition(":")[0] or host))
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def inside(path: str, container: Container | None) -> str:
    """Where a path of the host is in the container.

    Raises UserError when no mount shows it there.
    """
    if container is None:
        return path
    found = _moved(path, mounts(container))
    if found is None:
        shown = ", ".join(container.mounts) or "none"
        raise UserError(
            f"{path} is not visible in the container; mount its folder in the cluster file (mounts: {shown})"
        )
    return found


def outside(path: str, container: Container | None) -> str | None:
    """Where a path of the container is on the host; None where it belongs to the image, which cannot be looked into."""
    if container is None:
        return path
    pairs = [(target, host) for host, target in mounts(container)]
    return _moved(path, sorted(pairs, key=lambda pair: -len(pair[0])))


def _moved(path: str, pairs: list[tuple[str, str]]) -> str | None:
    for source, target in pairs:
        try:
            return str(PurePosixPath(target) / PurePosixPath(path).relative_to(source))
        except ValueError:
            continue
    return None

"""Whether all ranks are of one run. Each reads the run file and the mixture for itself, and a node may see an old state
of a file that was just edited: nothing in the arithmetic would tell."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import xxhash

from moe_train.errors import HardwareError

if TYPE_CHECKING:
    from parallel.topology import Topology

_NAMED = 8


def check_agreement(topology: Topology, texts: Mapping[str, str]) -> None:
    """Compare ``texts`` (what it is: all of it) of every rank with rank 0's; all ranks call this together.

    Raises:
        HardwareError: on all ranks, where some differ; names them.
    """
    mine = {name: xxhash.xxh3_128_hexdigest(text.encode()) for name, text in texts.items()}
    found = topology.gather((socket.gethostname(), mine))
    host, theirs = found[0]
    for name in texts:
        others = [f"{rank} on {at}" for rank, (at, hashes) in enumerate(found) if hashes[name] != theirs[name]]
        if others:
            more = f" and {len(others) - _NAMED} more" * (len(others) > _NAMED)
            raise HardwareError(
                f"{name}: rank {', '.join(others[:_NAMED])}{more} found another one than rank 0 on {host}; "
                "another start reads it anew. A ${VARIABLE} in a file must have one value on all nodes"
            )

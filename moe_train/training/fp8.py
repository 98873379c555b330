"""Whether a run that asked for FP8 gets it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_train.training.recorder import Recorder
from parallel.errors import EngineError
from parallel.topology import Topology
from parallel.transformer_engine import counted_products


@contextmanager
def proven_fp8(topology: Topology, recorder: Recorder) -> Iterator[None]:
    """Count the FP8 products of a step that is taken inside, and record them. Every rank calls it.

    Raises:
        EngineError: on some rank none of its products ran in FP8.
    """
    with counted_products() as products:
        yield
    ranks = topology.gather((products.fp8, products.total))
    without = [rank for rank, (fp8, _) in enumerate(ranks) if fp8 == 0]
    if without:
        raise EngineError(f"training.precision: fp8, but no matrix product of rank {without[0]} ran in FP8; set bf16")
    fp8, total = (sum(column) for column in zip(*ranks))
    recorder.fp8(fp8, total)

"""Which ranks read tokens: those whose stage looks at them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_train.training.trainer import Trainer


@pytest.mark.parametrize(
    ("stage", "stages", "document_end", "reads"),
    [(0, 1, None, True), (0, 4, None, True), (1, 4, None, False), (3, 4, None, True), (2, 4, 2, True)],
)
def test_the_ends_of_a_pipeline_and_masked_documents(stage: int, stages: int, document_end, reads: bool) -> None:
    topology = SimpleNamespace(pipeline_rank=stage, is_last_pipeline_rank=stage == stages - 1)
    rank = SimpleNamespace(topology=topology, config=SimpleNamespace(document_end=document_end))
    assert Trainer.needs_tokens.fget(rank) is reads

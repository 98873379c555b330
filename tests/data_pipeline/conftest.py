"""Small corpora of random tokens for the tests of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import numpy as np
import pytest

from data_pipeline.indexed import IndexedWriter
from data_pipeline.mixture import MixtureConfig

VOCAB = 500


def write_corpus(prefix: str | Path, tokens: int, seed: int = 0, dtype: type = np.uint16, vocab: int = VOCAB) -> str:
    """A corpus of exactly `tokens` random tokens in documents of 1 to 99."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype) as writer:
        while writer.num_tokens < tokens:
            writer.add(random.integers(0, vocab, min(int(random.integers(1, 100)), tokens - writer.num_tokens)))
    return str(prefix)


@pytest.fixture
def make_mixture(tmp_path: Path) -> Callable[..., MixtureConfig]:
    """make_mixture(a=5000, b=700, phases=[...], ...) writes the corpora a and b and returns their mixture."""

    def make(phases: list | None = None, sequence_length: int = 16, seed: int = 7, max_epochs: dict | None = None, **sizes: int):
        for number, (name, tokens) in enumerate(sizes.items()):
            if not (tmp_path / f"{name}.bin").exists():
                write_corpus(tmp_path / name, tokens, seed=number + 1)
        sources = {name: {"paths": [str(tmp_path / f"{name}.bin")], "max_epochs": (max_epochs or {}).get(name)} for name in sizes}
        weights = {name: 1 for name in sizes}
        return MixtureConfig(
            sequence_length=sequence_length,
            seed=seed,
            sources=sources,
            phases=phases or [{"name": "main", "tokens": 16 * 1000, "weights": weights}],
        )

    return make

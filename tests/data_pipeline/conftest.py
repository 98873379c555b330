"""Fixtures: mixtures over small corpora."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.mixture import MixtureConfig
from tests.data_pipeline.corpora import write_corpus


@pytest.fixture
def make_mixture(tmp_path: Path) -> Callable[..., MixtureConfig]:
    """make_mixture(phases, a=5000, b=700) writes corpora a and b of so many tokens and returns their
    mixture."""

    def make(phases: list, sequence_length: int = 16, seed: int = 7, max_epochs: dict | None = None, **sizes: int):
        for name, tokens in sizes.items():
            if not (tmp_path / f"{name}.bin").exists():
                write_corpus(tmp_path / name, tokens, seed=sum(name.encode()))
        limits = max_epochs or {}
        sources = {name: {"paths": [str(tmp_path / f"{name}.bin")], "max_epochs": limits.get(name)} for name in sizes}
        return MixtureConfig(sequence_length=sequence_length, seed=seed, sources=sources, phases=phases)

    return make

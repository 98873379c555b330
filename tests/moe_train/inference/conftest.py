"""One small checkpoint that the tests of this folder use."""

from __future__ import annotations

import pytest

from tests.small_checkpoint import random_weights, small_config, write_checkpoint, write_tokenizer


@pytest.fixture(scope="package")
def weights():
    return random_weights(small_config())


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory, weights):
    """Its tokenizer has one id less than the model."""
    folder = tmp_path_factory.mktemp("inference")
    return write_checkpoint(folder / "checkpoint", small_config(), weights, write_tokenizer(folder))

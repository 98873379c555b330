"""Scoring and generating with the other families: the cache changes nothing, nor does the layout."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inference_on_ranks import Request, answer
from tests.small_checkpoint import random_weights, write_checkpoint
from tests.small_models import llama, olmoe

PROMPT = [5, 30, 17, 17, 45]
REQUESTS = [
    Request(PROMPT),
    Request(PROMPT, use_cache=False),
    Request(PROMPT, temperature=1.3, top_p=0.9, seed=3),
    Request(PROMPT, temperature=1.3, top_p=0.9, seed=3, use_cache=False),
]
LAYOUTS = {"llama": ["parallel.tensor=2"], "olmoe": ["parallel.tensor=2", "parallel.expert=2"]}


@pytest.mark.parametrize("make", [llama, olmoe], ids=["llama", "olmoe"])
def test_the_cache_and_the_layout_change_nothing(ranks, tmp_path, make):
    from parallel import engine

    config = make(num_layers=2)
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint", config, random_weights(config)))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 14)).astype(np.int32)
    nll, texts = answer(checkpoint, [], ids, REQUESTS)
    engine.stop()
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]
    for overrides in (LAYOUTS[make.__name__], ["parallel.pipeline=2"]):
        answers = ranks(2).run("tests.inference_on_ranks:answer", checkpoint, overrides, ids, REQUESTS)
        for scores, continuations in answers:
            np.testing.assert_allclose(scores, nll, atol=5e-5)
            assert continuations == texts

"""Scoring and generating as every rank of a test's pool does it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on with it."""

    prompt: list[int]
    max_tokens: int = 12
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos_id: int | None = None
    known_ids: int | None = None
    use_cache: bool = True


def answer(
    checkpoint: str, overrides: list[str], ids: np.ndarray, requests: list[Request]
) -> tuple[np.ndarray, list[list[int]]]:
    """The negative log-likelihoods of ``ids`` and the continuations of ``requests``, on one layout."""
    from moe_train.inference.generate import continue_ids
    from moe_train.inference.sampling import Sampler
    from moe_train.inference.score import score_ids
    from moe_train.inference.session import load_session, plan
    from parallel import engine

    planned = plan(checkpoint, None, overrides)
    session = load_session(planned, engine.start(planned.config.layout(planned.model, planned.world_size), seed=0))
    texts = [
        continue_ids(
            session,
            request.prompt,
            request.max_tokens,
            Sampler(request.temperature, request.top_p, request.seed),
            request.eos_id,
            request.known_ids,
            use_cache=request.use_cache,
        )
        for request in requests
    ]
    return score_ids(session, ids), texts

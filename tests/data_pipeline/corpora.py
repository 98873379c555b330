"""Small corpora of random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.indexed import IndexedWriter

VOCAB = 500


def write_corpus(prefix: str | Path, tokens: int, seed: int = 0, dtype: type = np.uint16, vocab: int = VOCAB) -> str:
    """A corpus of exactly `tokens` random tokens in documents of 1 to 99."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype) as writer:
        while writer.num_tokens < tokens:
            length = min(int(random.integers(1, 100)), tokens - writer.num_tokens)
            writer.add(random.integers(0, vocab, length))
    return str(prefix)


def text(seed: int, words: int = 60) -> str:
    """A few lines of made-up words, for tokenizers."""
    random = np.random.default_rng(seed)
    syllables = ["ka", "to", "mi", "ren", "sol", "va", "du", "pel", "or", "is"]
    made = ["".join(random.choice(syllables, int(random.integers(1, 4)))) for _ in range(words)]
    return "\n".join(" ".join(made[i : i + 9]) + f" = {i * seed};" for i in range(0, words, 9))

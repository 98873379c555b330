"""Held-out text of a source: fixed windows, spread evenly, that training never reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import DataError
from data_pipeline.indexed import IndexedReader
from data_pipeline.mixture import HELDOUT, MixtureConfig
from data_pipeline.sources import Manifests, manifest_file


class HeldOut:
    """The held-out shards of one source.

    Attributes: ``name``, ``num_tokens``, ``unigram_entropy`` (nats per token of the source's training text,
    by its manifest; None without one: what a model's loss must go below to have learnt anything but
    frequencies).
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[IndexedReader],
        sequence_length: int,
        unigram_entropy: float | None,
        vocab_size: int | None = None,
    ) -> None:
        self.name, self.unigram_entropy, self.vocab_size = name, unigram_entropy, vocab_size
        self.sequence_length = sequence_length
        self.shards = [shard for shard in shards if shard.num_tokens]
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self._windows = [(shard, max(0, shard.num_tokens - 1) // sequence_length) for shard in self.shards]
        self.num_windows = sum(count for _, count in self._windows)

    def windows(self, samples: int) -> np.ndarray:
        """int64[min(samples, num_windows), S + 1]: the same windows whenever it is asked for as many."""
        wanted = min(samples, self.num_windows)
        rows = [self._window(i * self.num_windows // wanted) for i in range(wanted)]
        return np.stack(rows) if rows else np.empty((0, self.sequence_length + 1), np.int64)

    def _window(self, number: int) -> np.ndarray:
        for shard, count in self._windows:
            if number < count:
                tokens = shard.tokens(number * self.sequence_length, self.sequence_length + 1).astype(np.int64)
                if self.vocab_size is not None and int(tokens.max()) >= self.vocab_size:
                    raise DataError(
                        f"source {self.name!r}: {shard.prefix}.bin holds token id {tokens.max()} "
                        f"but the vocabulary has {self.vocab_size} ids; prepare it with the tokenizer of this mixture"
                    )
                return tokens
            number -= count
        raise IndexError(number)


def open_heldout(mixture: MixtureConfig, vocab_size: int | None = None) -> dict[str, HeldOut]:
    """The held-out text of every source that has any (``PREFIX.heldout.bin`` by a shard), by name."""
    found = {}
    storage.forget()
    for name in mixture.sources:
        prefixes, manifests, shards = mixture.shards(name), Manifests(), []
        for prefix in prefixes:
            path = prefix + HELDOUT + ".bin"
            if storage.exists(path):
                manifest = manifests.of(prefix)
                shards.append(IndexedReader(path, entry=manifest_file(manifest, path) if manifest else None))
        if any(shard.num_tokens for shard in shards):
            entropy = source_entropy(prefixes, manifests)
            found[name] = HeldOut(name, shards, mixture.sequence_length, entropy, vocab_size)
    return found


def source_entropy(prefixes: Sequence[str], manifests: Manifests) -> float | None:
    """Unigram entropy of the training text of several shards, nats per token; None when a manifest is
    missing.

    The mean over shards, weighted by tokens: exact for one shard, at most the entropy of the whole for
    several.
    """
    weights, values = [], []
    for prefix in prefixes:
        split = ((manifests.of(prefix) or {}).get("splits") or {}).get("train")
        if split is None:
            return None
        weights.append(split["tokens"])
        values.append(split["unigram_entropy"])
    return float(np.average(values, weights=weights)) if sum(weights) else None

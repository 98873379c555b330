"""The last step of `prepare`: from the buckets to shards of bounded size and their manifest."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import spool as spooling
from data_pipeline.indexed import IndexedWriter, publish
from data_pipeline.mixture import HELDOUT
from data_pipeline.spool import Spool, write_safely

MANIFEST_VERSION = 1
_BATCH_TOKENS = 1 << 22


@dataclass
class SplitReport:
    """One of the two parts of a corpus."""

    documents: int = 0
    tokens: int = 0
    unigram_entropy: float = 0.0
    """Nats per token of the split's own token frequencies: the loss of a model that knows nothing but
    them."""


class Split:
    """The shards of one part of the corpus, written one after another under partial names.

    Args:
        prefix_of: the prefix of shard i.
        shard_tokens: a shard is full when the next document would make it larger; None: one shard.
        state: what `save` gave, to go on from there.
    """

    def __init__(
        self,
        prefix_of: Callable[[int], str],
        dtype: np.dtype,
        vocab_size: int,
        shard_tokens: int | None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._prefix_of, self._dtype, self._shard_tokens = prefix_of, dtype, shard_tokens
        state = state or {"counts": [0] * vocab_size, "total": [0, 0, 0], "files": {}, "shards": 0, "last": [0, 0]}
        self.counts = np.array(state["counts"], np.int64)
        self.documents, self.tokens, self.text_bytes = state["total"]
        self.files: dict[str, dict[str, Any]] = state["files"]
        self._shards: int = state["shards"]  # finished ones
        self._writer: IndexedWriter | None = None
        if state["last"] is not None:
            self._writer = IndexedWriter(prefix_of(self._shards), dtype, tuple(state["last"]))

    def save(self) -> dict[str, Any]:
        """Make safe what is written; plain data from which another process can go on."""
        return {
            "counts": self.counts.tolist(),
            "total": [self.documents, self.tokens, self.text_bytes],
            "files": self.files,
            "shards": self._shards,
            "last": self._writer.sync() if self._writer else None,
        }

    def add(self, records: np.ndarray, starts: np.ndarray, tokens: np.ndarray) -> None:
        """Append documents: slices of `tokens`."""
        for first, last in self._pieces(records["length"]):
            lengths, begins = records["length"][first:last].tolist(), starts[first:last].tolist()
            ids = np.concatenate([tokens[b : b + n] for b, n in zip(begins, lengths, strict=True)])
            self._writer.add_many(ids, lengths)
            self.counts += np.bincount(ids, minlength=len(self.counts))
            self.documents += last - first
            self.tokens += len(ids)
        self.text_bytes += int(records["text_bytes"].sum())

    def _pieces(self, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
        """Ranges of documents that go into one shard, none of many tokens; full shards are closed between."""
        ends, first = np.cumsum(lengths), 0
        while first < len(lengths):
            before = int(ends[first] - lengths[first])
            room = _BATCH_TOKENS
            if self._shard_tokens is not None:
                left = self._shard_tokens - self._writer.num_tokens
                if lengths[first] > left and self._writer.num_tokens:
                    self._next_shard()
                    continue
                room = min(room, left)
            last = max(first + 1, int(np.searchsorted(ends, before + room, side="right")))
            yield first, last
            first = last

    def _next_shard(self) -> None:
        self.finish()
        self._writer = IndexedWriter(self._prefix_of(self._shards), self._dtype)

    def finish(self) -> None:
        """Complete the current shard, on disk, if that was not done."""
        if self._writer is None:
            return
        documents, tokens = self._writer.num_documents, self._writer.num_tokens
        for path, facts in self._writer.finish().items():
            more = {"documents": documents, "tokens": tokens} if path.endswith(".bin") else {}
            self.files[os.path.basename(path)] = facts | (more if self._shard_tokens is not None else {})
        self._shards += 1
        self._writer = None

    def publish(self) -> None:
        """Give every shard its name."""
        for number in range(self._shards):
            publish(self._prefix_of(number))

    def abandon(self) -> None:
        """Let go of the current shard."""
        if self._writer is not None:
            self._writer.abandon()

    def report(self) -> SplitReport:
        return SplitReport(self.documents, self.tokens, unigram_entropy(self.counts))

    def describe(self) -> dict[str, Any]:
        """The split in the manifest."""
        return vars(self.report()) | {"files": self.files}


def unigram_entropy(counts: np.ndarray) -> float:
    """Nats per token of the distribution that `counts` (int[vocab_size]) describe."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    total = seen.sum()
    return math.fsum((-(seen / total) * np.log(seen / total)).tolist())


class Corpus:
    """The files of a corpus while the buckets are emptied into them. What is done is noted in the spool's folder from
    time to time; after a kill the next start goes on from there.

    Attributes: ``train``, ``heldout`` (None without a held-out split), ``duplicates`` (documents dropped).
    """

    def __init__(
        self,
        prefix: str,
        dtype: np.dtype,
        vocab_size: int,
        spool: Spool,
        *,
        holdout: float,
        shard_tokens: int | None,
        dedup: bool,
    ) -> None:
        self.prefix, self._limit, self._dedup, self._spool = prefix, int(holdout * 2**64), dedup, spool
        sharded = shard_tokens is not None
        shard: Callable[[int], str] = lambda i: f"{prefix}-{i:05d}" if sharded else prefix  # noqa: E731
        state = self._read_state() or {}
        splits = state.get("splits", {})
        self.train = Split(shard, dtype, vocab_size, shard_tokens, splits.get("train"))
        # a held-out split is small: one file, beside the first shard
        held: Callable[[int], str] = lambda _: shard(0) + HELDOUT  # noqa: E731
        self.heldout = Split(held, dtype, vocab_size, None, splits.get("heldout")) if holdout else None
        self.duplicates: int = state.get("duplicates", 0)
        self._emptied: int = state.get("emptied", 0)  # buckets
        self._saved = time.monotonic()

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train} | ({"heldout": self.heldout} if self.heldout else {})

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self._state.exists():
            for split in self.splits.values():
                split.abandon()

    @property
    def _state(self) -> Path:
        return self._spool.folder / "assembly.json"

    def _read_state(self) -> dict[str, Any] | None:
        """What an earlier start noted; None where there is nothing, or not all of its files: it is then begun anew."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            folder = os.path.dirname(self.prefix)
            for split in state["splits"].values():
                for name, facts in split["files"].items():
                    path = os.path.join(folder, name)
                    partial = path + ".partial"
                    if os.path.getsize(partial if os.path.exists(partial) else path) != facts["bytes"]:
                        raise ValueError(name)
            return state
        except (OSError, ValueError, KeyError):
            self._state.unlink(missing_ok=True)
            for path in existing(self.prefix, partial=True):
                os.unlink(path)
            return None

    def _save(self) -> None:
        splits = {name: split.save() for name, split in self.splits.items()}
        write_safely(self._state, {"emptied": self._emptied, "duplicates": self.duplicates, "splits": splits})
        self._saved = time.monotonic()

    def fill(self) -> None:
        """Write every document of the spool, in order."""
        for number in range(self._emptied, self._spool.buckets):
            for records, starts, tokens in self._spool.bucket(number):
                self._add(records, starts, tokens)
            self._emptied = number + 1
            if time.monotonic() - self._saved > spooling.CHECKPOINT_SECONDS:
                self._save()

    def _add(self, records: np.ndarray, starts: np.ndarray, tokens: np.ndarray) -> None:
        if self._dedup:
            _, firsts = np.unique(records["hash"], axis=0, return_index=True)
            self.duplicates += len(records) - len(firsts)
            keep = np.sort(firsts)
            records, starts = records[keep], starts[keep]
        held = records["hash"][:, 0] < np.uint64(self._limit)
        if self.heldout is not None:
            self.heldout.add(records[held], starts[held], tokens)
            records, starts = records[~held], starts[~held]
        self.train.add(records, starts, tokens)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Publish the shards and, last, the manifest; what an earlier corpus of the name left goes."""
        for split in self.splits.values():
            split.finish()
        self._save()  # from here on shards may have their names already
        counts = sum(split.counts for split in self.splits.values())
        manifest = {
            "format_version": MANIFEST_VERSION,
            "documents": sum(split.documents for split in self.splits.values()),
            "tokens": sum(split.tokens for split in self.splits.values()),
            "bytes": sum(split.text_bytes for split in self.splits.values()),
            "max_token_id": int(np.flatnonzero(counts).max()),
            "splits": {name: split.describe() for name, split in self.splits.items()},
            **manifest,
        }
        target = Path(self.prefix + ".manifest.json")
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        target.unlink(missing_ok=True)
        names = {name for split in self.splits.values() for name in split.files}
        for path in existing(self.prefix):
            if os.path.basename(path) not in names:
                os.unlink(path)
        for split in self.splits.values():
            split.publish()
        os.replace(partial, target)


def existing(prefix: str, partial: bool = False) -> list[str]:
    """The files of a corpus of this name that are there, the manifest first; or the unfinished ones."""
    folder, name = os.path.split(os.path.abspath(prefix))
    if not os.path.isdir(folder):
        return []
    end = re.escape(".partial") if partial else ""
    shard = re.compile(re.escape(name) + rf"(-\d{{5}})?({re.escape(HELDOUT)})?\.(bin|idx){end}")
    found = sorted(entry for entry in os.listdir(folder) if shard.fullmatch(entry))
    if not partial and os.path.exists(prefix + ".manifest.json"):
        found.insert(0, name + ".manifest.json")
    return [os.path.join(os.path.dirname(prefix), entry) for entry in found]

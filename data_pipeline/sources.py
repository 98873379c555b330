"""A source: one corpus, any number of shards on disk or on an object store, read in windows of
sequence_length + 1 tokens.

With T tokens in all and sequences of S tokens, every epoch has W = floor((T - 1) / S) windows. Window w of an
epoch starts at token (shift + w * S) mod T, wrapping at the end, with the shift drawn for each epoch: so
epochs cut the text at different places, and every window comes once an epoch. The order in which windows come
is `data_pipeline.order`; which sample gets which is the ledger's.
"""

from __future__ import annotations

import bisect
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline import order, storage
from data_pipeline.catalogue import Allowance, Catalogue, catalogue_of, stamp
from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.indexed import IndexedReader
from data_pipeline.mixture import MixtureConfig

_SHARD = re.compile(r"(.*)-\d{5}", re.DOTALL)
_SAMPLED_BLOCKS, _BLOCK = 16, 4096
_THREADS, _FEW_SHARDS = 16, 64


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """W = floor((T - 1) / S)."""
    return max(0, (num_tokens - 1) // sequence_length)


class Source:
    """The shards of one source as a single circle of tokens.

    Attributes: ``name``, ``num_tokens`` (T), ``num_windows`` (W), ``fingerprint``, ``shards``.

    Args:
        shards: opened readers, in the order in which the mixture names them.
        vocab_size: ids of this size and above are refused when a window is read; None checks for negative
            ids only.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[IndexedReader],
        *,
        sequence_length: int,
        seed: int,
        fingerprint: str,
        vocab_size: int | None = None,
    ) -> None:
        self.name, self.shards, self.fingerprint, self.vocab_size = (
            name,
            list(shards),
            fingerprint,
            vocab_size,
        )
        self.sequence_length = sequence_length
        self.key = order.source_key(seed, name)
        self._ends = list(accumulate(shard.num_tokens for shard in self.shards))
        self.num_tokens = self._ends[-1]
        self.num_windows = num_windows(self.num_tokens, sequence_length)
        if not self.num_windows:
            raise DataError(
                f"source {name!r}: holds {self.num_tokens} tokens, too few for one window of sequence_length "
                f"{sequence_length} + 1; add text or shorten sequence_length"
            )

    def window(self, epoch: int, window: int) -> np.ndarray:
        """int64[S + 1]: a window of an epoch; the last token is the first of the next window, wanted as a
        target only.

        Raises DataError naming the source and the document when a token id lies outside the vocabulary.
        """
        if not 0 <= window < self.num_windows:
            raise IndexError(f"source {self.name!r} has windows 0..{self.num_windows - 1}, not {window}")
        shift = int(order.shifts(self.key, epoch, self.sequence_length)[0])
        return self.read_window((shift + window * self.sequence_length) % self.num_tokens)

    def read_window(self, start: int) -> np.ndarray:
        """int64[S + 1]: the window at token `start` of the circle, checked against the vocabulary."""
        out = np.empty(self.sequence_length + 1, np.int64)
        self.read_window_into(start, out)
        return out

    def read_window_into(self, start: int, out: np.ndarray) -> None:
        """`read_window` into `out`, int64[S + 1]."""
        filled, token = 0, start
        while filled < len(out):
            shard, offset = self._place(token)
            piece = shard.tokens(offset, min(len(out) - filled, shard.num_tokens - offset))
            self._check(shard, offset, piece)
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            token = (token + len(piece)) % self.num_tokens

    def expect_window(self, start: int) -> None:
        """Begin to fetch the window at token `start`, as far as it is on an object store."""
        left, token = self.sequence_length + 1, start
        while left:
            shard, offset = self._place(token)
            count = min(left, shard.num_tokens - offset)
            shard.expect(offset, count)
            left -= count
            token = (token + count) % self.num_tokens

    def _check(self, shard: IndexedReader, offset: int, piece: np.ndarray) -> None:
        """Refuse ids outside the vocabulary, in the dtype of the file: that is cheaper than in int64."""
        unsigned = piece.dtype.kind == "u"
        if self.vocab_size is None or int(piece.max()) < self.vocab_size:
            if unsigned or int(piece.min()) >= 0:
                return
        wide = piece.astype(np.int64)
        bad = np.flatnonzero((wide < 0) | (wide >= (self.vocab_size or np.iinfo(np.int64).max)))[0]
        raise DataError(
            f"source {self.name!r}: {shard.prefix}.bin, document {shard.document_at(offset + int(bad))}, "
            f"holds token id {wide[bad]} but "
            f"the vocabulary has {self.vocab_size} ids; prepare it with the tokenizer of this mixture"
        )

    def read(self, start: int, count: int) -> np.ndarray:
        """int64[count]: tokens [start, start + count) of the circle, over ends of shards and source."""
        pieces = []
        while count:
            shard, offset = self._place(start)
            piece = shard.tokens(offset, min(count, shard.num_tokens - offset))
            pieces.append(piece.astype(np.int64))
            count -= len(piece)
            start = (start + len(piece)) % self.num_tokens
        return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]

    def _place(self, token: int) -> tuple[IndexedReader, int]:
        number = bisect.bisect_right(self._ends, token)
        return self.shards[number], token - (self._ends[number] - self.shards[number].num_tokens)


def open_sources(mixture: MixtureConfig, vocab_size: int | None = None) -> dict[str, Source]:
    """Every source of `mixture`, opened and checked, by name.

    Args:
        vocab_size: the model's vocabulary. Without it, the tokenizer's where the mixture names one.

    Raises DataError (one line): a shard is missing, too short, made with another tokenizer, or holds ids
    outside the vocabulary.
    """
    if vocab_size is None and mixture.tokenizer is not None:
        from data_pipeline.tokenizer import load_tokenizer

        vocab_size = load_tokenizer(mixture.tokenizer).vocab_size
    tokenizer = mixture.tokenizer_fingerprint()
    names, allowance = list(mixture.sources), Allowance()
    storage.forget()
    remote = any(storage.is_remote(path) for source in mixture.sources.values() for path in source.paths)
    opened = _together(
        lambda name: _open_source(mixture, name, vocab_size, tokenizer, allowance), names, 1 if remote else None
    )
    return dict(zip(names, opened, strict=True))


def _together(call: Any, items: Sequence[str], worth: int | None) -> Iterable[Any]:
    """`call` of each item, in order; by threads where there are more than `worth`: each waits for files, or a store."""
    if worth is None or len(items) <= worth:
        return map(call, items)
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(call, items))


class _Opened(NamedTuple):
    """A shard, what its manifest says of it, and what the catalogue is to remember."""

    shard: IndexedReader
    manifest: dict[str, Any] | None
    entry: dict[str, Any] | None
    known: dict[str, Any]


def _open_source(
    mixture: MixtureConfig, name: str, vocab_size: int | None, tokenizer: str | None, allowance: Allowance
) -> Source:
    shards, digest, hashes = [], xxhash.xxh3_128(), {}
    try:
        prefixes, manifests = mixture.shards(name), Manifests()
        with catalogue_of(prefixes) as catalogue:
            for prefix, opened in zip(
                prefixes,
                _together(lambda prefix: _open_shard(prefix, catalogue, manifests), prefixes, _FEW_SHARDS),
                strict=True,
            ):
                if opened.manifest is not None:
                    made_with = mixture.tokenizer if tokenizer else None
                    _check_manifest(name, opened.shard, opened.manifest, vocab_size, made_with, tokenizer)
                    if not (opened.shard.remote and "blocks" in opened.entry):  # else checked block by block
                        hashes[prefix] = opened.entry["xxh3_128"]
                if catalogue.entries.get(prefix) is not opened.known:
                    catalogue.put(prefix, opened.known)
                digest.update(opened.known["fingerprint"].encode())
                if opened.shard.num_tokens:
                    shards.append(opened.shard)
            catalogue.verify(hashes, allowance)
    except DataError as error:
        if str(error).startswith("source "):
            raise
        raise type(error)(f"source {name!r}: {error}") from None
    if not shards:
        paths = ", ".join(mixture.sources[name].paths)
        raise DataError(f"source {name!r}: {paths} hold no tokens; prepare it from text that is not empty")
    return Source(
        name,
        shards,
        sequence_length=mixture.sequence_length,
        seed=mixture.seed,
        fingerprint=digest.hexdigest(),
        vocab_size=vocab_size,
    )


def _open_shard(prefix: str, catalogue: Catalogue, manifests: Manifests) -> _Opened:
    now = stamp(prefix)
    known, manifest = catalogue.get(prefix, now), manifests.of(prefix)
    entry = manifest_file(manifest, prefix + ".bin") if manifest else None
    facts = known["facts"] if known else None
    if facts is None and entry is not None and storage.is_remote(prefix):
        facts = remote_facts(prefix, manifest, entry)
    shard = IndexedReader(prefix, facts, entry)
    if known is None:
        fingerprint = shard_fingerprint(shard, entry, now)
        known = {"stamp": now, "facts": shard.facts, "fingerprint": fingerprint, "verified": None}
    elif entry is not None:  # the manifest may be another one than then
        known["fingerprint"] = shard_fingerprint(shard, entry, now)
    return _Opened(shard, manifest, entry, known)


class Manifests:
    """Manifests by shard; one that ten thousand shards share is read once. Safe to use from several threads."""

    def __init__(self) -> None:
        self._read: dict[str, dict[str, Any] | None] = {}
        self._lock = threading.Lock()

    def of(self, prefix: str) -> dict[str, Any] | None:
        """`read_manifest` of the shard."""
        together = _SHARD.fullmatch(prefix)
        key = together[1] if together and not storage.exists(prefix + ".manifest.json") else prefix
        with self._lock:
            if key not in self._read:
                self._read[key] = read_manifest(key)
            return self._read[key]


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """The manifest that `prepare` wrote, or None where there is none (files of other tools).

    It is ``PREFIX.manifest.json``; the shards ``CORPUS-00000``, ``CORPUS-00001``, ... have ``CORPUS.manifest.json``
    together.
    """
    path = prefix + ".manifest.json"
    together = _SHARD.fullmatch(prefix)
    if together and not storage.exists(path):
        path = together[1] + ".manifest.json"
    if not storage.exists(path):
        return None
    data = storage.read(path)
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise DamagedDataError(f"{path}: cannot be read ({error}); prepare the corpus again") from None
    if not isinstance(manifest, dict):
        raise DamagedDataError(f"{path}: is not the manifest of a corpus; prepare the corpus again")
    return manifest


def manifest_file(manifest: dict[str, Any], path: str) -> dict[str, Any] | None:
    """What a manifest says about one file (bytes, xxh3_128, blocks), by the file's name."""
    for split in manifest.get("splits", {}).values():
        if os.path.basename(path) in split.get("files", {}):
            return split["files"][os.path.basename(path)]
    return None


def remote_facts(prefix: str, manifest: dict[str, Any], entry: dict[str, Any]) -> list[int] | None:
    """`IndexedReader.facts` by the manifest alone: ten thousand remote shards are opened without a read each.

    Raises DamagedDataError when an object has another size than the manifest says. None when it says too little.
    """
    index = manifest_file(manifest, prefix + ".idx")
    if index is None or "dtype" not in manifest:
        return None
    for end, recorded in ((".bin", entry), (".idx", index)):
        _check_size(prefix + end, storage.facts(prefix + end)[0], recorded)
    return IndexedReader.facts_of(manifest["dtype"], entry["bytes"], index["bytes"])


def shard_fingerprint(shard: IndexedReader, entry: dict[str, Any] | None, version: Sequence[int | str]) -> str:
    """What identifies a shard's content: its hash from the manifest, else its etags (`version`, of a remote one), else
    sizes and a hash of blocks spread over both files.

    The last form reads at most 64 KB of a file of any size; it tells corpora apart, and is no proof against damage.
    """
    if entry is not None:
        return f"{entry['xxh3_128']}:{shard.num_tokens}"
    digest = xxhash.xxh3_128(f"{shard.dtype}:{shard.num_tokens}:{shard.num_sequences}".encode())
    if shard.remote:
        digest.update(json.dumps(version).encode())
        return digest.hexdigest()
    for path in (shard.prefix + ".bin", shard.prefix + ".idx"):
        size = os.path.getsize(path)
        with open(path, "rb", buffering=0) as file:
            if size <= _SAMPLED_BLOCKS * _BLOCK:
                digest.update(file.read())
                continue
            for place in range(_SAMPLED_BLOCKS):
                digest.update(os.pread(file.fileno(), _BLOCK, place * (size - _BLOCK) // (_SAMPLED_BLOCKS - 1)))
    return digest.hexdigest()


def _check_size(path: str, size: int, recorded: dict[str, Any]) -> None:
    if recorded["bytes"] != size:
        raise DamagedDataError(
            f"{path} has {size} bytes, its manifest says {recorded['bytes']}; copy or prepare it again"
        )


def _check_manifest(
    name: str,
    shard: IndexedReader,
    manifest: dict[str, Any],
    vocab_size: int | None,
    tokenizer_path: str | None,
    tokenizer: str | None,
) -> None:
    path = shard.prefix + ".bin"
    recorded = manifest_file(manifest, path)
    if recorded is None:
        raise DataError(f"source {name!r}: {shard.prefix}.manifest.json says nothing of {path}; prepare it again")
    _check_size(path, shard.num_tokens * shard.dtype.itemsize, recorded)
    if manifest.get("dtype") not in (None, str(shard.dtype)):
        raise DamagedDataError(
            f"{shard.prefix}.idx says that tokens are {shard.dtype}, its manifest says {manifest['dtype']}; "
            "copy or prepare it again"
        )
    highest = manifest.get("max_token_id")
    if vocab_size is not None and highest is not None and highest >= vocab_size:
        raise DataError(
            f"source {name!r}: {path} holds token id {highest} but the vocabulary has {vocab_size} ids; "
            f"prepare it with the tokenizer of this mixture, or raise model.vocab_size"
        )
    made_with = manifest.get("tokenizer", {}).get("xxh3_128")
    if tokenizer is not None and made_with is not None and made_with != tokenizer:
        raise DataError(
            f"source {name!r}: {path} was made with another tokenizer than {tokenizer_path}; "
            f"prepare it again with this one, or name the other in the mixture"
        )

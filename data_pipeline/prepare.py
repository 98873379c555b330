"""Raw text to token files: ``OUT.bin/.idx``, ``OUT.heldout.bin/.idx`` and ``OUT.manifest.json``.

Documents keep the order of the input. Each ends with the end-of-document token. A document is held out when a
hash of its content says so, so that the same documents stay held out as the corpus grows. The result is
byte-identical for any number of workers. Everything is written under ``*.partial`` names and renamed at the
end, the manifest last: where there is a manifest the corpus is whole.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.documents import RawDocument, RawReader, find_inputs, understand
from data_pipeline.errors import DataError
from data_pipeline.indexed import IndexedWriter, dtype_for, prefix_of
from data_pipeline.mixture import HELDOUT
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.units import format_count

MANIFEST_VERSION = 1

_BLOCK_BYTES, _BLOCK_DOCUMENTS = 1 << 20, 1024
_EXAMPLES = 100  # bad documents that the manifest names


@dataclass
class SplitReport:
    """One of the two parts of a corpus."""

    documents: int = 0
    tokens: int = 0
    unigram_entropy: float = 0.0
    """Nats per token of the split's own token frequencies: the loss of a model that knows nothing but
    them."""


@dataclass
class PrepareReport:
    """What `prepare` did. `bad` counts documents left out, `examples` are ``file:line: reason``."""

    prefix: str
    train: SplitReport
    heldout: SplitReport | None
    text_bytes: int
    bad: dict[str, int]
    examples: list[str]
    seconds: float

    def summary(self) -> str:
        """A few lines for people."""
        rate = f"{format_count(self.train.tokens / max(self.seconds, 1e-9), 1)} tokens/s"
        lines = [
            f"{self.prefix}: {self.train.documents:,} documents, {format_count(self.train.tokens)} "
            f"tokens ({rate})"
        ]
        if self.heldout is not None:
            lines.append(
                f"held out: {self.heldout.documents:,} documents, {format_count(self.heldout.tokens)} tokens"
            )
        if self.bad:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.bad.items()))
            lines.append(f"left out: {sum(self.bad.values())} documents ({reasons}), the first of them:")
            lines += [f"  {example}" for example in self.examples[:10]]
        return "\n".join(lines)


def prepare(
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    workers: int = 1,
    text_key: str = "text",
    holdout: float = 0.0,
    max_bad: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> PrepareReport:
    """Tokenise raw text into the corpus `out`.

    Args:
        inputs: .txt, .jsonl and .jsonl.gz files, folders of them, or patterns.
        out: the prefix of the files to write.
        tokenizer: a sentencepiece .model or a tokenizer.json.
        workers: processes that tokenise.
        text_key: the field of a .jsonl line that holds the text.
        holdout: the part of the documents (0 to 0.5) kept for validation.
        max_bad: how many documents may be left out (malformed, not UTF-8, empty, no field) before it is an
            error; None: any number.
        overwrite: replace a corpus that is there already.
        progress: show a progress bar and a summary on stderr; None: the bar on a terminal only; False:
            neither, unless documents were left out.

    Raises DataError, one line.
    """
    prefix = prefix_of(out)
    if not 0 <= holdout <= 0.5:
        raise DataError(f"holdout {holdout} is not a part of the documents; give a number from 0 to 0.5")
    if workers < 1:
        raise DataError(f"workers {workers} is too few; give 1 or more")
    existing = [prefix + end for end in (".bin", ".idx", ".manifest.json") if os.path.exists(prefix + end)]
    if existing and not overwrite:
        raise DataError(f"{existing[0]} is there already; remove it, or choose another --out")
    files = find_inputs(inputs)
    model = load_tokenizer(tokenizer)
    begun = time.monotonic()
    command = [
        "moe-train",
        "prepare",
        *map(os.fspath, [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs),
    ]
    command += ["--out", os.path.basename(prefix), "--tokenizer", os.path.basename(os.fspath(tokenizer))]
    command += ["--text-key", text_key] + (["--holdout", str(holdout)] if holdout else [])
    with ExitStack() as stack:
        corpus = stack.enter_context(_Corpus(prefix, model, holdout > 0, max_bad))
        reader = RawReader(files)
        results = stack.enter_context(
            _Encoder(os.fspath(tokenizer), model, text_key, holdout, workers)
        ).encode(reader)
        bar = stack.enter_context(_Progress(reader, sys.stderr.isatty() if progress is None else progress))
        for result in results:
            corpus.add(result)
            bar.update(corpus)
        corpus.finish({"command": shlex.join(command), "text_key": text_key, "holdout": holdout})
    report = corpus.report(time.monotonic() - begun)
    if progress is not False or report.bad:
        print(report.summary(), file=sys.stderr)
    return report


# --- encoding, in this process or in several


class _Block(NamedTuple):
    """What a block of raw documents becomes. `held` marks the documents of the held-out split."""

    ids: np.ndarray
    lengths: np.ndarray
    held: np.ndarray
    text_bytes: int
    bad: list[tuple[str, int, str]]


class _Encoder:
    """Encodes blocks of documents in order, a bounded number of them ahead of the writer."""

    def __init__(self, path: str, model: Tokenizer, text_key: str, holdout: float, workers: int) -> None:
        self.settings = (path, text_key, holdout)
        self.workers = workers
        _start_worker(*self.settings, model=model)
        self._pool: Any = None

    def __enter__(self) -> _Encoder:
        if self.workers > 1:
            kinds = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("fork" if "fork" in kinds else "spawn")
            self._pool = context.Pool(self.workers, _start_worker, self.settings)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()

    def encode(self, reader: Iterable[RawDocument]) -> Iterator[_Block]:
        if self._pool is None:
            yield from map(_encode_block, _blocks(reader))
            return
        waiting: deque[Any] = deque()
        for block in _blocks(reader):
            waiting.append(self._pool.apply_async(_encode_block, (block,)))
            if len(waiting) > 3 * self.workers:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def _blocks(reader: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    block: list[RawDocument] = []
    size = 0
    for raw in reader:
        block.append(raw)
        size += len(raw.data)
        if size >= _BLOCK_BYTES or len(block) >= _BLOCK_DOCUMENTS:
            yield block
            block, size = [], 0
    if block:
        yield block


_worker: dict[str, Any] = {}


def _start_worker(path: str, text_key: str, holdout: float, model: Tokenizer | None = None) -> None:
    model = model or load_tokenizer(path)
    _worker.update(
        model=model, text_key=text_key, limit=int(holdout * 2**64), dtype=dtype_for(model.vocab_size)
    )


def _encode_block(block: list[RawDocument]) -> _Block:
    documents = [understand(raw, _worker["text_key"]) for raw in block]
    good = [document.text for document in documents if document.text is not None]
    bad = [(d.file, d.line, d.problem) for d in documents if d.problem is not None]
    model, dtype = _worker["model"], _worker["dtype"]
    encoded = [[*ids, model.eos_id] for ids in model.encode_many(good)]
    flat = np.fromiter(chain.from_iterable(encoded), np.int64)
    if len(flat) and not 0 <= flat.min() <= flat.max() < model.vocab_size:
        raise DataError(
            f"the tokenizer gave id {flat.max()}, outside its own vocabulary of "
            f"{model.vocab_size}; it is damaged"
        )
    raw_texts = [text.encode("utf-8") for text in good]
    return _Block(
        flat.astype(dtype),
        np.array([len(ids) for ids in encoded], np.int64),
        np.array([xxhash.xxh3_64_intdigest(text) < _worker["limit"] for text in raw_texts], bool),
        sum(map(len, raw_texts)),
        bad,
    )


# --- writing


@dataclass
class _Split:
    writer: IndexedWriter
    counts: np.ndarray

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.writer.add_many(ids, lengths.tolist())
        self.counts += np.bincount(ids, minlength=len(self.counts))

    def report(self) -> SplitReport:
        return SplitReport(self.writer.num_documents, self.writer.num_tokens, unigram_entropy(self.counts))


def unigram_entropy(counts: np.ndarray) -> float:
    """Nats per token of the distribution that `counts` (int[vocab_size]) describe."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    total = seen.sum()
    return math.fsum((-(seen / total) * np.log(seen / total)).tolist())


@dataclass
class _Corpus:
    """The files being written. Leaving it by an exception removes them."""

    prefix: str
    model: Tokenizer
    held_out: bool
    max_bad: int | None
    text_bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def __enter__(self) -> _Corpus:
        names = {"train": self.prefix} | ({"heldout": self.prefix + HELDOUT} if self.held_out else {})
        dtype, size = dtype_for(self.model.vocab_size), self.model.vocab_size
        self.splits = {
            name: _Split(IndexedWriter(path, dtype), np.zeros(size, np.int64)) for name, path in names.items()
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for split in self.splits.values():
                split.writer.abandon()

    def add(self, block: _Block) -> None:
        for file, line, reason in block.bad:
            self.bad[reason] += 1
            place = f"{file}:{line}: {reason}" if line else f"{file}: {reason}"
            if len(self.examples) < _EXAMPLES:
                self.examples.append(place)
            if self.max_bad is not None and sum(self.bad.values()) > self.max_bad:
                raise DataError(
                    f"{place}; more than {self.max_bad} bad documents; mend the input or raise max_bad"
                )
        self.text_bytes += block.text_bytes
        if not self.held_out:
            self.splits["train"].add(block.ids, block.lengths)
            return
        each_token = np.repeat(block.held, block.lengths)
        self.splits["train"].add(block.ids[~each_token], block.lengths[~block.held])
        self.splits["heldout"].add(block.ids[each_token], block.lengths[block.held])

    @property
    def documents(self) -> int:
        return sum(split.writer.num_documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.writer.num_tokens for split in self.splits.values())

    def finish(self, settings: dict[str, Any]) -> None:
        if not self.splits["train"].writer.num_documents:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.bad.items()))
            raise DataError(
                f"{self.prefix}: the inputs hold no usable document "
                f"({reasons or 'they are empty'}); check them"
            )
        counts = sum(split.counts for split in self.splits.values())
        splits = {name: self._describe(split) for name, split in self.splits.items()}
        manifest = {
            "format_version": MANIFEST_VERSION,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "vocab_size": self.model.vocab_size,
            "max_token_id": int(np.flatnonzero(counts).max()),
            "dtype": str(dtype_for(self.model.vocab_size)),
            "tokenizer": {"xxh3_128": self.model.fingerprint(), "eos_id": self.model.eos_id},
            "splits": splits,
            "bad": {"counts": dict(sorted(self.bad.items())), "examples": self.examples},
            **settings,
        }
        target = Path(self.prefix + ".manifest.json")
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        target.unlink(missing_ok=True)
        for end in (".bin", ".idx"):
            Path(self.prefix + HELDOUT + end).unlink(
                missing_ok=True
            )  # of an earlier corpus with a held-out split
        for split in self.splits.values():
            split.writer.publish()
        os.replace(partial, target)

    def _describe(self, split: _Split) -> dict[str, Any]:
        files = split.writer.finish()
        return vars(split.report()) | {
            "files": {os.path.basename(path): facts for path, facts in files.items()}
        }

    def report(self, seconds: float) -> PrepareReport:
        train, heldout = self.splits["train"].report(), self.splits.get("heldout")
        return PrepareReport(
            self.prefix,
            train,
            heldout.report() if heldout else None,
            self.text_bytes,
            dict(self.bad),
            self.examples,
            seconds,
        )


class _Progress:
    """A progress bar over the bytes of the inputs, with documents/s and tokens/s."""

    def __init__(self, reader: RawReader, shown: bool) -> None:
        self.reader, self.shown, self._begun = reader, shown, time.monotonic()

    def __enter__(self) -> _Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("tokenise"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("tokenise", total=max(1, self.reader.total_bytes), rate="")
        return self

    def update(self, corpus: _Corpus) -> None:
        if self.shown:
            seconds = max(1e-9, time.monotonic() - self._begun)
            tokens = format_count(corpus.tokens / seconds, 1)
            rate = f"{corpus.documents / seconds:,.0f} documents/s, {tokens} tokens/s"
            self._bar.update(self._task, completed=self.reader.bytes_read, rate=rate)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()

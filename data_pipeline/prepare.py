"""Raw text to token files: shards ``OUT.bin/.idx`` (or ``OUT-00000.bin/.idx``, ... of bounded size), a held-out
split ``*.heldout.bin/.idx`` and ``OUT.manifest.json``.

Two steps. First the input is read as a stream, encoded, and put into buckets on disk (`data_pipeline.spool`);
then the buckets are sorted and written out (`data_pipeline.assemble`). Memory grows with neither. With a shuffle
seed the documents come in a random order of the whole corpus, else in the order of the input. Each ends with the
end-of-document token. A document is held out when a hash of its content says so, so that the same documents
stay held out as the corpus grows.

The result is byte-identical for any number of workers, and after a kill at any moment: the next start goes on
from what was last flushed to ``OUT.partial/``. Shards are written under ``*.partial`` names and renamed at the
end, the manifest last: where there is a manifest the corpus is whole.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline.assemble import Corpus, SplitReport, existing, unigram_entropy
from data_pipeline.documents import RawReader, find_inputs, unpacked_bytes
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.filters import parse_filters
from data_pipeline.indexed import dtype_for, prefix_of
from data_pipeline.spool import Spool, sweep
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.units import format_count

__all__ = ["PrepareReport", "SplitReport", "prepare", "unigram_entropy"]

BUCKET_BYTES = 1 << 28  # of raw text, about; a bucket's records are sorted in memory
_MOST_BUCKETS = 1024


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
    filtered: int = 0
    duplicates: int = 0

    def summary(self) -> str:
        """A few lines for people."""
        rate = f"{format_count(self.train.tokens / max(self.seconds, 1e-9), 1)} tokens/s"
        lines = [
            f"{self.prefix}: {self.train.documents:,} documents, {format_count(self.train.tokens)} tokens ({rate})"
        ]
        if self.heldout is not None:
            lines.append(f"held out: {self.heldout.documents:,} documents, {format_count(self.heldout.tokens)} tokens")
        if self.filtered:
            lines.append(f"filtered out: {self.filtered:,} documents")
        if self.duplicates:
            lines.append(f"exact duplicates dropped: {self.duplicates:,} documents")
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
    *,
    filters: Sequence[str] = (),
    dedup: bool = False,
    shuffle_seed: int | None = None,
    shard_tokens: int | None = None,
) -> PrepareReport:
    """Tokenise raw text into the corpus `out`.

    Args:
        inputs: files, folders of them, or patterns: .txt, .jsonl (plain, .gz, .zst), .parquet, .arrow.
        out: the prefix of the files to write.
        tokenizer: a sentencepiece .model or a tokenizer.json.
        workers: processes that tokenise.
        text_key: the field that holds the text; ``a.b`` is b within a.
        holdout: the part of the documents (0 to 0.5) kept for validation.
        max_bad: how many documents may be left out (malformed, not UTF-8, empty, no field) before it is an
            error; None: any number.
        overwrite: replace a corpus that is there already, or an unfinished one of other inputs.
        progress: show a progress bar and a summary on stderr; None: the bar on a terminal only; False:
            neither, unless documents were left out.
        filters: conditions on fields that a document must meet, as ``lang=en`` (`data_pipeline.filters`).
        dedup: drop documents whose text came before; needs a shuffle, which brings equal texts together.
        shuffle_seed: put the documents in a random order; None: keep that of the input.
        shard_tokens: the largest size of a shard, but for a document that is larger; None: one shard.

    Raises DataError, one line.
    """
    prefix, conditions = prefix_of(out), parse_filters(filters)
    if not os.path.basename(prefix):
        raise DataError(
            f"--out {os.fspath(out)} is a folder; add a name for the corpus, such as {os.path.join(prefix, 'web')}"
        )
    _check(holdout, workers, dedup, shuffle_seed, shard_tokens)
    files = find_inputs(inputs)
    if conditions and any(file.endswith(".txt") for file in files):
        raise DataError("a .txt file has no fields; filter .jsonl, .parquet or .arrow")
    # Those that go on with an unfinished corpus find files only where it was killed while renaming.
    there = [] if os.path.exists(os.path.join(prefix + ".partial", "state.json")) else existing(prefix)
    if there and not overwrite:
        sweep(prefix + ".partial")
        raise DataError(f"{there[0]} is there already; remove it, choose another --out, or --overwrite")
    model = load_tokenizer(tokenizer)
    begun = time.monotonic()
    options: dict[str, Any] = {
        "text_key": text_key,
        "holdout": holdout,
        "filters": list(filters),
        "dedup": dedup,
        "shuffle_seed": shuffle_seed,
        "shard_tokens": shard_tokens,
    }
    settings = options | {"inputs": _identities(files), "tokenizer": model.fingerprint()}
    fields = [text_key, *(condition.field for condition in conditions)]
    try:
        spool = Spool(
            prefix + ".partial",
            settings,
            dtype_for(model.vocab_size),
            buckets=_buckets(files),
            seed=shuffle_seed,
            by_content=dedup,
            discard=overwrite,
        )
    except OSError as error:
        raise _unwritable(prefix, error) from None
    remove = False
    try:
        with ExitStack() as stack:
            encoder = Encoder(os.fspath(tokenizer), model, text_key, conditions, workers)
            _fill(spool, stack, RawReader(files, fields, spool.after), encoder, max_bad, progress)
        if not spool.documents:
            remove = True
            raise DataError(f"{prefix}: the inputs hold no usable document ({_why(spool)}); check them")
        command = _command(inputs, prefix, tokenizer, options)
        report = _assemble(prefix, spool, model, options, command)
        remove = True
    except DataError:
        remove = remove or not spool.resumable  # hours of work are not thrown away for a mistake that can be mended
        raise
    except OSError as error:
        raise _unwritable(prefix, error) from None
    finally:
        spool.close(remove)
    report.seconds = time.monotonic() - begun
    if progress is not False or report.bad:
        print(report.summary(), file=sys.stderr)
    return report


def _unwritable(prefix: str, error: OSError) -> DataError:
    reason = error.strerror or error
    return DataError(f"{prefix}: cannot be written ({reason}); make room or check the path, and start again")


def _check(holdout: float, workers: int, dedup: bool, shuffle_seed: int | None, shard_tokens: int | None) -> None:
    if not 0 <= holdout <= 0.5:
        raise DataError(f"holdout {holdout} is not a part of the documents; give a number from 0 to 0.5")
    if workers < 1:
        raise DataError(f"workers {workers} is too few; give 1 or more")
    if dedup and shuffle_seed is None:
        raise DataError("duplicates are found while shuffling; give a shuffle seed, or leave them in")
    if shuffle_seed is not None and not 0 <= shuffle_seed < 2**63:
        raise DataError(f"shuffle seed {shuffle_seed} is out of range; give 0 to 2^63 - 1")
    if shard_tokens is not None and shard_tokens < 1:
        raise DataError(f"shards of {shard_tokens} tokens hold nothing; give 1 or more, such as 2B")


def _identities(files: Sequence[str]) -> list[list[Any]]:
    """What tells whether an input is still the same file."""
    stats = [(file, os.stat(file)) for file in files]
    return [[os.path.abspath(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _buckets(files: Sequence[str]) -> int:
    """A power of two, from the inputs alone."""
    return min(_MOST_BUCKETS, 1 << max(0, -(-unpacked_bytes(files) // BUCKET_BYTES) - 1).bit_length())


def _fill(
    spool: Spool,
    stack: ExitStack,
    reader: RawReader,
    encoder: Encoder,
    max_bad: int | None,
    progress: bool | None,
) -> None:
    """The first step: encode what the spool has not got yet."""
    _check_bad(spool, max_bad)
    if spool.complete:
        return
    if spool.documents and progress is not False:
        with suppress(OSError):  # whoever would read it may have gone
            print(f"{spool.folder}: goes on after {spool.documents:,} documents", file=sys.stderr)
    stack.enter_context(encoder)
    bar = stack.enter_context(_Progress(reader, spool, sys.stderr.isatty() if progress is None else progress))
    for block in encoder.encode(reader):
        spool.add(block, max_bad)
        bar.update()
    spool.save(complete=True)


def _check_bad(spool: Spool, max_bad: int | None) -> None:
    if max_bad is not None and sum(spool.bad.values()) > max_bad:
        raise DataError(f"{spool.examples[-1]}; more than {max_bad} bad documents; mend the input or raise --max-bad")


def _why(spool: Spool) -> str:
    reasons = [f"{count} x {reason}" for reason, count in sorted(spool.bad.items())]
    reasons += [f"{spool.filtered} x filtered out"] * bool(spool.filtered)
    return ", ".join(reasons) or "they are empty"


def _assemble(prefix: str, spool: Spool, model: Tokenizer, options: dict[str, Any], command: str) -> PrepareReport:
    """The second step: the spool's documents into shards."""
    with Corpus(
        prefix,
        dtype_for(model.vocab_size),
        model.vocab_size,
        spool,
        holdout=options["holdout"],
        shard_tokens=options["shard_tokens"],
        dedup=options["dedup"],
    ) as corpus:
        corpus.fill()
        corpus.finish(
            {
                "vocab_size": model.vocab_size,
                "dtype": str(dtype_for(model.vocab_size)),
                "tokenizer": {"xxh3_128": model.fingerprint(), "eos_id": model.eos_id},
                "bad": {"counts": dict(sorted(spool.bad.items())), "examples": spool.examples},
                "filtered": spool.filtered,
                "duplicates": corpus.duplicates,
                "command": command,
                **options,
            }
        )
    return PrepareReport(
        prefix,
        corpus.train.report(),
        corpus.heldout.report() if corpus.heldout else None,
        sum(split.text_bytes for split in corpus.splits.values()),
        dict(spool.bad),
        spool.examples,
        0.0,
        spool.filtered,
        corpus.duplicates,
    )


def _command(inputs: Any, prefix: str, tokenizer: Any, options: dict[str, Any]) -> str:
    """The command that makes this corpus again, but for the folder."""
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    command = ["moe-train", "prepare", *map(os.fspath, given)]
    command += ["--out", os.path.basename(prefix), "--tokenizer", os.path.basename(os.fspath(tokenizer))]
    command += ["--text-key", options["text_key"]]
    command += ["--holdout", str(options["holdout"])] if options["holdout"] else []
    for condition in options["filters"]:
        command += ["--filter", condition]
    command += ["--dedup"] if options["dedup"] else []
    seed, size = options["shuffle_seed"], options["shard_tokens"]
    command += ["--no-shuffle"] if seed is None else ["--shuffle-seed", str(seed)]
    command += ["--shard-tokens", str(size)] if size is not None else []
    return shlex.join(command)


class _Progress:
    """A progress bar over the bytes of the inputs, with documents/s, tokens/s and the time that remains."""

    def __init__(self, reader: RawReader, spool: Spool, shown: bool) -> None:
        self.reader, self.spool, self.shown, self._begun = reader, spool, shown, time.monotonic()
        self._before = spool.documents, spool.tokens

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

    def update(self) -> None:
        if self.shown:
            seconds = max(1e-9, time.monotonic() - self._begun)
            documents = (self.spool.documents - self._before[0]) / seconds
            tokens = format_count((self.spool.tokens - self._before[1]) / seconds, 1)
            rate = f"{documents:,.0f} documents/s, {tokens} tokens/s"
            self._bar.update(self._task, completed=self.reader.bytes_read, rate=rate)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()

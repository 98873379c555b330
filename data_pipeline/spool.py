"""What `prepare` keeps on disk while it works: the encoded documents in buckets, and where it is in its input.

A bucket holds the documents whose random key begins with its number, so that sorting bucket after bucket sorts the
whole corpus: an external shuffle of bounded memory. One that came out larger than memory should hold (a corpus beyond a
quarter of a terabyte, inputs that unpack to more than was thought) is split by the next bits of the keys when it is
emptied, and again if need be. ``PREFIX.partial/`` holds for each bucket its tokens and one
record a document, and ``state.json``: how long every file was, and the last document that went in, when all of
it was last flushed to disk. After a kill the files are cut to those lengths and the input goes on from there; where the
file that was being read is another one now, from before it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.encode import Block
from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.order import _GOLDEN, _mix

BUFFER_BYTES = 1 << 26  # held in memory, all buckets together
CHECKPOINT_SECONDS = 20.0
LARGEST_RECORDS, LARGEST_TOKENS = 1 << 27, 1 << 30  # bytes; a bucket with more is split
SPLIT_BITS = 4
_STEP = 1 << 18  # records that are looked at together
EXAMPLES = 100  # bad documents that are named
_STATE_VERSION = 1

RECORD = np.dtype([("key", "<u8"), ("hash", "<u8", (2,)), ("length", "<i8"), ("text_bytes", "<i8")])
"""A document: its place in the order, the hashes of its text, its tokens, the bytes of its text."""

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Documents in order: their records, where the tokens of each begin, and the tokens (mapped)."""


class Spool:
    """The buckets of one corpus, opened anew or where a killed start left them.

    Attributes: ``documents`` (that went in), ``tokens``, ``bad`` (count of each reason), ``examples``,
    ``filtered``, ``after`` (absolute path and line of the last document of the input that is in), ``complete``.

    Args:
        folder: ``PREFIX.partial``.
        settings: all that the result depends on; a folder of others is refused, or removed with `discard`. Of
            ``inputs`` among them, [path, ...] of each file, the one that was being read may have been mended, and those
            after it changed.
        seed: of the shuffle; None keeps the order of the input (one bucket).
        by_content: order by a hash of the text, not of the number, so that equal texts meet.

    Raises DataError when another process works there.
    """

    def __init__(
        self,
        folder: str,
        settings: Mapping[str, Any],
        dtype: np.dtype,
        *,
        buckets: int,
        seed: int | None,
        by_content: bool = False,
        discard: bool = False,
    ) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self.buckets = buckets if seed is not None else 1
        self._seed, self._by_content = seed, by_content
        self._settings = json.loads(json.dumps(settings))
        self.documents = self.tokens = self.filtered = 0
        self.bad: Counter[str] = Counter()
        self.examples: list[str] = []
        self.after: tuple[str, int] | None = None
        self.complete = False
        self._lengths = [[0, 0] for _ in range(self.buckets)]  # bytes of tokens and of records, with those held
        self._buffers: list[tuple[list[bytes], list[bytes]]] = []
        self._held = 0
        self._before = self._progress()  # before the first block that ended in the file that is being read
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers
        except OSError:
            self._lock.close()
            raise DataError(f"{folder}: another prepare is at work there; wait for it, or stop it") from None
        try:
            self._open(discard)
        except BaseException:
            self._lock.close()
            raise
        self._saved, self._saving = time.monotonic(), 0.0

    def _open(self, discard: bool) -> None:
        state = self._read_state()
        known = None if state is None else self._known(state)
        if state is not None and known is None and not discard:
            changed = [key for key, value in self._settings.items() if state["settings"].get(key) != value]
            raise DataError(
                f"{self.folder}: holds an unfinished corpus of other {' and '.join(changed) or 'settings'}; "
                "go on with those, or start again with --overwrite"
            )
        if known is None:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        else:
            self.documents, self.tokens, self.filtered = known["documents"], known["tokens"], known["filtered"]
            self.bad, self.examples = Counter(known["bad"]), known["examples"]
            self.after = tuple(known["after"]) if known["after"] else None
            self.complete, self._lengths = state["complete"], known["lengths"]
            self.buckets = len(self._lengths)
            self._before = state.get("before", known)
        self._buffers = [([], []) for _ in range(self.buckets)]
        sizes = {
            path: size for bucket, pair in enumerate(self._lengths) for path, size in zip(self._paths(bucket), pair)
        }
        for path, size in sizes.items():
            if size and (not path.exists() or path.stat().st_size < size):
                raise DamagedDataError(f"{path}: was cut short; remove {self.folder} and prepare again")
        if known is not None and state["settings"] != self._settings:
            self.save()  # nobody is to go on with what is cut off here
        for path, size in sizes.items():
            if path.exists():
                os.truncate(path, size)

    def _known(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The progress that can be gone on with: all, or that before the file that was being read; None where settings
        or inputs are others."""
        then, now = dict(state["settings"]), dict(self._settings)
        files, inputs = then.pop("inputs", []), now.pop("inputs", [])
        if then != now or (state["complete"] and files != inputs):
            return None
        paths = [path for path, *_ in files]

        def begun(known: Mapping[str, Any]) -> int:
            return paths.index(known["after"][0]) + 1 if known["after"] else 0

        if paths[: begun(state)] != [path for path, *_ in inputs[: begun(state)]]:
            return None
        progress = (state, state.get("before", state))
        return next((known for known in progress if files[: begun(known)] == inputs[: begun(known)]), None)

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedDataError(
                f"{self.folder}/state.json: cannot be read ({error}); remove the folder and prepare again"
            ) from None
        return state if state.get("version") == _STATE_VERSION else {"settings": {}}

    def _paths(self, bucket: int | str) -> tuple[Path, Path]:
        name = bucket if isinstance(bucket, str) else f"{bucket:04d}"
        return self.folder / f"{name}.tokens", self.folder / f"{name}.records"

    # --- filling

    def add(self, block: Block, max_bad: int | None = None) -> None:
        """Take a block of documents, the next of the input. Raises DataError above `max_bad` bad ones in all."""
        end = os.path.abspath(block.end[0]), block.end[1]
        if self.after is None or self.after[0] != end[0]:
            self._before = self._progress()
        for file, line, reason in block.bad:
            self.bad[reason] += 1
            if max_bad is not None and sum(self.bad.values()) > max_bad:
                raise DataError(
                    f"{place(file, line, reason)}; more than {max_bad} bad documents; mend the input or raise --max-bad"
                )
            if len(self.examples) < EXAMPLES:
                self.examples.append(place(file, line, reason))
        records = np.empty(len(block.lengths), RECORD)
        records["key"] = self._keys(block)
        records["hash"], records["length"] = block.hashes, block.lengths
        records["text_bytes"] = block.text_bytes
        if self.buckets == 1:
            self._buffer(0, block.ids, records)
        else:
            bucket = (records["key"] >> np.uint64(65 - self.buckets.bit_length())).astype(np.int64)
            each_token = np.repeat(bucket, block.lengths)
            order, token_order = np.argsort(bucket, kind="stable"), np.argsort(each_token, kind="stable")
            present, first = np.unique(bucket[order], return_index=True)
            token_first = np.searchsorted(each_token[token_order], present)
            parts = np.split(records[order], first[1:]), np.split(block.ids[token_order], token_first[1:])
            for number, part, ids in zip(present.tolist(), *parts):
                self._buffer(number, ids, part)
        self.documents += len(records)
        self.tokens += len(block.ids)
        self.filtered += block.filtered
        self.after = end
        if self._held > BUFFER_BYTES:
            self._flush()
        # at most a twentieth of the time goes into flushing to disk
        if time.monotonic() - self._saved > max(CHECKPOINT_SECONDS, 20 * self._saving):
            self.save()

    def _keys(self, block: Block) -> np.ndarray:
        numbers = np.arange(self.documents, self.documents + len(block.lengths), dtype=np.uint64)
        if self._seed is None:
            return numbers
        with np.errstate(over="ignore"):
            seed = _mix(np.array([self._seed], np.uint64) + _GOLDEN)
            return _mix(seed ^ block.hashes[:, 0]) if self._by_content else _mix(seed + numbers * _GOLDEN)

    def _buffer(self, bucket: int, ids: np.ndarray, records: np.ndarray) -> None:
        for which, data in enumerate((ids.tobytes(), records.tobytes())):
            self._buffers[bucket][which].append(data)
            self._lengths[bucket][which] += len(data)
            self._held += len(data)

    def _flush(self) -> None:
        for bucket, buffers in enumerate(self._buffers):
            for path, kept in zip(self._paths(bucket), buffers, strict=True):
                if kept:
                    with open(path, "ab") as file:
                        file.write(b"".join(kept))
                    kept.clear()
        self._held = 0

    def save(self, complete: bool = False) -> None:
        """Flush everything to disk, and note that what is here is here; `complete`: the input has ended."""
        begun = time.monotonic()
        self._flush()
        for bucket in range(self.buckets):
            for path, size in zip(self._paths(bucket), self._lengths[bucket], strict=True):
                if size:
                    _sync(path)
        self.complete = complete
        state = {"version": _STATE_VERSION, "settings": self._settings, "complete": complete, "before": self._before}
        write_safely(self.folder / "state.json", state | self._progress())
        self._saved = time.monotonic()
        self._saving = self._saved - begun

    def _progress(self) -> dict[str, Any]:
        """How far the input is in, as plain data."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "filtered": self.filtered,
            "bad": dict(self.bad),
            "examples": list(self.examples),
            "after": self.after,
            "lengths": [list(sizes) for sizes in self._lengths],
        }

    @property
    def resumable(self) -> bool:
        """Whether a later start can go on from here."""
        return (self.folder / "state.json").exists()

    # --- emptying

    def bucket(self, number: int) -> Iterator[Part]:
        """One bucket in order, in parts that memory holds."""
        for left in self.folder.glob("*-*.*"):  # of a split that was cut short
            left.unlink()
        yield from self._parts(*self._paths(number), depth=self.buckets.bit_length() - 1)

    def _parts(self, tokens_path: Path, records_path: Path, depth: int) -> Iterator[Part]:
        """The documents of two files, whose keys have their first `depth` bits in common."""
        size = records_path.stat().st_size if records_path.exists() else 0
        if not size:
            return
        tokens = np.memmap(tokens_path, self.dtype, "r").view(np.ndarray)  # not empty: a document has its end
        if self._seed is None:  # in order as it is
            yield from _steps(records_path, tokens)
        elif size <= LARGEST_RECORDS and tokens.nbytes <= LARGEST_TOKENS or depth + SPLIT_BITS > 64:
            records = np.fromfile(records_path, RECORD)
            starts = np.cumsum(records["length"]) - records["length"]
            order = np.argsort(records["key"], kind="stable")  # equal keys stay in the order of the input
            yield records[order], starts[order], tokens
        else:
            yield from self._split(records_path, tokens, depth)

    def _split(self, records_path: Path, tokens: np.ndarray, depth: int) -> Iterator[Part]:
        stem = f"{records_path.stem}-{depth}"
        parts = [self._paths(f"{stem}.{part:02d}") for part in range(2**SPLIT_BITS)]
        shift, mask = np.uint64(64 - depth - SPLIT_BITS), np.uint64(2**SPLIT_BITS - 1)
        for records, starts, _ in _steps(records_path, tokens):
            which = (records["key"] >> shift) & mask
            for part in np.unique(which).tolist():
                chosen = np.flatnonzero(which == part)
                spans = zip(starts[chosen].tolist(), records["length"][chosen].tolist(), strict=True)
                with open(parts[part][0], "ab") as ids, open(parts[part][1], "ab") as file:
                    for start, length in spans:
                        ids.write(tokens[start : start + length].tobytes())
                    file.write(records[chosen].tobytes())
        for paths in parts:
            yield from self._parts(*paths, depth + SPLIT_BITS)
            for path in paths:
                path.unlink(missing_ok=True)

    def close(self, remove: bool) -> None:
        """Let go of the folder, and remove it."""
        if remove:
            # the state goes first: a folder half removed is then no corpus to go on with
            (self.folder / "state.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _steps(records_path: Path, tokens: np.ndarray) -> Iterator[Part]:
    """The documents of a file as they lie there, some at a time."""
    start = 0
    with open(records_path, "rb") as file:
        while len(records := np.fromfile(file, RECORD, _STEP)):
            starts = start + np.cumsum(records["length"]) - records["length"]
            yield records, starts, tokens
            start += int(records["length"].sum())


def sweep(folder: str) -> None:
    """Remove a spool without state that nobody holds: what a kill left after its corpus was finished."""
    if not os.path.isdir(folder) or os.path.exists(os.path.join(folder, "state.json")):
        return
    with open(os.path.join(folder, "lock"), "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        shutil.rmtree(folder, ignore_errors=True)


def place(file: str, line: int, reason: str) -> str:
    """``file:line: reason``."""
    return f"{file}:{line}: {reason}" if line else f"{file}: {reason}"


def write_safely(path: Path, data: Mapping[str, Any]) -> None:
    """JSON that is on disk whole, or as it was before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data), encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())

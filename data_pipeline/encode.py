"""Blocks of raw documents to token ids, in this process or in several; they come out in the order they went in."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import current_thread, main_thread
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.documents import FILTERED, RawDocument, understand
from data_pipeline.errors import DataError, WorkerError
from data_pipeline.filters import Filter
from data_pipeline.indexed import dtype_for
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

BLOCK_BYTES, BLOCK_DOCUMENTS = 1 << 19, 1024
_PR_SET_PDEATHSIG = 1


class Block(NamedTuple):
    """What a block of raw documents becomes.

    Attributes:
        ids, lengths: the tokens of its usable documents one after another, and how many each has.
        hashes: uint64[n, 2], of each text xxh3-64 and the high half of xxh3-128 (for texts above 240 bytes, these
            two are xxh3-128).
        text_bytes: int64[n].
        bad: (file, line, reason) of the documents left out, without those that a filter left out.
        filtered: how many a filter left out.
        end: (file, line) of the block's last document.
    """

    ids: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    text_bytes: np.ndarray
    bad: list[tuple[str, int, str]]
    filtered: int
    end: tuple[str, int]


class Encoder:
    """Encodes blocks in order, a bounded number of them ahead of the consumer.

    with Encoder("tok.model", model, "text", (), workers=8) as encoder:
        for block in encoder.encode(reader): ...
    """

    def __init__(self, path: str, model: Tokenizer, text_key: str, filters: Sequence[Filter], workers: int) -> None:
        self.settings = (path, text_key, tuple(filters))
        self.workers = workers
        _start_worker(*self.settings, model=model)
        self._processes: list[_Process] = []
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._threads = ThreadPoolExecutor(workers)  # one waits for each process
        self._interrupted = False
        self._handler: Any = None

    def __enter__(self) -> Encoder:
        if self.workers > 1:
            kinds = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("fork" if "fork" in kinds else "spawn")
            for _ in range(self.workers):
                self._processes.append(_Process(context, self.settings))
                self._idle.put(self._processes[-1])
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread():
                self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, number: int, frame: Any) -> None:
        """Ctrl-C ends the processes, whose blocks then fail: an exception amid what threads share would leave
        it broken. A second one is raised at once."""
        if self._interrupted:
            signal.default_int_handler(number, frame)
        self._interrupted = True
        for process in self._processes:
            process.end()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        if self._interrupted and kind is None:  # when nothing was left to wait for
            raise KeyboardInterrupt

    def encode(self, reader: Iterable[RawDocument]) -> Iterator[Block]:
        """The blocks of `reader`'s documents. Raises WorkerError when a process that encodes them is killed."""
        if self.workers == 1:
            yield from map(_encode_block, _blocks(reader))
            return
        waiting: deque[Future[Block]] = deque()
        for block in _blocks(reader):
            waiting.append(self._threads.submit(self._encode_elsewhere, block))
            if len(waiting) > 3 * self.workers:
                yield self._result(waiting.popleft())
        while waiting:
            yield self._result(waiting.popleft())

    def _result(self, future: Future[Block]) -> Block:
        while not future.done():
            wait([future], 0.5)  # a signal that comes just before it waits does not wake it
        if self._interrupted:
            raise KeyboardInterrupt
        return future.result()

    def _encode_elsewhere(self, block: list[RawDocument]) -> Block:
        process = self._idle.get()
        try:
            return process.encode(block)
        finally:
            self._idle.put(process)


class _Process:
    """A process that encodes one block after another. It shares no lock with the others, which one that is killed could
    keep, but has a pipe of its own, whose end tells of its own."""

    def __init__(self, context: Any, settings: tuple[Any, ...]) -> None:
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, os.getpid(), *settings), daemon=True)
        self._process.start()
        there.close()  # before the next process is forked, which would hold it open

    def encode(self, block: list[RawDocument]) -> Block:
        try:
            self._pipe.send(block)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerError(
                "a worker ended before its work did, most likely killed for want of memory; start again with fewer "
                "--workers"
            ) from None
        if not isinstance(answer, Block):
            error, trace = answer
            raise error from RuntimeError(trace)
        return answer

    def end(self) -> None:
        self._process.kill()

    def kill(self) -> None:
        self.end()
        self._process.join()


def _blocks(reader: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    block: list[RawDocument] = []
    size = 0
    for raw in reader:
        block.append(raw)
        size += raw.size
        if size >= BLOCK_BYTES or len(block) >= BLOCK_DOCUMENTS:
            yield block
            block, size = [], 0
    if block:
        yield block


_worker: dict[str, Any] = {}


def _serve(pipe: Connection, parent: int, *settings: Any) -> None:
    """Answer each block that comes with what it is encoded, or with the error and where it was raised. The process ends
    with its parent however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    _start_worker(*settings)
    while True:
        block = pipe.recv()
        try:
            answer: Any = _encode_block(block)
        except Exception as error:
            answer = error, traceback.format_exc()
        pipe.send(answer)


def _start_worker(path: str, text_key: str, filters: Sequence[Filter], model: Tokenizer | None = None) -> None:
    model = model or _worker.get("model") or load_tokenizer(path)  # a forked process has it already
    _worker.update(model=model, text_key=text_key, filters=filters, dtype=dtype_for(model.vocab_size))


def _encode_block(block: list[RawDocument]) -> Block:
    documents = [understand(raw, _worker["text_key"], _worker["filters"]) for raw in block]
    good = [document.text for document in documents if document.text is not None]
    bad = [(d.file, d.line, d.problem) for d in documents if d.problem not in (None, FILTERED)]
    filtered = sum(document.problem == FILTERED for document in documents)
    model, dtype = _worker["model"], _worker["dtype"]
    encoded = model.encode_many(good)
    lengths = np.fromiter((len(ids) + 1 for ids in encoded), np.int64, len(encoded))
    flat = np.full(int(lengths.sum()), model.eos_id, np.int64)
    start = 0
    for ids in encoded:
        flat[start : start + len(ids)] = ids
        start += len(ids) + 1
    if len(flat) and not 0 <= flat.min() <= flat.max() < model.vocab_size:
        raise DataError(
            f"the tokenizer gave id {flat.max()}, outside its own vocabulary of {model.vocab_size}; it is damaged"
        )
    texts = [text.encode("utf-8") for text in good]
    hashes = np.empty((len(texts), 2), np.uint64)
    for row, text in enumerate(texts):
        hashes[row] = xxhash.xxh3_64_intdigest(text), xxhash.xxh3_128_intdigest(text) >> 64
    return Block(
        flat.astype(dtype),
        lengths,
        hashes,
        np.fromiter(map(len, texts), np.int64, len(texts)),
        bad,
        filtered,
        (block[-1].file, block[-1].line),
    )

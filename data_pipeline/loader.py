"""The loader: the micro-batches of one data-parallel rank, read ahead in the background.

A step takes the next `global_batch_size` samples of the stream and cuts them into micro-batches of
`micro_batch_size` neighbours. Rank d of D gets the micro-batches d, d + D, d + 2D, ... of each step. So how
many ranks share the work changes who computes a micro-batch, never which samples are in it: router losses,
which belong to a micro-batch, do not depend on D.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Union

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.stream import Plan, SampleStream

BatchSize = Union[int, Callable[[int], int]]
"""The global batch size in sequences: constant, or as a function of the samples seen before the step."""

_END = object()
_PLANNED = 512  # samples that are located at once


class Loader:
    """An iterator over micro-batches, int64[micro_batch_size, S + 1], from sample `first_sample` to the last
    whole batch.

    It can be closed, and used in a `with` block. An error of the reading thread is raised by `next`, in its
    turn.

    Args:
        first_sample: the position to begin at; it is all the state there is.
        global_batch_size: see `BatchSize`; each value must divide by micro_batch_size * data_size.
        last_sample: where to end, if before the end of the stream.
        read_ahead: micro-batches kept ready.
    """

    def __init__(
        self,
        stream: SampleStream,
        first_sample: int,
        global_batch_size: BatchSize,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        *,
        last_sample: int | None = None,
        read_ahead: int = 16,
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank {data_rank} is not in 0..{data_size - 1}")
        self.stream, self.first_sample = stream, first_sample
        self.micro_batch_size, self.data_rank, self.data_size = micro_batch_size, data_rank, data_size
        self.last_sample = stream.num_samples if last_sample is None else min(last_sample, stream.num_samples)
        self._size = global_batch_size if callable(global_batch_size) else lambda _, size=global_batch_size: size
        self.batch_size_at(first_sample)  # a size that does not divide is an error here, not in the thread
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=max(1, read_ahead))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="loader", daemon=True)
        self._thread.start()

    def batch_size_at(self, sample: int) -> int:
        """The global batch size of the step that begins at `sample`, checked."""
        size, unit = self._size(sample), self.micro_batch_size * self.data_size
        if size <= 0 or size % unit:
            raise DataError(
                f"global_batch_size {size} does not divide into micro-batches of "
                f"{self.micro_batch_size} on {self.data_size} data-parallel ranks; take a multiple of {unit}"
            )
        return size

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if item is _END or isinstance(item, BaseException):
            self._closed.set()
            raise StopIteration if item is _END else item
        return item

    def _read(self) -> None:
        try:
            for plan in self._announced(self._plans()):
                if not self._put(self.stream.read(plan)):
                    return
            self._put(_END)
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            self._put(error)

    def _plans(self) -> Iterator[Plan]:
        """The plan of each micro-batch. Those of many are made together: it costs little more than one."""
        waiting = rank_samples(self)
        while some := list(islice(waiting, max(1, _PLANNED // self.micro_batch_size))):
            plan = self.stream.plan(np.concatenate(some))
            for first in range(0, len(plan.starts), self.micro_batch_size):
                yield plan.part(first, first + self.micro_batch_size)

    def _announced(self, plans: Iterator[Plan]) -> Iterator[Plan]:
        """The same plans, each announced to the stream a good while before it is read."""
        ahead = self.stream.ahead // self.micro_batch_size
        waiting: deque[Plan] = deque()
        for plan in plans:
            if self.stream.ahead:
                self.stream.expect(plan)
            waiting.append(plan)
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        """Stop reading; what was read ahead is dropped."""
        self._closed.set()
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                break
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rank_samples(loader: Loader) -> Iterator[np.ndarray]:
    """The numbers of the samples of each micro-batch of the loader's rank, to the last whole batch."""
    position = loader.first_sample
    while True:
        size = loader.batch_size_at(position)
        if position + size > loader.last_sample:
            return
        starts = range(position, position + size, loader.micro_batch_size)
        for start in starts[loader.data_rank :: loader.data_size]:
            yield np.arange(start, start + loader.micro_batch_size)
        position += size

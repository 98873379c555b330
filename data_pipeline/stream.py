"""The stream of samples: n in, tokens out. Nothing else decides what a sample is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline import order
from data_pipeline.errors import DataError
from data_pipeline.ledger import Consumption, Ledger
from data_pipeline.sources import Source

_MOST_AHEAD = 512


class Location(NamedTuple):
    """Where one sample comes from."""

    phase: str
    source: str
    epoch: int
    window: int


class Plan(NamedTuple):
    """Where several samples lie: the source of each, as an index into ``Ledger.names``, and its first token, to
    be taken modulo the source's length."""

    sources: list[int]
    starts: list[int]

    def part(self, first: int, last: int) -> Plan:
        """The samples [first, last) of it."""
        return Plan(self.sources[first:last], self.starts[first:last])


class SampleStream:
    """The samples of a run.

        stream = SampleStream(Ledger.start(mixture, sources), sources)
        stream.sample(10**8)                       # int64[S + 1]

    Attributes: ``ledger``, ``sources``, ``num_samples``, ``sequence_length``.

    Raises DataError when an opened source is not the one that the ledger knows under that name.
    """

    def __init__(self, ledger: Ledger, sources: Mapping[str, Source]) -> None:
        self.ledger, self.sources = ledger, dict(sources)
        self.num_samples, self.sequence_length = ledger.num_samples, ledger.sequence_length
        for name, source in self.sources.items():
            known = ledger.sources.get(name)
            if known is None or (known.num_tokens, known.fingerprint) != (
                source.num_tokens,
                source.fingerprint,
            ):
                raise DataError(
                    f"source {name!r} is not the one that the ledger records; resume the ledger with the mixture in use"
                )

    def locate(self, n: int) -> Location:
        """Phase, source, epoch and window of sample `n`."""
        place = self.ledger.locate(np.array([n]))
        phase = self.ledger.segments[int(place.segment[0])].phase
        return Location(phase, self.ledger.names[int(place.source[0])], int(place.epoch[0]), int(place.window[0]))

    def locate_many(self, n: Sequence[int] | np.ndarray) -> list[Location]:
        """`locate` of each of `n`, at once."""
        place = self.ledger.locate(np.asarray(n))
        rows = zip(
            place.segment.tolist(),
            place.source.tolist(),
            place.epoch.tolist(),
            place.window.tolist(),
            strict=True,
        )
        return [Location(self.ledger.segments[g].phase, self.ledger.names[s], e, w) for g, s, e, w in rows]

    def sample(self, n: int) -> np.ndarray:
        """int64[S + 1]: the tokens of sample `n`; inputs are all but the last, targets all but the first."""
        return self.samples(np.array([n]))[0]

    def samples(self, n: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64[len(n), S + 1]: the samples `n`, in that order.

        Raises DataError when a source is not opened (removed from the mixture: its past samples need it) or
        holds a bad token id.
        """
        return self.read(self.plan(n))

    def plan(self, n: Sequence[int] | np.ndarray) -> Plan:
        """Where the samples `n` lie. Cheapest for many at once; nothing is read."""
        place = self.ledger.locate(np.asarray(n))
        keys = self.ledger.source_keys[place.source]
        starts = order.shifts(keys, place.epoch, self.sequence_length) + place.window * self.sequence_length
        return Plan(place.source.tolist(), starts.tolist())

    @cached_property
    def ahead(self) -> int:
        """How many samples should be announced by `expect` before they are read; 0 where all is on this machine."""
        if not any(shard.remote for source in self.sources.values() for shard in source.shards):
            return 0
        from data_pipeline.remote import blocks

        return min(_MOST_AHEAD, blocks().ahead)

    def expect(self, plan: Plan) -> None:
        """Begin to fetch the samples of a plan, as far as they are on an object store."""
        for source, start in zip(plan.sources, plan.starts, strict=True):
            opened = self.sources.get(self.ledger.names[source])
            if opened is not None:
                opened.expect_window(start % opened.num_tokens)

    def read(self, plan: Plan) -> np.ndarray:
        """int64[len(plan.starts), S + 1]: the samples of a plan, in its order; raises as `samples` does."""
        out = np.empty((len(plan.starts), self.sequence_length + 1), np.int64)
        for row, source, start in zip(out, plan.sources, plan.starts, strict=True):
            opened = self._opened(self.ledger.names[source])
            opened.read_window_into(start % opened.num_tokens, row)
        return out

    def _opened(self, name: str) -> Source:
        if name not in self.sources:
            raise DataError(
                f"source {name!r} feeds this sample but is not in the mixture any more; add it to read the past again"
            )
        return self.sources[name]

    def phase_at(self, n: int) -> str:
        """The name of the phase that sample `n` belongs to; at the end of the run, its last phase."""
        return self.ledger.segments[self.ledger.segment_at(min(n, self.num_samples - 1))].phase

    def consumed(self, upto: int | None = None) -> list[Consumption]:
        """What the samples before `upto` (default: the whole run) take from each source in each phase."""
        return self.ledger.consumed(upto)

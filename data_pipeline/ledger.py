"""The ledger: which mixture fed which samples, and how far each source has been read. With it, sample n is a
function of n alone.

The ledger is a list of segments. One begins at each phase of the mixture and at each edit of the mixture file
during the run; it records the cursor of every source at its beginning: how many windows of it were handed out
before, since the run began. Within a segment `data_pipeline.assignment` says which source feeds sample n and
how many of its windows came before; the k-th window of a source belongs to epoch k // W, in the order of
`data_pipeline.order`. So nothing is repeated or left out within an epoch, whatever phases and edits there
are, and no file of indices is ever built.

A ledger never changes: `resume` and `skip` return new ones. It is stored in every checkpoint, so that a run
that falls back to a checkpoint from before an edit falls back to its ledger.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from data_pipeline import order
from data_pipeline.assignment import Assignment, integer_weights
from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.mixture import MixtureConfig, PhaseConfig
from data_pipeline.units import format_count

FORMAT_VERSION = 1


class SourceLike(Protocol):
    """What the ledger must know of a source: `sources.Source` has it, and so has SourceFacts."""

    num_tokens: int
    fingerprint: str


@dataclass(frozen=True)
class SourceFacts:
    """A source as the ledger remembers it."""

    num_tokens: int
    fingerprint: str


@dataclass(frozen=True)
class Segment:
    """A stretch of samples with constant weights.

    Attributes:
        first_sample: where it begins; it ends where the next begins, or with its mixture.
        origin: where the assignment of samples to sources began to count: `first_sample`, or that of an
            earlier segment when an edit left the weights of the current phase alone, so that such an edit
            moves no sample.
        cursors: windows of each source handed out before `first_sample`.
        skipped: ranges [first, last) of samples that were passed over, not trained on.
    """

    first_sample: int
    origin: int
    phase: str
    mixture: MixtureConfig
    cursors: dict[str, int]
    order_version: int = order.ORDER_VERSION
    skipped: tuple[tuple[int, int], ...] = ()

    @cached_property
    def config(self) -> PhaseConfig:
        return next(phase for phase in self.mixture.phases if phase.name == self.phase)

    @cached_property
    def assignment(self) -> Assignment:
        return Assignment(self.config.weights)

    def counts(self, sample: int) -> dict[str, int]:
        """Windows that the samples [first_sample, sample) take from each source."""
        return self.counts_between(self.first_sample, sample)

    def counts_between(self, first: int, last: int) -> dict[str, int]:
        """Windows that the samples [first, last), all of this segment, take from each source."""
        before = self.assignment.counts(first - self.origin)
        return {name: n - before[name] for name, n in self.assignment.counts(last - self.origin).items()}


@dataclass(frozen=True)
class Place:
    """Where samples come from. `source` indexes ``Ledger.names``, `segment` ``Ledger.segments``."""

    segment: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


@dataclass(frozen=True)
class Ledger:
    """See the module's text. Make one with `start`, go on with `resume`."""

    segments: tuple[Segment, ...]
    sources: dict[str, SourceFacts]
    tokenizer: str | None = None

    # --- making

    @classmethod
    def start(cls, mixture: MixtureConfig, sources: Mapping[str, SourceLike]) -> Ledger:
        """The ledger of a new run. Raises DataError when a source runs out of its max_epochs."""
        facts = _facts(mixture, sources)
        empty = cls((), facts, mixture.tokenizer_fingerprint())
        ledger = empty._extended(mixture, 0, dict.fromkeys(facts, 0), facts)
        ledger._check_epochs(mixture)
        return ledger

    def resume(self, mixture: MixtureConfig, sources: Mapping[str, SourceLike], at_sample: int) -> Ledger:
        """The ledger of a run that goes on at `at_sample` with `mixture`, which may have been edited.

        What lies ahead may change: weights (of the current phase too), sources, the length of the current
        phase, later phases. An edit of the past is a DataError that says what to do. Without any change the
        ledger itself comes back.
        """
        from data_pipeline.edits import check_past, same_future

        if not 0 <= at_sample <= self.num_samples:
            raise DataError(
                f"sample {at_sample} is outside this run's 0..{self.num_samples}; resume from one of its checkpoints"
            )
        facts = _facts(mixture, sources)
        if at_sample == 0:
            return (
                self
                if self._in_force(0).mixture == mixture and self.sources == facts
                else Ledger.start(mixture, sources)
            )
        tokenizer = mixture.tokenizer_fingerprint()
        check_past(self, mixture, facts, tokenizer, at_sample)
        last = self.segments[-1].mixture
        if same_future(last, mixture) and all(self.sources.get(name) == facts[name] for name in facts):
            self._check_epochs(mixture)
            return self
        past = tuple(segment for segment in self.segments if segment.first_sample < at_sample)
        cursors = self.cursors(at_sample)
        ledger = Ledger(past, self.sources, self.tokenizer or tokenizer)._extended(mixture, at_sample, cursors, facts)
        ledger._check_epochs(mixture)
        return ledger

    def skip(self, first: int, last: int) -> Ledger:
        """Record that samples [first, last) were passed over. Numbering stays: the run goes on at `last`."""
        if not 0 <= first < last <= self.num_samples:
            raise DataError(f"samples {first}..{last} cannot be skipped: the run has 0..{self.num_samples}")
        segments = []
        for segment, end in zip(self.segments, self._ends, strict=True):
            low, high = max(first, segment.first_sample), min(last, end)
            segments.append(
                replace(segment, skipped=_merged([*segment.skipped, (low, high)])) if low < high else segment
            )
        return replace(self, segments=tuple(segments))

    def _extended(
        self,
        mixture: MixtureConfig,
        at_sample: int,
        cursors: Mapping[str, int],
        facts: Mapping[str, SourceFacts],
    ) -> Ledger:
        """This ledger up to `at_sample`, and the phases of `mixture` from there on."""
        known = {**self.sources, **facts}
        now = {name: cursors.get(name, 0) for name in sorted(known)}
        segments = list(self.segments)
        begin = 0
        for phase, end in zip(mixture.phases, mixture.phase_ends, strict=True):
            first = max(begin, at_sample)
            if first < end:
                origin = self._origin(phase, begin, first)
                segment = Segment(first, origin, phase.name, mixture, dict(now))
                segments.append(segment)
                for name, n in segment.counts(end).items():
                    now[name] += n
            begin = end
        if not segments:
            raise DataError(
                f"the mixture's phases add up to {mixture.num_tokens} tokens, less than one "
                f"sequence of {mixture.sequence_length}; raise their tokens"
            )
        if segments[-1].mixture is not mixture:  # nothing lies ahead: the past remains as it was
            segments[-1] = replace(segments[-1], mixture=mixture)
        return Ledger(tuple(segments), known, self.tokenizer)

    def _origin(self, phase: PhaseConfig, begin: int, first: int) -> int:
        """Where the assignment of a segment at `first` counts from: on, in a phase whose weights stay."""
        if begin < first and self.segments:
            before = self.segments[-1]
            if before.phase == phase.name and integer_weights(before.config.weights) == integer_weights(phase.weights):
                return before.origin
        return first

    def _check_epochs(self, mixture: MixtureConfig) -> None:
        read = self.cursors(self.num_samples)
        length = mixture.sequence_length
        for name, source in mixture.sources.items():
            windows = self.windows[name]
            if source.max_epochs is None or read[name] <= Fraction(repr(source.max_epochs)) * windows:
                continue
            raise DataError(
                f"source {name!r} would be read {read[name] / windows:.2f} times but its "
                f"max_epochs is {source.max_epochs:g}: the "
                f"phases ask for {format_count(read[name] * length)} tokens of its "
                f"{format_count(windows * length)}; lower its weights or raise max_epochs"
            )

    # --- asking

    @property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return self._ends[-1]

    @property
    def sequence_length(self) -> int:
        return self.segments[-1].mixture.sequence_length

    @property
    def mixture(self) -> MixtureConfig:
        """The mixture in force at the end of the run: the latest."""
        return self.segments[-1].mixture

    @cached_property
    def names(self) -> list[str]:
        """Every source that the run has known, sorted."""
        return sorted(self.sources)

    @cached_property
    def windows(self) -> dict[str, int]:
        """Windows an epoch of each source: floor((T - 1) / S)."""
        return {name: (facts.num_tokens - 1) // self.sequence_length for name, facts in self.sources.items()}

    @cached_property
    def _firsts(self) -> list[int]:
        return [segment.first_sample for segment in self.segments]

    @cached_property
    def _ends(self) -> list[int]:
        return [*self._firsts[1:], self.segments[-1].mixture.num_samples]

    def segment_at(self, sample: int) -> int:
        """The number of the segment that feeds `sample`."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} is outside the run's 0..{self.num_samples - 1}")
        return bisect.bisect_right(self._firsts, sample) - 1

    def _in_force(self, sample: int) -> Segment:
        return self.segments[self.segment_at(min(sample, self.num_samples - 1))]

    def locate(self, samples: np.ndarray) -> Place:
        """Segment, source, epoch and window of each of `samples` (int[n], any order), in closed form."""
        n = np.array(samples, np.int64, ndmin=1)
        if len(n) and not 0 <= int(n.min()) <= int(n.max()) < self.num_samples:
            raise IndexError(f"samples {n.min()}..{n.max()} are outside the run's 0..{self.num_samples - 1}")
        number = np.searchsorted(np.array(self._firsts), n, side="right") - 1
        source, taken = np.zeros_like(n), np.zeros_like(n)
        for index in np.unique(number):
            here = number == index
            local, rank = self.segments[index].assignment.locate(n[here] - self.segments[index].origin)
            names, cursors = self._segment_tables(int(index))
            source[here], taken[here] = names[local], cursors[local] + rank
        keys, windows = self.source_keys, self._window_counts
        epoch, position = taken // windows[source], taken % windows[source]
        window = order.windows(keys[source], epoch, position, windows[source], self.sequence_length)
        return Place(number, source, epoch, window)

    def _segment_tables(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each source of a segment's assignment: its index in `names`, its cursor at `origin`."""
        if index not in self._tables:
            segment = self.segments[index]
            before = segment.assignment.counts(segment.first_sample - segment.origin)
            names = np.array([self.names.index(name) for name in segment.assignment.names], np.int64)
            cursors = np.array([segment.cursors[name] - before[name] for name in segment.assignment.names], np.int64)
            self._tables[index] = names, cursors
        return self._tables[index]

    @cached_property
    def _tables(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    @cached_property
    def source_keys(self) -> np.ndarray:
        """uint64: the key of each source of `names`, from which its order and shifts are drawn."""
        seed = self.segments[-1].mixture.seed
        return np.array([order.source_key(seed, name) for name in self.names], np.uint64)

    @cached_property
    def _window_counts(self) -> np.ndarray:
        return np.array([self.windows[name] for name in self.names], np.int64)

    def cursors(self, sample: int) -> dict[str, int]:
        """Windows of each source that the samples before `sample` take."""
        if sample == 0:
            return dict(self.segments[0].cursors)
        segment = self._in_force(sample - 1)
        taken = segment.counts(min(sample, self.num_samples))
        return {name: segment.cursors.get(name, 0) + taken.get(name, 0) for name in self.names}

    def consumed(self, upto: int | None = None, since: int = 0) -> list[Consumption]:
        """What the samples [since, upto) take from each source in each phase, in the mixture's order."""
        upto = self.num_samples if upto is None else upto
        rows: dict[tuple[str, str], list[int]] = {}
        for segment, end in zip(self.segments, self._ends, strict=True):
            low, high = max(since, segment.first_sample), min(upto, end)
            if low >= high:
                continue
            taken = segment.counts_between(low, high)
            spans = [(max(first, low), min(last, high)) for first, last in segment.skipped]
            passed = [segment.counts_between(*span) for span in spans if span[0] < span[1]]
            for name in segment.mixture.sources:
                if name in taken:
                    row = rows.setdefault((segment.phase, name), [0, 0])
                    row[0] += taken[name]
                    row[1] += sum(counts[name] for counts in passed)
        length = self.sequence_length
        return [
            Consumption(phase, name, samples, skipped, samples * length, samples / self.windows[name])
            for (phase, name), (samples, skipped) in rows.items()
        ]

    # --- storing

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_json` takes it back."""
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer,
            "sources": {name: vars(facts) for name, facts in self.sources.items()},
            "segments": [
                {
                    "first_sample": segment.first_sample,
                    "origin": segment.origin,
                    "phase": segment.phase,
                    "order_version": segment.order_version,
                    "cursors": segment.cursors,
                    "skipped": [list(span) for span in segment.skipped],
                    "mixture": segment.mixture.model_dump(),
                }
                for segment in self.segments
            ],
        }

    def to_json(self) -> str:
        """The text of a ledger.json."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, stored: str | bytes | Mapping[str, Any]) -> Ledger:
        """A ledger from `to_json`'s text or `to_dict`'s data. Raises DamagedDataError when it is not one."""
        try:
            data = json.loads(stored) if isinstance(stored, (str, bytes)) else stored
            if data["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"the ledger has format {data['format_version']}, this version reads "
                    f"{FORMAT_VERSION}; update moe-train"
                )
            sources = {name: SourceFacts(**facts) for name, facts in data["sources"].items()}
            segments = tuple(_segment(item) for item in data["segments"])
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise DamagedDataError(
                f"the ledger cannot be read ({type(error).__name__}: {reason}); use another checkpoint's"
            ) from None
        if not segments:
            raise DamagedDataError("the ledger has no segments; use another checkpoint's")
        return cls(segments, sources, data.get("tokenizer"))


@dataclass(frozen=True)
class Consumption:
    """What one phase takes from one source. `samples` counts skipped ones too; `epochs` are passes."""

    phase: str
    source: str
    samples: int
    skipped: int
    tokens: int
    epochs: float


def _segment(item: Mapping[str, Any]) -> Segment:
    if item["order_version"] != order.ORDER_VERSION:
        raise DataError(
            f"the ledger asks for order version {item['order_version']}, this version of moe-train "
            f"knows {order.ORDER_VERSION}; update it"
        )
    return Segment(
        item["first_sample"],
        item["origin"],
        item["phase"],
        MixtureConfig.model_validate(item["mixture"]),
        dict(item["cursors"]),
        item["order_version"],
        tuple((first, last) for first, last in item["skipped"]),
    )


def _facts(mixture: MixtureConfig, sources: Mapping[str, SourceLike]) -> dict[str, SourceFacts]:
    return {name: SourceFacts(sources[name].num_tokens, sources[name].fingerprint) for name in sorted(mixture.sources)}


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(_joined(sorted(spans)))


def _joined(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    first, last = spans[0]
    for low, high in spans[1:]:
        if low <= last:
            last = max(last, high)
        else:
            yield first, last
            first, last = low, high
    yield first, last

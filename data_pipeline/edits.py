"""Which edits of a mixture a running run can take up: what lies ahead may change, what was fed may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from data_pipeline.assignment import integer_weights
from data_pipeline.errors import DataError
from data_pipeline.mixture import MixtureConfig, PhaseConfig
from data_pipeline.units import format_count

if TYPE_CHECKING:
    from data_pipeline.ledger import Ledger, SourceFacts


def same_future(old: MixtureConfig, new: MixtureConfig) -> bool:
    """Whether `new` feeds what `old` does; paths and limits may differ."""
    return set(old.sources) == set(new.sources) and [_fed(old, i) for i in range(len(old.phases))] == [
        _fed(new, i) for i in range(len(new.phases))
    ]


def _fed(mixture: MixtureConfig, number: int) -> tuple[str, int, dict[str, int]]:
    phase = mixture.phases[number]
    return phase.name, int(phase.tokens), integer_weights(phase.weights)


def check_past(
    ledger: Ledger,
    new: MixtureConfig,
    facts: Mapping[str, SourceFacts],
    tokenizer: str | None,
    at_sample: int,
) -> None:
    """Raise DataError when `new` says other than `ledger` about the samples before `at_sample` (> 0)."""
    old = ledger.segments[ledger.segment_at(at_sample - 1)].mixture
    branch = "start a new run for it"
    if new.seed != old.seed:
        raise DataError(f"the mixture's seed was changed from {old.seed} to {new.seed}; set it back, or {branch}")
    if new.sequence_length != old.sequence_length:
        raise DataError(
            f"the mixture's sequence_length was changed from {old.sequence_length} to "
            f"{new.sequence_length}; set it back, or {branch}"
        )
    if None not in (tokenizer, ledger.tokenizer) and tokenizer != ledger.tokenizer:
        raise DataError(
            f"the mixture's tokenizer {new.tokenizer} is not the one this run began with; set it back, or {branch}"
        )
    _check_content(ledger, facts, at_sample)
    fed = {segment.phase: segment.config for segment in ledger.segments if segment.first_sample < at_sample}
    _check_phases(old, new, fed, at_sample, branch)


def _check_content(ledger: Ledger, facts: Mapping[str, SourceFacts], at_sample: int) -> None:
    cursors = ledger.cursors(at_sample)
    for name, now in facts.items():
        before = ledger.sources.get(name)
        if before is not None and before != now and cursors[name]:
            raise DataError(
                f"source {name!r} has other content than when this run read it "
                f"({format_count(before.num_tokens)} tokens then, "
                f"{format_count(now.num_tokens)} now); give the new content a new name, or put the "
                "old files back"
            )


def _check_phases(
    old: MixtureConfig, new: MixtureConfig, fed: Mapping[str, PhaseConfig], at_sample: int, branch: str
) -> None:
    begin, length = 0, old.sequence_length
    for number, (phase, old_end) in enumerate(zip(old.phases, old.phase_ends, strict=True)):
        if begin >= at_sample:
            return
        begin = old_end
        if number >= len(new.phases) or new.phases[number].name != phase.name:
            found = f"found {new.phases[number].name!r}" if number < len(new.phases) else "it was removed"
            raise DataError(f"phase {number + 1} has begun as {phase.name!r} but {found}; put it back, or {branch}")
        other, new_end = new.phases[number], new.phase_ends[number]
        if old_end < at_sample and other.tokens != phase.tokens:
            raise DataError(
                f"phase {phase.name!r} is finished with {phase.tokens} tokens but now has "
                f"{other.tokens}; set it back, and add or lengthen a later phase"
            )
        if new_end < min(old_end, at_sample):
            raise DataError(
                f"phase {phase.name!r} was shortened to {other.tokens} tokens, to before now: "
                f"{at_sample * length} tokens of the run are fed; let it end at or after now"
            )
        before = phase, fed.get(phase.name, phase)  # as the file said at the last start, and as it was fed
        if new_end <= at_sample and not any(_same_weights(past, other, new, at_sample) for past in before):
            raise DataError(
                f"the weights of phase {phase.name!r} were changed but it is finished; set them "
                "back, and change those of a later phase"
            )


def _same_weights(past: PhaseConfig, now: PhaseConfig, new: MixtureConfig, at_sample: int) -> bool:
    """Whether a finished phase says what it said of the sources that `new` still has. Where nothing lies ahead `new`
    stands for the past itself, which needs them all."""
    ahead = new.num_samples > at_sample
    left = {name: weight for name, weight in past.weights.items() if name in new.sources or not ahead}
    return not any(left.values()) or integer_weights(left) == integer_weights(now.weights)

"""The ledger: sample n from n alone; the future may be edited, the past may not; nothing is repeated or lost
within an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.ledger import Ledger, SourceFacts
from data_pipeline.mixture import MixtureConfig

S = 16


def facts(**tokens: int) -> dict[str, SourceFacts]:
    return {name: SourceFacts(count, f"hash of {name}") for name, count in tokens.items()}


FACTS = facts(a=5001, b=701, c=50001)


def mixture(*phases: tuple[str, int, dict], **changes) -> MixtureConfig:
    names = sorted({name for _, _, weights in phases for name in weights})
    values = {
        "sequence_length": S,
        "seed": 7,
        "sources": {name: {"paths": [f"/{name}.bin"]} for name in names},
        "phases": [{"name": name, "tokens": samples * S, "weights": weights} for name, samples, weights in phases],
    }
    return MixtureConfig(**(values | changes))


TWO = mixture(("one", 1000, {"a": 3, "b": 1}), ("two", 500, {"a": 1, "c": 2}))


def places(ledger: Ledger, first: int = 0, last: int | None = None) -> list[tuple[str, int, int]]:
    place = ledger.locate(np.arange(first, ledger.num_samples if last is None else last))
    return [
        (ledger.names[s], e, w)
        for s, e, w in zip(place.source, place.epoch.tolist(), place.window.tolist(), strict=True)
    ]


def assert_no_window_is_repeated_or_left_out(ledger: Ledger) -> None:
    """Of every source: each window at most once an epoch, and epoch e + 1 begins only when epoch e is
    complete."""
    by_source: dict[str, list[tuple[int, int]]] = {}
    for name, epoch, window in places(ledger):
        by_source.setdefault(name, []).append((epoch, window))
    for name, seen in by_source.items():
        assert max(Counter(seen).values()) == 1
        epochs = [epoch for epoch, _ in seen]
        assert epochs == sorted(epochs)
        counts = Counter(epochs)
        assert all(counts[epoch] == ledger.windows[name] for epoch in range(max(epochs)))


def test_phases_end_where_their_tokens_do() -> None:
    odd = mixture(("one", 10, {"a": 1}), ("two", 10, {"b": 1}))
    odd = odd.model_copy(update={"phases": [phase.model_copy(update={"tokens": 167}) for phase in odd.phases]})
    ledger = Ledger.start(odd, FACTS)
    assert [segment.first_sample for segment in ledger.segments] == [
        0,
        167 // S,
    ] and ledger.num_samples == 334 // S


def test_one_sample_or_many_in_any_order_is_the_same() -> None:
    ledger = Ledger.start(TWO, FACTS)
    everything = places(ledger)
    shuffled = np.random.default_rng(0).permutation(ledger.num_samples)
    place = ledger.locate(shuffled)
    for n, source, window in zip(shuffled[:200], place.source[:200], place.window[:200], strict=True):
        assert everything[n][0] == ledger.names[source] and everything[n][2] == window
        assert places(ledger, int(n), int(n) + 1) == [everything[n]]


def test_nothing_is_repeated_across_phases() -> None:
    ledger = Ledger.start(TWO, FACTS)
    assert_no_window_is_repeated_or_left_out(ledger)
    assert ledger.cursors(1000) == {"a": 750, "b": 250, "c": 0}
    assert places(ledger, 1000)[0][1] in (0, 2)  # a goes on in its third epoch, c begins


def test_stored_and_read_again() -> None:
    ledger = Ledger.start(TWO, FACTS).skip(10, 20)
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger and places(again) == places(ledger)
    assert Ledger.from_json(ledger.to_dict()) == ledger
    for damaged in ("{", "{}", "[]", ledger.to_json().replace('"phase"', '"phrase"')):
        with pytest.raises(DamagedDataError):
            Ledger.from_json(damaged)
    with pytest.raises(DataError, match="update"):
        Ledger.from_json(ledger.to_json().replace('"order_version": 1', '"order_version": 2'))


EDITS = {
    "weights of the current phase": mixture(("one", 1000, {"a": 1, "b": 2}), ("two", 500, {"a": 1, "c": 2})),
    "a source added": mixture(("one", 1000, {"a": 1, "b": 2, "c": 1}), ("two", 500, {"a": 1, "c": 2})),
    "a source removed": mixture(("one", 1000, {"a": 1}), ("two", 500, {"a": 1, "c": 2})),
    "the current phase longer": mixture(("one", 1600, {"a": 3, "b": 1}), ("two", 500, {"a": 1, "c": 2})),
    "the current phase ends now": mixture(("one", 400, {"a": 3, "b": 1}), ("two", 500, {"a": 1, "c": 2})),
    "a phase added": mixture(("one", 1000, {"a": 3, "b": 1}), ("two", 500, {"a": 1, "c": 2}), ("three", 99, {"b": 1})),
    "a later phase removed": mixture(("one", 1000, {"a": 3, "b": 1})),
    "a later phase changed": mixture(("one", 1000, {"a": 3, "b": 1}), ("deux", 600, {"b": 1, "c": 2})),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_future_keep_the_past_and_lose_nothing(edit: str) -> None:
    before = Ledger.start(TWO, FACTS)
    after = before.resume(EDITS[edit], FACTS, 400)
    assert after.num_samples == EDITS[edit].num_samples
    assert places(after, 0, 400) == places(before, 0, 400)
    assert after.cursors(400) == before.cursors(400)
    assert [segment.first_sample for segment in after.segments][:2] == [0, 400]
    assert_no_window_is_repeated_or_left_out(after)
    assert Ledger.from_json(after.to_json()) == after
    assert after.resume(EDITS[edit], FACTS, 400) == after
    if edit in ("a phase added", "a later phase changed", "the current phase longer"):
        assert places(after, 0, 1000) == places(before, 0, 1000)  # the weights in force were left alone


def test_no_edit_no_change() -> None:
    ledger = Ledger.start(TWO, FACTS)
    same = mixture(("one", 1000, {"a": 30, "b": 10}), ("two", 500, {"a": 0.5, "c": 1}))
    moved = same.model_copy(
        update={"sources": {n: s.model_copy(update={"paths": ["/x"]}) for n, s in same.sources.items()}}
    )
    for at in (0, 1, 999, 1000, 1500):
        assert ledger.resume(TWO, FACTS, at) is ledger
    assert ledger.resume(moved, FACTS, 700) is ledger


def test_a_source_removed_and_added_again_goes_on_from_its_cursor() -> None:
    ledger = Ledger.start(TWO, FACTS)
    without = ledger.resume(
        mixture(("one", 1000, {"a": 1}), ("two", 500, {"a": 1, "c": 2})), facts(a=5001, c=50001), 300
    )
    again = without.resume(mixture(("one", 2000, {"a": 1, "b": 5}), ("two", 500, {"a": 1, "c": 2})), FACTS, 600)
    assert again.cursors(600)["b"] == ledger.cursors(300)["b"] == 75
    assert_no_window_is_repeated_or_left_out(again)


def test_a_source_goes_for_good_once_no_phase_ahead_reads_it() -> None:
    """Also from the phases that are finished, whose samples keep the weights that they were fed with."""
    before = Ledger.start(TWO, FACTS)
    last = ("two", 500, {"a": 1, "c": 2})
    gone = mixture(("one", 1000, {"a": 3}), last)
    assert set(gone.sources) == {"a", "c"}
    for at in (1000, 1200):
        after = before.resume(gone, facts(a=5001, c=50001), at)
        assert places(after) == places(before)
        assert after.consumed() == before.consumed() and after.cursors(at) == before.cursors(at)
        assert Ledger.from_json(after.to_json()) == after
        assert after.resume(gone, facts(a=5001, c=50001), at + 100) is after
        # it comes back: with the file as it was, or in a later phase alone
        assert places(after.resume(TWO, FACTS, 1300)) == places(before)
        again = after.resume(mixture(("one", 1000, {"a": 3}), last, ("three", 400, {"b": 1})), FACTS, 1300)
        assert places(again, 0, 1500) == places(before)
        assert_no_window_is_repeated_or_left_out(again)
    alone = Ledger.start(mixture(("one", 100, {"b": 1}), ("two", 50, {"a": 1})), FACTS)
    assert places(alone.resume(mixture(("one", 100, {"a": 1}), ("two", 50, {"a": 1})), FACTS, 120)) == places(alone)


@pytest.mark.parametrize(
    ("at", "edited"),
    [
        (1200, mixture(("one", 1000, {"a": 3}), ("two", 500, {"a": 1, "b": 1}))),  # b is still there
        (1200, mixture(("one", 1000, {"a": 3, "c": 1}), ("two", 500, {"a": 1, "c": 2}))),  # c was not read in it
        (1500, mixture(("one", 1000, {"a": 3}), ("two", 500, {"a": 1, "c": 2}))),  # nothing is ahead
        (1200, mixture(("one", 1000, {"a": 3}), ("two", 200, {"a": 1}))),
    ],
)
def test_a_source_that_is_still_needed_stays(at: int, edited: MixtureConfig) -> None:
    with pytest.raises(DataError, match="the weights of phase 'one' were changed but it is finished"):
        Ledger.start(TWO, FACTS).resume(edited, FACTS, at)


def test_the_shares_of_the_sources_that_stay_are_as_they_were() -> None:
    three = mixture(("one", 100, {"a": 3, "b": 1, "c": 2}), ("two", 50, {"a": 1}))
    ledger = Ledger.start(three, FACTS)
    ledger.resume(mixture(("one", 100, {"a": 1.5, "c": 1}), ("two", 50, {"a": 1})), FACTS, 110)
    with pytest.raises(DataError, match="the weights of phase 'one' were changed"):
        ledger.resume(mixture(("one", 100, {"a": 3, "c": 1}), ("two", 50, {"a": 1})), FACTS, 110)


def test_a_finished_run_can_go_on() -> None:
    ledger = Ledger.start(TWO, FACTS)
    longer = mixture(("one", 1000, {"a": 3, "b": 1}), ("two", 900, {"a": 1, "c": 2}))
    on = ledger.resume(longer, FACTS, 1500)
    assert on.num_samples == 1900 and on.segments[-1].first_sample == 1500
    assert places(on) == places(Ledger.start(longer, FACTS))


def test_falling_back_to_before_an_edit() -> None:
    before = Ledger.start(TWO, FACTS)
    after = before.resume(EDITS["a source added"], FACTS, 800)
    assert before.resume(EDITS["a source added"], FACTS, 500).segments[1].first_sample == 500
    back = after.resume(TWO, FACTS, 500)  # its own ledger, at a checkpoint from before the edit
    assert places(back) == places(before)


@pytest.mark.parametrize(
    ("at", "edited", "part"),
    [
        (
            400,
            mixture(*[(p.name, p.tokens // S, p.weights) for p in TWO.phases], seed=8),
            "seed was changed from 7 to 8",
        ),
        (400, mixture(("one", 500, {"a": 3, "b": 1}), sequence_length=2 * S), "sequence_length was changed"),
        (
            1200,
            mixture(("one", 1000, {"a": 3, "b": 2}), ("two", 500, {"a": 1, "c": 2})),
            "weights of phase 'one'",
        ),
        (
            1000,
            mixture(("one", 1000, {"a": 3, "b": 2}), ("two", 500, {"a": 1, "c": 2})),
            "weights of phase 'one'",
        ),
        (
            400,
            mixture(("one", 399, {"a": 3, "b": 1}), ("two", 500, {"a": 1, "c": 2})),
            "shortened to 6384 tokens",
        ),
        (
            1200,
            mixture(("one", 900, {"a": 3, "b": 1}), ("two", 500, {"a": 1, "c": 2})),
            "finished with 16000 tokens",
        ),
        (1200, mixture(("two", 500, {"a": 1, "c": 2})), "has begun as 'one' but found 'two'"),
        (1200, mixture(("one", 1000, {"a": 3, "b": 1})), "has begun as 'two' but it was removed"),
        (1501, TWO, "outside this run's 0..1500"),
    ],
)
def test_edits_of_the_past_are_refused(at: int, edited: MixtureConfig, part: str) -> None:
    with pytest.raises(DataError) as info:
        Ledger.start(TWO, FACTS).resume(edited, FACTS, at)
    assert part in str(info.value) and "\n" not in str(info.value) and info.value.exit_code == 2


def test_changed_content_needs_a_new_name() -> None:
    ledger = Ledger.start(TWO, FACTS)
    with pytest.raises(DataError, match="source 'a' has other content.*new name"):
        ledger.resume(TWO, FACTS | {"a": SourceFacts(5001, "other")}, 400)
    changed = FACTS | {"c": SourceFacts(9001, "other")}  # not read yet
    later = ledger.resume(TWO, changed, 400)
    assert later.windows["c"] == 9000 // S and places(later, 0, 1000) == places(ledger, 0, 1000)


def test_max_epochs() -> None:
    limited = {"a": {"paths": ["/a"], "max_epochs": 2.9}, "b": {"paths": ["/b"]}, "c": {"paths": ["/c"]}}
    phases = [phase.model_dump() for phase in TWO.phases]
    exact = 917 / 312  # windows of a that are read, of those it has
    over = MixtureConfig(sequence_length=S, seed=7, sources=limited, phases=phases)
    with pytest.raises(
        DataError, match=r"source 'a' would be read 2.94 times but its max_epochs is 2.9: .*14.672K .*4.992K"
    ):
        Ledger.start(over, FACTS)
    limited["a"]["max_epochs"] = exact + 1e-9
    enough = MixtureConfig(sequence_length=S, seed=7, sources=limited, phases=phases)
    assert Ledger.start(enough, FACTS).cursors(1500)["a"] == 917
    with pytest.raises(DataError, match="max_epochs"):
        Ledger.start(TWO, FACTS).resume(over, FACTS, 1200)


def test_skipped_samples_are_recorded() -> None:
    ledger = Ledger.start(TWO, FACTS)
    skipped = ledger.skip(990, 1010).skip(1005, 1020).skip(3, 4)
    assert [segment.skipped for segment in skipped.segments] == [((3, 4), (990, 1000)), ((1000, 1020),)]
    assert places(skipped) == places(ledger)
    assert sum(row.skipped for row in skipped.consumed()) == 31
    assert sum(row.skipped for row in skipped.consumed(1005)) == 16
    with pytest.raises(DataError):
        ledger.skip(5, 5)


def test_consumed_adds_up() -> None:
    ledger = Ledger.start(TWO, FACTS)
    rows = ledger.consumed(1200)
    assert [(row.phase, row.source) for row in rows] == [
        ("one", "a"),
        ("one", "b"),
        ("two", "a"),
        ("two", "c"),
    ]
    assert sum(row.samples for row in rows) == 1200 and sum(row.tokens for row in rows) == 1200 * S
    counted = Counter(name for name, _, _ in places(ledger, 0, 1200))
    assert counted["a"] == rows[0].samples + rows[2].samples
    assert rows[1].epochs == pytest.approx(rows[1].samples / (700 // S))


names = st.sampled_from(["a", "b", "c", "d"])
weights = st.dictionaries(names, st.one_of(st.integers(1, 100), st.floats(0.01, 10)), min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), weights), min_size=1, max_size=3), st.data())
def test_any_chain_of_edits_loses_nothing(phases: list, data: st.DataObject) -> None:
    known = facts(a=5001, b=701, c=S + 1, d=12345)

    def build(parts: list) -> MixtureConfig:
        return mixture(*[(f"p{i}", samples, shares) for i, (samples, shares) in enumerate(parts)])

    ledger = Ledger.start(build(phases), known)
    at = 0
    for _ in range(3):
        at = data.draw(st.integers(at, ledger.num_samples))
        ends = np.cumsum([samples for samples, _ in phases]).tolist()
        current = sum(end < at for end in ends[:-1])
        begun = at - (ends[current - 1] if current else 0)
        edited = phases[:current] + [(begun + data.draw(st.integers(1, 200)), data.draw(weights))]
        edited += data.draw(st.lists(st.tuples(st.integers(1, 200), weights), max_size=2))
        after = ledger.resume(build(edited), known, at)
        assert places(after, 0, at) == places(ledger, 0, at)
        assert_no_window_is_repeated_or_left_out(after)
        ledger, phases = after, edited


def test_a_run_of_the_real_size_needs_no_time() -> None:
    """1.25T tokens of 500 sources: any sample at once, counts within the bound."""
    sizes = {f"s{i:03d}": 10**9 + i * 10**7 for i in range(500)}
    shares = {name: 1.0 + 400 * (name == "s007") for name in sizes}
    big = MixtureConfig(
        sequence_length=4096,
        seed=1,
        sources={name: {"paths": ["/x"]} for name in sizes},
        phases=[
            {"name": "stable", "tokens": "1T", "weights": shares},
            {"name": "decay", "tokens": "250B", "weights": shares},
        ],
    )
    ledger = Ledger.start(big, facts(**sizes))
    assert ledger.num_samples == 305_175_781
    place = ledger.locate(np.array([0, 244_140_624, 244_140_625, 305_175_780]))
    assert place.segment.tolist() == [0, 0, 1, 1]
    assert abs(ledger.cursors(244_140_625)["s007"] - 244_140_625 * 401 / 900) < 2

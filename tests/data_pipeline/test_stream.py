"""Sources, stream and loader: the right tokens, the same for every rank count, batch size and resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import order
from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.indexed import IndexedReader, IndexedWriter
from data_pipeline.ledger import Ledger
from data_pipeline.loader import Loader
from data_pipeline.mixture import MixtureConfig
from data_pipeline.sources import Source, open_sources
from data_pipeline.stream import SampleStream
from tests.data_pipeline.corpora import write_corpus

PHASES = [
    {"name": "one", "tokens": 16 * 300, "weights": {"a": 3, "b": 1}},
    {"name": "two", "tokens": 16 * 100, "weights": {"a": 1, "b": 1}},
]


@pytest.fixture
def stream(make_mixture) -> SampleStream:
    mixture = make_mixture(PHASES, a=2000, b=700)
    sources = open_sources(mixture)
    return SampleStream(Ledger.start(mixture, sources), sources)


def flat(source: Source) -> np.ndarray:
    return np.concatenate([shard.tokens(0, shard.num_tokens) for shard in source.shards]).astype(np.int64)


def test_a_sample_is_the_window_that_the_ledger_says(stream: SampleStream) -> None:
    for n in range(stream.num_samples):
        phase, name, epoch, window = stream.locate(n)
        source = stream.sources[name]
        tokens = flat(source)
        start = int(order.shifts(source.key, epoch, 16)[0]) + window * 16
        expected = tokens[(start + np.arange(17)) % len(tokens)]
        sample = stream.sample(n)
        assert sample.dtype == np.int64 and np.array_equal(sample, expected)
        assert np.array_equal(source.window(epoch, window), expected)
        assert phase == stream.phase_at(n) == ("one" if n < 300 else "two")
    assert stream.locate_many([5, 399]) == [stream.locate(5), stream.locate(399)]
    assert stream.phase_at(stream.num_samples) == "two"
    with pytest.raises(IndexError):
        stream.sample(stream.num_samples)


def test_an_epoch_covers_the_text(tmp_path: Path) -> None:
    """Every window of an epoch once, over the ends of three shards and the source's own, overlapping in
    single tokens only."""
    with IndexedWriter(tmp_path / "x", np.int32) as writer:
        writer.add(np.arange(100))
    with IndexedWriter(tmp_path / "y", np.int32) as writer:
        writer.add(np.arange(100, 107))
    with IndexedWriter(tmp_path / "z", np.int32) as writer:
        writer.add(np.arange(107, 1003))
    shards = [IndexedReader(tmp_path / name) for name in "xyz"]
    source = Source("s", shards, sequence_length=10, seed=0, fingerprint="f")
    assert source.num_windows == 100
    firsts = []
    for epoch in range(3):
        windows = np.stack([source.window(epoch, w) for w in range(100)])
        assert np.array_equal(windows % 1003, (windows[:, :1] + np.arange(11)) % 1003)
        assert len(np.unique(windows[:, :-1])) == 1000  # inputs: 1000 of the 1003 tokens, each once
        firsts.append(windows[0, 0])
    assert len(set(firsts)) > 1  # shifted from epoch to epoch
    assert source.read(1000, 10).tolist() == [1000, 1001, 1002, 0, 1, 2, 3, 4, 5, 6]


def batches(stream: SampleStream, first: int, size, micro: int, ranks: int) -> list[np.ndarray]:
    """Global micro-batches in order, put together from every rank's own."""
    loaders = [Loader(stream, first, size, micro, rank, ranks, read_ahead=2) for rank in range(ranks)]
    own = [list(loader) for loader in loaders]
    for loader in loaders:
        loader.close()
    assert len({len(part) for part in own}) == 1
    return [part for together in zip(*own, strict=True) for part in together]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_same_micro_batches_for_any_number_of_ranks(stream: SampleStream, ranks: int) -> None:
    together = batches(stream, 0, 24, 4, ranks)
    assert len(together) == 400 // 24 * 6
    for number, micro_batch in enumerate(together):
        assert np.array_equal(micro_batch, stream.samples(np.arange(number * 4, number * 4 + 4)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 300), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_resumed_anywhere_with_any_batch_it_is_one_stream(
    stream: SampleStream, first: int, micro: int, per_rank: int, ranks: int
) -> None:
    together = batches(stream, first, micro * per_rank * ranks, micro, ranks)
    assert together, "at least one batch fits"
    tokens = np.concatenate(together)
    assert np.array_equal(tokens, stream.samples(np.arange(first, first + len(tokens))))
    assert stream.num_samples - (first + len(tokens)) < micro * per_rank * ranks


def test_a_batch_size_that_grows(stream: SampleStream) -> None:
    sizes = lambda seen: 8 if seen < 100 else 16  # noqa: E731
    together = batches(stream, 0, sizes, 4, 2)
    assert sum(map(len, together)) == 104 + 16 * ((400 - 104) // 16)
    resumed = batches(stream, 104, sizes, 4, 1)
    assert np.array_equal(np.concatenate(resumed), np.concatenate(together)[104:])


def test_loader_refuses_and_ends(stream: SampleStream) -> None:
    with pytest.raises(DataError, match="take a multiple of 12"):
        Loader(stream, 0, 16, 4, 0, 3)
    with Loader(stream, 0, 16, 4, last_sample=40) as loader:
        assert len(list(loader)) == 8
        with pytest.raises(StopIteration):
            next(loader)
    loader = Loader(stream, 0, 16, 4, read_ahead=1)
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()


def test_an_error_of_the_reading_thread_reaches_the_consumer(make_mixture) -> None:
    mixture = make_mixture(PHASES, a=2000, b=700)
    sources = open_sources(mixture)
    stream = SampleStream(Ledger.start(mixture, sources), sources)
    stream.sources["b"].vocab_size = 1
    first_bad = next(n for n in range(400) if stream.locate(n).source == "b")
    with Loader(stream, 0, 1, 1) as loader:
        for n in range(first_bad):
            assert np.array_equal(next(loader)[0], stream.sample(n))
        with pytest.raises(DataError, match="source 'b'.*vocabulary"):
            next(loader)


def test_fingerprints(tmp_path: Path) -> None:
    def fingerprint(*prefixes: str) -> str:
        mixture = MixtureConfig(
            sequence_length=16,
            seed=0,
            sources={"a": {"paths": [str(tmp_path / prefix) for prefix in prefixes]}},
            phases=[{"name": "x", "tokens": 160, "weights": {"a": 1}}],
        )
        return open_sources(mixture)["a"].fingerprint

    write_corpus(tmp_path / "x", 300_000, seed=1)
    write_corpus(tmp_path / "y", 300_000, seed=2)
    (tmp_path / "moved").mkdir()
    for end in (".bin", ".idx"):
        (tmp_path / "moved" / f"x{end}").write_bytes((tmp_path / f"x{end}").read_bytes())
    assert fingerprint("x") == fingerprint("moved/x") != fingerprint("y")
    assert fingerprint("x", "y") != fingerprint("y", "x")


def test_a_stream_of_other_sources_is_refused(make_mixture, tmp_path: Path) -> None:
    mixture = make_mixture(PHASES, a=2000, b=700)
    ledger = Ledger.start(mixture, open_sources(mixture))
    write_corpus(tmp_path / "a", 2000, seed=99)
    with pytest.raises(DataError, match="source 'a' is not the one"):
        SampleStream(ledger, open_sources(mixture))


def test_a_file_cut_short_is_damage(make_mixture, tmp_path: Path) -> None:
    mixture = make_mixture(PHASES, a=2000, b=700)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-100])
    with pytest.raises(DamagedDataError, match="source 'a': .*cut short") as info:
        open_sources(mixture)
    assert info.value.exit_code == 4

"""The catalogue of shards: opened once, hashed once, and never believed about files that changed."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from data_pipeline import catalogue, indexed, sources
from data_pipeline.errors import DamagedDataError
from data_pipeline.mixture import MixtureConfig
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from tests.data_pipeline.corpora import text, write_corpus


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Catalogues are worth having for anything, and kept here."""
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "_WORTH_SHARDS", 1)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a corpus in shards, with a manifest."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "raw.jsonl").write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(60)))
    train_tokenizer([folder / "raw.jsonl"], folder / "tok.model", 400)
    prepare([folder / "raw.jsonl"], folder / "out" / "web", folder / "tok.model", shard_tokens=2000)
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def mixture(folder: Path) -> MixtureConfig:
    paths = {"web": {"paths": [str(folder / "*.bin")]}}
    phases = [{"name": "a", "tokens": 3200, "weights": {"web": 1}}]
    return MixtureConfig(sequence_length=32, seed=0, sources=paths, phases=phases)


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_known_shards_are_not_read_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").mkdir()
    for number in range(5):
        write_corpus(tmp_path / "c" / f"x{number}", 500, seed=number)
    first = sources.open_sources(mixture(tmp_path / "c"))["web"]
    assert len(list(cache.glob("shards-*.json"))) == 1
    monkeypatch.setattr(indexed.IndexedReader, "_read_header", None)  # whoever reads an index fails
    again = sources.open_sources(mixture(tmp_path / "c"))["web"]
    assert (again.fingerprint, again.num_tokens) == (first.fingerprint, first.num_tokens)
    assert (again.window(0, 3) == first.window(0, 3)).all()
    monkeypatch.undo()
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(cache))
    write_corpus(tmp_path / "c" / "x2", 700, seed=9)
    assert sources.open_sources(mixture(tmp_path / "c"))["web"].num_tokens == 2700


def _opens(folder: Path, log: str, start) -> None:
    original = indexed.IndexedReader._read_header

    def logged(self: indexed.IndexedReader, *args) -> None:
        with open(log, "a") as file:
            file.write(self.prefix + "\n")
        original(self, *args)

    indexed.IndexedReader._read_header = logged
    start.wait()
    sources.open_sources(mixture(folder))


def test_processes_that_start_together_read_each_index_once(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for number in range(100):  # enough for threads
        write_corpus(tmp_path / "c" / f"x{number}", 200, seed=number)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    ranks = [context.Process(target=_opens, args=(tmp_path / "c", str(tmp_path / "log"), start)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    start.set()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    read = (tmp_path / "log").read_text().splitlines()
    assert len(read) == len(set(read)) == 100


def test_a_broken_or_missing_cache_is_done_without(cache: Path, tmp_path: Path, corpus: dict[str, bytes]) -> None:
    write(tmp_path / "c", corpus)
    expected = sources.open_sources(mixture(tmp_path / "c"))["web"].fingerprint
    for path in cache.glob("*.json"):
        path.write_text("{broken")
    assert sources.open_sources(mixture(tmp_path / "c"))["web"].fingerprint == expected
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    assert sources.open_sources(mixture(tmp_path / "c"))["web"].fingerprint == expected


def test_a_changed_token_file_is_damage(cache: Path, tmp_path: Path, corpus: dict[str, bytes]) -> None:
    write(tmp_path / "c", corpus)
    victim = tmp_path / "c" / "web-00001.bin"
    data = bytearray(victim.read_bytes())
    data[1001] ^= 1
    victim.write_bytes(data)
    for _ in range(2):  # what failed is not remembered as whole
        with pytest.raises(DamagedDataError, match="source 'web': .*web-00001.bin: its content has the hash") as info:
            sources.open_sources(mixture(tmp_path / "c"))
    assert info.value.exit_code == 4 and "\n" not in str(info.value)


def test_content_is_hashed_once_and_again_when_a_file_changes(
    cache: Path, tmp_path: Path, corpus: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", corpus)
    hashed: list[str] = []
    original = catalogue._hash
    monkeypatch.setattr(catalogue, "_hash", lambda prefix: hashed.append(prefix) or original(prefix))
    monkeypatch.setattr(catalogue, "_TOGETHER_SECONDS", 0.0)
    shards = len(list((tmp_path / "c").glob("*.bin")))
    monkeypatch.setenv("MOE_TRAIN_VERIFY_BYTES", "4K")  # one shard a start
    counts = [len(sources.open_sources(mixture(tmp_path / "c"))) and len(hashed) for _ in range(shards + 2)]
    assert counts[:2] == [1, 2] and counts[-1] == len(set(hashed)) == shards
    os.utime(tmp_path / "c" / "web-00000.bin")
    sources.open_sources(mixture(tmp_path / "c"))
    assert hashed[-1].endswith("web-00000") and len(hashed) == shards + 1


def test_a_start_hashes_no_more_however_many_sources_there_are(
    cache: Path, tmp_path: Path, corpus: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, hashed = ["a", "b", "c"], []
    for name in names:
        write(tmp_path / name, corpus)
    paths = {name: {"paths": [str(tmp_path / name / "*.bin")]} for name in names}
    phases = [{"name": "all", "tokens": 3200, "weights": dict.fromkeys(names, 1)}]
    config = MixtureConfig(sequence_length=32, seed=0, sources=paths, phases=phases)
    sizes = [len(data) for name, data in sorted(corpus.items()) if name.endswith(".bin")]
    original = catalogue._hash
    monkeypatch.setattr(catalogue, "_hash", lambda prefix: hashed.append(prefix) or original(prefix))
    monkeypatch.setattr(catalogue, "_WORTH_BYTES", 0)  # none is small
    monkeypatch.setenv("MOE_TRAIN_VERIFY_BYTES", str(sum(sizes) + sizes[0]))
    for _ in range(2):  # that come together, as the ranks of a node do
        sources.open_sources(config)
        assert len(hashed) == len(sizes) + 1
    monkeypatch.setattr(catalogue, "_TOGETHER_SECONDS", 0.0)
    for _ in range(3):
        sources.open_sources(config)
    assert len(hashed) == len(set(hashed)) == 3 * len(sizes)

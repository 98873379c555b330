"""The cache of blocks: bounded, least recently used first, one fetch for many processes, and no torn block believed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import xxhash

from data_pipeline.block_cache import BlockCache

SIZE = 10_000


def data(number: int) -> bytes:
    return bytes([number % 256]) * SIZE


def key(number: int) -> str:
    return xxhash.xxh3_128_hexdigest(str(number).encode())


def stored(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if not path.name.endswith(".partial")]


def get(cache: BlockCache, number: int, fetched: list[int] | None = None) -> bytes:
    def fetch() -> bytes:
        if fetched is not None:
            fetched.append(number)
        return data(number)

    return bytes(cache.get(key(number), xxhash.xxh3_64_intdigest(data(number)), fetch))


def test_kept_and_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    cache, fetched = BlockCache(tmp_path, 10 * SIZE), []
    for number in range(8):
        assert get(cache, number, fetched) == data(number)
        os.utime(tmp_path / key(number)[:2] / key(number), (1000 + number, 1000 + number))
    assert get(cache, 0, fetched) == data(0) and fetched == list(range(8))  # kept; and touched by it
    for number in range(8, 30):
        held = cache.get(key(number), None, lambda number=number: data(number))
        assert sum(path.stat().st_size for path in stored(tmp_path)) <= 10 * SIZE
    assert bytes(held) == data(29)
    assert get(BlockCache(tmp_path, 10 * SIZE), 29, fetched) == data(29) and 29 not in fetched
    assert get(cache, 1, fetched) == data(1) and fetched[-1] == 1


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache, fetched = BlockCache(tmp_path, 10 * SIZE), []
    for number in range(9):
        get(cache, number, fetched)
        os.utime(tmp_path / key(number)[:2] / key(number), (1000 + number, 1000 + number))
    get(cache, 0, fetched)  # used again
    get(cache, 100, fetched)
    fetched.clear()
    get(cache, 0, fetched)
    assert fetched == []
    get(cache, 1, fetched)
    assert fetched == [1]


def test_what_is_evicted_stays_readable_for_who_has_it(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 3 * SIZE)
    get(cache, 1)
    held = cache.get(key(1), None, lambda: b"")
    for number in range(2, 9):
        get(cache, number)
    assert not (tmp_path / key(1)[:2] / key(1)).exists() and bytes(held) == data(1)


@pytest.mark.parametrize("torn", [b"", b"x", data(1)[:-1], data(1), b"\0" * (SIZE + 8)])
def test_a_torn_block_is_fetched_again(tmp_path: Path, torn: bytes) -> None:
    cache, fetched = BlockCache(tmp_path, 10**6), []
    get(cache, 1, fetched)
    (tmp_path / key(1)[:2] / key(1)).write_bytes(torn)
    assert get(cache, 1, fetched) == data(1) == get(cache, 1, fetched) and fetched == [1, 1]


def test_a_sound_block_of_another_hash_is_not_believed(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10**6)
    cache.get(key(1), None, lambda: data(7))
    assert get(cache, 1) == data(1)


def test_without_a_disk(tmp_path: Path) -> None:
    assert get(BlockCache(tmp_path, 0), 1) == data(1) and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("no folder")
    assert get(BlockCache(tmp_path / "file" / "x", 10**6), 1) == data(1)
    assert get(BlockCache(tmp_path / "small", SIZE), 1) == data(1)  # does not fit, with its hash
    assert stored(tmp_path / "small") == []


def _reader(folder: Path, log: str, seed: int) -> None:
    cache = BlockCache(folder, 12 * SIZE)
    for turn in range(80):
        number = (turn * 7 + seed * (turn // 16)) % 40

        def fetch(number: int = number) -> bytes:
            with open(log, "a") as file:
                file.write(f"{number}\n")
            return data(number)

        assert bytes(cache.get(key(number), None, fetch)) == data(number)
        assert sum(map(size, stored(folder))) <= 12 * SIZE


def size(path: Path) -> int:
    """Bytes; 0 if it was evicted meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_several_processes(tmp_path: Path) -> None:
    """They evict under each other's hands, stay within the limit together, and read the right bytes."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_reader, args=(tmp_path / "blocks", str(tmp_path / "log"), seed)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def _waits(folder: Path, log: str, start) -> None:
    start.wait()
    BlockCache(folder, 10**6).get(key(1), None, lambda: open(log, "a").write("x") and data(1))


def test_many_want_the_same_block_and_one_fetches_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_waits, args=(tmp_path / "b", str(tmp_path / "log"), start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "x"

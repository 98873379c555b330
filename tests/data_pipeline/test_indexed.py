"""Token files: both ways against megatron-core's own reader and builder, and damage that is told as such."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.indexed import IndexedReader, IndexedWriter, dtype_for

DOCUMENTS = [np.arange(5), np.array([7]), np.arange(100, 160), np.array([], np.int64), np.array([65535, 0])]


def write(prefix: Path, dtype: type = np.uint16) -> IndexedReader:
    with IndexedWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    return IndexedReader(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_round_trip(tmp_path: Path, dtype: type) -> None:
    reader = write(tmp_path / "a", dtype)
    flat = np.concatenate(DOCUMENTS)
    assert (reader.dtype, reader.num_tokens, reader.num_documents) == (
        np.dtype(dtype),
        len(flat),
        len(DOCUMENTS),
    )
    assert np.array_equal(reader.tokens(0, len(flat)), flat)
    assert np.array_equal(reader.tokens(3, 10), flat[3:13])
    for number, document in enumerate(DOCUMENTS):
        assert np.array_equal(reader.document(number), document)
    assert [reader.document_at(token) for token in (0, 4, 5, 6, len(flat) - 1)] == [0, 0, 1, 2, 4]
    with pytest.raises(IndexError):
        reader.tokens(len(flat), 1)


def test_both_ways_against_megatron_core(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "ours")
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(DOCUMENTS) and theirs.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))
    for number, document in enumerate(DOCUMENTS):
        assert np.array_equal(theirs[number], document)

    import torch

    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_document(torch.arange(9), [4, 5])  # a document of two sequences
    builder.add_document(torch.tensor([70000, 3]), [2])
    builder.finalize(str(tmp_path / "theirs.idx"))
    reader = IndexedReader(tmp_path / "theirs.idx")
    assert (reader.num_tokens, reader.num_sequences, reader.num_documents) == (11, 3, 2)
    assert reader.document_starts.tolist() == [0, 9, 11]
    assert reader.document(1).tolist() == [70000, 3]


def test_the_bytes_are_those_of_megatron_core(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    write(tmp_path / "ours")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in (".bin", ".idx"):
        assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()


def test_ids_are_never_cut(tmp_path: Path) -> None:
    for bad in ([65536], [-1]):
        with pytest.raises(DataError, match="does not fit"):
            with IndexedWriter(tmp_path / "a", np.uint16) as writer:
                writer.add(np.array(bad))
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left
    assert dtype_for(65535) == np.uint16 and dtype_for(65536) == np.int32


def test_an_empty_shard(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a"):
        pass
    reader = IndexedReader(tmp_path / "a")
    assert reader.num_tokens == reader.num_documents == 0 and len(reader.tokens(0, 0)) == 0


def test_more_shards_than_a_process_may_have_files_open(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    shards = [tmp_path / f"a-{number:05d}" for number in range(1100)]
    for shard in shards:
        for end in (".bin", ".idx"):
            os.link(tmp_path / f"a{end}", f"{shard}{end}")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        readers = [IndexedReader(shard) for shard in shards]
        kept = readers[0].tokens(3, 10)
        assert all(reader.tokens(2, 3).tolist() == first.tokens(2, 3).tolist() for reader in readers)
        assert np.array_equal(kept, first.tokens(3, 10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_damage(tmp_path: Path, end: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / f"a{end}"
    whole = file.read_bytes()
    for damaged in (whole[:-2], whole + b"xx", b"\0" * len(whole) if end == ".idx" else b""):
        file.write_bytes(damaged)
        with pytest.raises(DamagedDataError) as info:
            IndexedReader(tmp_path / "a")
        assert info.value.exit_code == 4 and str(file) in str(info.value)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        IndexedReader(tmp_path / "a")

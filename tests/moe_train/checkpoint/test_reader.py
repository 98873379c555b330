"""Files of torch.distributed.checkpoint: ours are read by torch's own loader, its by ours, and of each only
what is wanted."""

from __future__ import annotations

import os
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moe_train.checkpoint import reader
from moe_train.checkpoint.pieces import Piece
from moe_train.checkpoint.reader import read_metadata, read_pieces, read_rectangle
from moe_train.checkpoint.writer import merge_plans, plan, write_metadata, write_pieces
from moe_train.errors import DamagedError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def whole(key: str, tensor: torch.Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(key, shape, (0,) * len(shape), shape, tensor.dtype, lambda: tensor)


def part(key: str, tensor: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
    view = tensor[tuple(slice(first, first + length) for first, length in zip(offset, shape))]
    return Piece(key, tuple(tensor.shape), offset, shape, tensor.dtype, lambda: view)


def write(folder, *ranks: list[Piece]):
    """A checkpoint of which each rank writes its pieces."""
    written = [write_pieces(folder, rank, pieces) for rank, pieces in enumerate(ranks)]
    write_metadata(folder, merge_plans([plan(pieces) for pieces in ranks]), written)
    return folder


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(5, 7)


@pytest.fixture
def saved(tmp_path, matrix):
    """One tensor in three rectangles of two ranks, and another in bf16."""
    first = [part("a", matrix, (0, 0), (2, 7)), part("a", matrix, (2, 0), (1, 4))]
    second = [
        part("a", matrix, (2, 4), (1, 3)),
        part("a", matrix, (3, 0), (2, 7)),
        whole("b", matrix.bfloat16()),
    ]
    return write(tmp_path, first, second)


def test_pieces_come_back_in_any_cut(saved, matrix) -> None:
    target, other = torch.empty(3, 5), torch.empty(5, 7)
    view = target[:, 1:4]
    read_pieces(saved, [Piece("a", (5, 7), (1, 2), (3, 3), target.dtype, lambda: view), whole("b", other)])
    assert torch.equal(view, matrix[1:4, 2:5])
    assert torch.equal(other, matrix.bfloat16().float())  # cast to the precision that is asked for


def test_torchs_own_loader_reads_it(saved, matrix, tmp_path_factory) -> None:
    state = {"a": torch.empty(5, 7), "b": torch.empty(5, 7, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=str(saved), no_dist=True)
    assert torch.equal(state["a"], matrix) and torch.equal(state["b"], matrix.bfloat16())
    single = tmp_path_factory.mktemp("single") / "all.pt"
    dcp_to_torch_save(str(saved), str(single))
    assert torch.equal(torch.load(single)["a"], matrix)


def test_what_torch_wrote_is_read(tmp_path, matrix) -> None:
    dcp.save({"a": matrix, "c": matrix.double()}, checkpoint_id=str(tmp_path), no_dist=True)
    target = torch.empty(5, 7)
    read_pieces(tmp_path, [whole("a", target)])
    assert torch.equal(target, matrix)


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch) -> None:
    """A rank that wants one expert of a stack does not read the others."""
    stack = torch.randn(8, 16, 16)
    write(tmp_path, [whole("experts", stack)])
    read, fill = [], reader._fill
    monkeypatch.setattr(
        reader, "_fill", lambda file, begin, tensor: (read.append(tensor.nbytes), fill(file, begin, tensor))
    )
    target = torch.empty(1, 16, 16)
    read_pieces(tmp_path, [Piece("experts", (8, 16, 16), (3, 0, 0), (1, 16, 16), target.dtype, lambda: target)])
    assert torch.equal(target[0], stack[3])
    assert sum(read) == target.nbytes


@given(
    st.data(),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_rectangle_of_a_file(data, shape, dtype) -> None:
    stored = torch.randn(shape).to(dtype)
    offset, extent = [], []
    for size in shape:
        first = data.draw(st.integers(0, size - 1))
        offset.append(first)
        extent.append(data.draw(st.integers(1, size - first)))
    wanted = stored[tuple(slice(first, first + length) for first, length in zip(offset, extent))]
    file = os.memfd_create("tensor")
    try:
        os.write(file, b"header" + stored.view(torch.uint8).numpy().tobytes())
        for target in (torch.empty(extent), torch.empty([*extent[:-1], 2 * extent[-1]])[..., ::2]):
            read_rectangle(file, 6, tuple(shape), tuple(offset), dtype, target)
            assert torch.equal(target, wanted.float())
    finally:
        os.close(file)


def test_what_is_not_there_is_named(saved) -> None:
    with pytest.raises(DamagedError, match="has no z"):
        read_pieces(saved, [whole("z", torch.empty(2))])
    with pytest.raises(DamagedError, match=r"a has the shape \(5, 7\) in the checkpoint, \(5, 8\) here"):
        read_pieces(saved, [whole("a", torch.empty(5, 8))])


def test_a_tensor_with_a_hole_is_refused(tmp_path, matrix) -> None:
    write(tmp_path, [part("a", matrix, (0, 0), (2, 7)), part("a", matrix, (3, 0), (2, 7))])
    with pytest.raises(DamagedError, match="a is not covered"):
        read_pieces(tmp_path, [whole("a", torch.empty(5, 7))])


def test_a_file_that_ends_too_early_is_named(saved) -> None:
    """(The manifest finds that before; a disk may lose a file later.)"""
    os.truncate(saved / "__1_0.distcp", 100)
    with pytest.raises(DamagedError, match="__1_0.distcp"):
        read_pieces(saved, [whole("a", torch.empty(5, 7))])
    (saved / "__1_0.distcp").unlink()
    with pytest.raises(DamagedError, match="__1_0.distcp cannot be read"):
        read_pieces(saved, [whole("a", torch.empty(5, 7))])


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(_Evil()), pickle.dumps({"a": 1})])
def test_metadata_runs_no_code_and_fails_in_one_way(saved, content) -> None:
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(DamagedError, match=r"\.metadata"):
        read_metadata(saved)


def test_a_view_is_stored_without_what_it_is_a_view_of(tmp_path) -> None:
    large = torch.randn(1000, 100)
    write(tmp_path, [Piece("a", (2, 3), (0, 0), (2, 3), large.dtype, lambda: large[:2, :3])])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 4000
    target = torch.empty(2, 3)
    read_pieces(tmp_path, [whole("a", target)])
    assert torch.equal(target, large[:2, :3])


def test_no_path_of_the_moment_is_in_the_metadata(saved, tmp_path) -> None:
    assert str(tmp_path).encode() not in (saved / ".metadata").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metadata(saved).state_dict_metadata.keys() == {"a", "b"}

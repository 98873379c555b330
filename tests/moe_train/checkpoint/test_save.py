"""Saving and loading on real ranks: any layout into any other, element for element, whatever goes wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.inspect import verify
from moe_train.checkpoint.pieces import Piece
from moe_train.checkpoint.reader import read_metadata, read_pieces
from tests.integration.test_layouts import LAYOUTS
from tests.steps_on_ranks import small_model

ON_RANKS = "tests.checkpoints_on_ranks:"
UNTIED_ODD = {name: LAYOUTS[name] for name in LAYOUTS if LAYOUTS[name][0] == 2} | {
    "tensor 2, pipeline 2, virtual 2, expert 2": LAYOUTS["tensor 2, pipeline 2, virtual 2, expert 2"],
}


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a checkpoint."""
    metadata, found = read_metadata(checkpoint), {}
    for key, stored in metadata.state_dict_metadata.items():
        tensor = torch.empty(tuple(stored.size), dtype=stored.properties.dtype)
        shape = tuple(tensor.shape)
        found[key] = tensor
        piece = Piece(key, shape, (0,) * len(shape), shape, tensor.dtype, lambda tensor=tensor: tensor)
        read_pieces(checkpoint, [piece], metadata)
    return found


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def origin(request, ranks, tmp_path_factory) -> tuple[str, Path]:
    """A checkpoint of one rank after two steps."""
    folder = tmp_path_factory.mktemp(f"origin_{request.param}")
    ranks(1).run(ON_RANKS + "train_and_save", {}, str(folder), request.param)
    return request.param, folder / "iter_0000002"


def test_its_content_is_a_function_of_the_model(origin) -> None:
    precision, checkpoint = origin
    found, shapes = contents(checkpoint), small_model().parameter_shapes()
    kinds = ["weights", "exp_avg", "exp_avg_sq", *(["main"] if precision == "bf16" else [])]
    assert found.keys() == {f"{kind}.{name}" for kind in kinds for name in shapes}
    for name, shape in shapes.items():
        assert all(tuple(found[f"{kind}.{name}"].shape) == shape for kind in kinds)
        assert found[f"weights.{name}"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        if precision == "bf16":
            assert torch.equal(found[f"main.{name}"].bfloat16(), found[f"weights.{name}"])
    assert all(tensor.float().abs().sum() > 0 for tensor in found.values())
    state = json.loads((checkpoint / "run_state.json").read_text())
    assert state["format_version"] == 1 and state["optimizer_steps"] == state["step"] == 2
    assert state["model"] == small_model().model_dump(mode="json")
    assert verify(checkpoint) == 0


@pytest.mark.parametrize("name", UNTIED_ODD)
def test_there_and_back_through_another_layout(origin, ranks, tmp_path, name) -> None:
    """One rank to this layout and back to one: every element is where it was, and each file was written by
    one rank."""
    precision, checkpoint = origin
    world_size, layout = UNTIED_ODD[name]
    steps = ranks(world_size).run(
        ON_RANKS + "load_and_save", layout, str(checkpoint), str(tmp_path / "there"), precision
    )
    assert steps == [2] * world_size
    there = tmp_path / "there" / "iter_0000002"
    assert verify(there) == 0
    assert len(list(there.glob("*.distcp"))) == world_size
    expected = contents(checkpoint)
    assert_equal(contents(there), expected)
    ranks(1).run(ON_RANKS + "load_and_save", {}, str(there), str(tmp_path / "back"), precision)
    assert_equal(contents(tmp_path / "back" / "iter_0000002"), expected)


def test_every_rank_writes_about_its_share(ranks, origin, tmp_path) -> None:
    precision, checkpoint = origin
    ranks(2).run(ON_RANKS + "load_and_save", {"tensor": 2}, str(checkpoint), str(tmp_path), precision)
    sizes = [path.stat().st_size for path in (tmp_path / "iter_0000002").glob("*.distcp")]
    assert max(sizes) < 1.4 * min(sizes)


def test_every_rank_reads_about_its_share(ranks, origin) -> None:
    """Experts and optimizer state are split; what is on every rank (attention, norms) is small."""
    precision, checkpoint = origin
    whole = sum(tensor.nbytes for tensor in contents(checkpoint).values())
    for read in ranks(2).run(ON_RANKS + "bytes_read", {"expert": 2}, str(checkpoint), precision):
        assert read < 0.7 * whole


def test_precisions_load_into_each_other(ranks, origin) -> None:
    """fp32 takes the main parameters of a bf16 run, not its rounded weights."""
    precision, checkpoint = origin
    stored = contents(checkpoint)
    exact = "main" if precision == "bf16" else "weights"
    for other, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found = ranks(1).run(ON_RANKS + "weights_after_loading", str(checkpoint), other)[0]
        for name in small_model().parameter_shapes():
            assert torch.equal(found[name], stored[f"{exact}.{name}"].to(dtype)), (other, name)
            assert torch.equal(found[f"main.{name}"], stored[f"{exact}.{name}"]), (other, name)


def test_a_save_in_the_background_has_the_values_of_its_step(ranks, tmp_path) -> None:
    said = ranks(1).run(ON_RANKS + "save_while_training", str(tmp_path / "background"), 4)[0]
    assert not said
    for step in (1, 4):
        ranks(1).run(ON_RANKS + "train_and_save", {}, str(tmp_path / str(step)), "fp32", step)
        name = f"iter_{step:07d}"
        assert_equal(contents(tmp_path / "background" / name), contents(tmp_path / str(step) / name))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_costs_one_checkpoint(ranks, tmp_path, rank) -> None:
    """On whichever rank: it is said, training goes on, the ones before stay, nothing is left behind. At the
    end it ends the run."""
    results = ranks(2).run(ON_RANKS + "save_with_small_files", str(tmp_path), rank, 20_000)
    said = results[0][0]
    assert len(said) == 2 and not results[1][0]
    assert f"iter_0000002 was not written (rank {rank}: File too large" in said[0]
    for _, ended in results:
        assert ended.startswith("6: the last checkpoint could not be written") and "File too large" in ended
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000003"]
    assert verify(tmp_path / "iter_0000001") == verify(tmp_path / "iter_0000003") == 0


@pytest.mark.parametrize("async_save", [True, False])
def test_a_folder_that_cannot_be_written(ranks, tmp_path, async_save) -> None:
    (tmp_path / "file").touch()
    said = ranks(2).run(ON_RANKS + "save_into", str(tmp_path / "file" / "checkpoints"), async_save)
    assert len(said[0]) == 1 and "iter_0000001 was not written" in said[0][0] and "Not a directory" in said[0][0]
    assert not said[1]


def test_a_tokenizer_that_is_moved_or_replaced_is_stored_as_it_was(ranks, tmp_path) -> None:
    tokenizer = tmp_path / "own.model"
    tokenizer.write_bytes(b"as it was")
    ranks(1).run(ON_RANKS + "save_each_step", {}, str(tmp_path / "checkpoints"), 1, str(tokenizer), True)
    checkpoint = tmp_path / "checkpoints" / "iter_0000001"
    assert (checkpoint / "own.model").read_bytes() == b"as it was" and verify(checkpoint) == 0


@pytest.mark.parametrize("how", ["whole", "fails", "given up"])
def test_all_ranks_wait_for_the_last_copy(ranks, tmp_path, how) -> None:
    """A launcher that ends all ranks when the first one has ended would cut it."""
    folder, place = str(tmp_path / "run" / "own"), str(tmp_path / "copies")
    (said, here), (_, there) = ranks(2).run(ON_RANKS + "finish_while_copying", folder, place, how)
    assert here == there == (how == "whole")
    words = {"whole": [], "fails": ["was not copied to .*the line is down"], "given up": ["was given up"]}[how]
    assert len(said) == len(words) and all(re.search(word, line) for word, line in zip(words, said))


def test_who_lost_the_folder_commits_nothing(ranks, tmp_path) -> None:
    for ended in ranks(2).run(ON_RANKS + "save_forbidden", str(tmp_path)):
        assert "another start owns the folder" in ended
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_a_save_leaves_the_one_before(ranks, tmp_path, rank) -> None:
    with pytest.raises(RuntimeError, match=f"rank {rank} died|rank 0"):
        ranks(2).run(ON_RANKS + "save_and_die", str(tmp_path), rank)
    assert [path.name for path in tmp_path.glob("iter_*.writing.*")]
    for answer in ranks(2).run(ON_RANKS + "find", str(tmp_path), "auto"):
        assert answer == str(tmp_path / "iter_0000001")
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]


def test_ranks_agree_on_what_is_damaged(ranks, origin, tmp_path) -> None:
    """Each file is read by one rank alone; all know what it found."""
    for step in (3, 4):
        shutil.copytree(origin[1], tmp_path / f"iter_000000{step}")
    (tmp_path / "iter_0000004" / ".metadata").write_bytes(
        b"x" * (tmp_path / "iter_0000004" / ".metadata").stat().st_size
    )
    assert ranks(2).run(ON_RANKS + "find", str(tmp_path), "auto") == [str(tmp_path / "iter_0000003")] * 2
    (tmp_path / "iter_0000003" / "run_state.json").unlink()
    for answer in ranks(2).run(ON_RANKS + "find", str(tmp_path), "auto"):
        assert answer.startswith("4: ") and "run_state.json is missing" in answer

"""Reduction and gathering beside the computation, as on GPUs: the same curve, and whole weights where they are read."""

from __future__ import annotations

import pytest

CASES = {
    "data 2": (2, {}, {}),
    "micro-batches": (2, {}, {"micro_batch": 1}),
    "bf16": (2, {}, {"precision": "bf16"}),
    "tensor 2": (2, {"tensor": 2}, {}),
    "expert 2, recomputed": (2, {"expert": 2}, {"recompute": "full"}),
    "pipeline 2, tied": (2, {"pipeline": 2}, {"micro_batch": 1}),
    "pipeline 2, virtual 2, untied": (2, {"pipeline": 2, "virtual_pipeline": 2}, {"model": {"tie_embeddings": False}}),
    "pipeline 2, expert 2": (4, {"pipeline": 2, "expert": 2}, {"micro_batch": 1, "recompute": "selective"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_that_without_overlap(ranks, name) -> None:
    world_size, layout, options = CASES[name]
    plain, overlapped = (
        ranks(world_size).run("tests.steps_on_ranks:train", layout, steps=4, overlap=overlap, **options)[0]
        for overlap in (False, True)
    )
    for step, expected in zip(overlapped, plain):
        # The norm is summed up bucket by bucket; a step that is clipped by it differs in its last bit.
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert step["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def test_a_checkpoint_of_right_after_a_step_is_whole(ranks, tmp_path) -> None:
    """Nothing is gathered before it: each rank writes what it updates itself."""
    save = ("tests.steps_on_ranks:save", {"expert": 2})
    uninterrupted = ranks(2).run(*save, str(tmp_path / "checkpoints"), 3, 3, overlap=True)[0]
    checkpoint = str(tmp_path / "checkpoints" / "iter_0000003")
    for overlap in (True, False):
        resumed = ranks(2).run("tests.steps_on_ranks:resume", {}, [checkpoint], 3, 3, overlap=overlap)[0][0]
        assert [step["loss"] for step in resumed] == pytest.approx([step["loss"] for step in uninterrupted], rel=1e-5)


def test_weights_are_whole_once_they_are_gathered(ranks) -> None:
    drift = "tests.steps_on_ranks:drift"
    assert set(ranks(2).run(drift, {}, overlap=True)) == {"none"}
    (found,) = set(ranks(2).run(drift, {}, overlap=True, gather=False))
    assert found.startswith("5: "), "weights are gathered before the next forward without being asked for: why ask?"


def test_evaluation_gathers_what_it_needs(ranks) -> None:
    plain, overlapped = (
        ranks(2).run("tests.steps_on_ranks:evaluate_between_steps", {}, overlap=overlap)[0] for overlap in (False, True)
    )
    assert overlapped == pytest.approx(plain, rel=1e-6)

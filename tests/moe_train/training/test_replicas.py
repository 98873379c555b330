"""Copies of one weight that have drifted apart are found, on whichever ranks they are."""

from __future__ import annotations

import pytest

from moe_train.training.replicas import what_differs

LAYOUTS = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "expert 2": (4, {"tensor": 2, "expert": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_sound_copies_are_equal_after_some_steps(ranks, name) -> None:
    world_size, layout = LAYOUTS[name]
    found = ranks(world_size).run("tests.steps_on_ranks:drift", layout)
    assert set(found) == {"none"}


@pytest.mark.parametrize(
    "name, parameter, rank",
    [
        ("data 2", "layers.1.mlp.down.weight", 1),
        ("tensor 2", "layers.0.mlp_norm.weight", 1),
        ("pipeline 2", "embedding.weight", 1),
        ("expert 2", "layers.2.mlp.down.weight", 3),
    ],
)
def test_one_bit_on_one_rank_stops_them_all(ranks, name, parameter, rank) -> None:
    world_size, layout = LAYOUTS[name]
    found = ranks(world_size).run("tests.steps_on_ranks:drift", layout, parameter=parameter, rank=rank)
    assert len(set(found)) == 1 and found[0].startswith(f"5: {parameter} ")
    assert str(rank) in found[0].partition(":")[2].partition(":")[0]


def test_the_odd_one_out_is_named() -> None:
    a, b = ("a", (0,)), ("b", (0,))
    sound = {a: 1, b: 2}
    assert what_differs([sound, sound, {b: 2}]) is None
    said = what_differs([sound, {a: 1, b: 3}, sound])
    assert said.startswith("b on rank 1 is not what it is on ranks 0, 2: ")
    assert what_differs([sound, {a: 4}]).startswith("a is not the same on ranks 0, 1: ")
    assert what_differs([{("a", (0,)): 1}, {("a", (4,)): 2}]) is None  # parts of one, not copies

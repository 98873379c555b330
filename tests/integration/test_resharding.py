"""Saved on one layout, resumed on every other; and bit for bit on the same."""
from __future__ import annotations

import pytest

from tests.integration.test_layouts import LAYOUTS, assert_same_curve

EVERY = {"one rank": (1, {}), **{name: LAYOUTS[name] for name in list(LAYOUTS)[:8]}}
STEPS, MORE = 3, 5



@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """``saved(precision)``: {name: (checkpoint, figures of the uninterrupted run)} of every layout."""
    runs = {}

    def of(precision: str) -> dict[str, tuple[str, list[dict]]]:
        if precision not in runs:
            runs[precision] = {}
            for name, (world_size, layout) in EVERY.items():
                folder = tmp_path_factory.mktemp(precision)
                options = {"precision": precision}
                figures = ranks(world_size).run("tests.steps_on_ranks:save", layout, str(folder), STEPS, MORE, **options)[0]
                runs[precision][name] = (str(folder / f"iter_{STEPS:07d}"), figures)
        return runs[precision]

    return of


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EVERY)
def test_a_resume_on_the_same_layout_is_bit_for_bit(ranks, saved, name, precision):
    world_size, layout = EVERY[name]
    checkpoint, uninterrupted = saved(precision)[name]
    options = {"precision": precision}
    (resumed,) = ranks(world_size).run("tests.steps_on_ranks:resume", layout, [checkpoint], STEPS, MORE, **options)[0]
    assert resumed == uninterrupted


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_of_any_other_layout_resumes_on_this_one(ranks, saved, name):
    world_size, layout = EVERY[name]
    others = {origin: run for origin, run in saved("fp32").items() if origin != name}
    checkpoints = [checkpoint for checkpoint, _ in others.values()]
    resumed = ranks(world_size).run("tests.steps_on_ranks:resume", layout, checkpoints, STEPS, 2)[0]
    for (origin, (_, uninterrupted)), figures in zip(others.items(), resumed):
        assert_same_curve(figures, uninterrupted[:2], f"{origin} -> {name}")


def test_a_bf16_checkpoint_resumes_elsewhere_from_its_fp32_main_parameters(ranks, saved):
    checkpoint, uninterrupted = saved("bf16")["data 2"]
    options = {"precision": "bf16"}
    (resumed,) = ranks(2).run("tests.steps_on_ranks:resume", {"tensor": 2, "expert": 2}, [checkpoint], STEPS, 2, **options)[0]
    for step, expected in zip(resumed, uninterrupted):
        assert step["loss"] == pytest.approx(expected["loss"], rel=5e-3)

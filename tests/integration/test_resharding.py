"""Saved on one layout, resumed on every other; and bit for bit on the same."""

from __future__ import annotations

import itertools

import pytest

from moe_train.config import load_model
from parallel.errors import LayoutError
from parallel.layout import ParallelConfig, resolve_layout
from tests.integration.test_layouts import LAYOUTS, assert_same_curve
from tests.steps_on_ranks import GLOBAL_BATCH, small_model

SOME = {"one rank": (1, {}), **{name: LAYOUTS[name] for name in list(LAYOUTS)[:8]}}
STEPS, MORE = 3, 5


def every_layout() -> dict[str, tuple[int, dict]]:
    """All layouts of the demo's model on up to 4 ranks, with micro-batches of one sequence."""
    demo, small, found = load_model("demo"), small_model(), {}
    for name in ("num_layers", "attention.num_kv_heads", "attention.num_experts", "mlp.num_experts"):
        section, _, key = name.rpartition(".")
        values = [getattr(getattr(model, section) if section else model, key) for model in (demo, small)]
        assert values[0] == values[1], f"{name}: the model of the tests is to divide as the demo's does"
    for world, tensor, pipeline, virtual, expert in itertools.product(
        range(1, 5), range(1, 5), range(1, 5), (None, 2, 3, 4), range(1, 5)
    ):
        layout = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "expert": expert}
        try:
            resolve_layout(
                ParallelConfig(**layout),
                world,
                num_layers=4,
                num_kv_heads=4,
                attention_experts=4,
                mlp_experts=4,
                micro_batch_size=1,
                global_batch_size=GLOBAL_BATCH,
            )
        except LayoutError:
            continue
        name = ", ".join(f"{key} {value}" for key, value in layout.items() if value not in (1, None))
        found[f"{world} ranks: {name or 'data'}"] = (world, layout)
    return found


EVERY = every_layout()


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """``saved(precision)``: {name: (checkpoint, figures of the uninterrupted run)} of every layout."""
    runs = {}

    def of(precision: str) -> dict[str, tuple[str, list[dict]]]:
        if precision not in runs:
            runs[precision] = {}
            for name, (world_size, layout) in SOME.items():
                folder = tmp_path_factory.mktemp(precision)
                figures = ranks(world_size).run(
                    "tests.steps_on_ranks:save", layout, str(folder), STEPS, MORE, precision=precision
                )[0]
                runs[precision][name] = (str(folder / f"iter_{STEPS:07d}"), figures)
        return runs[precision]

    return of


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SOME)
def test_a_resume_on_the_same_layout_is_bit_for_bit(ranks, saved, name, precision):
    world_size, layout = SOME[name]
    checkpoint, uninterrupted = saved(precision)[name]
    options = {"precision": precision}
    (resumed,) = ranks(world_size).run("tests.steps_on_ranks:resume", layout, [checkpoint], STEPS, MORE, **options)[0]
    assert resumed == uninterrupted


@pytest.fixture(scope="module")
def everywhere(ranks, tmp_path_factory):
    """({layout: a checkpoint that it wrote}, the figures of the run that it is of): all hold the same."""
    folder = tmp_path_factory.mktemp("everywhere")
    origin = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}
    options = {"micro_batch": 1}
    figures = ranks(4).run("tests.steps_on_ranks:save", origin, str(folder / "first"), STEPS, MORE, **options)[0]
    name = f"iter_{STEPS:07d}"
    written = {}
    for number, (target, (world_size, layout)) in enumerate(EVERY.items()):
        ranks(world_size).run(
            "tests.checkpoints_on_ranks:load_and_save",
            layout,
            str(folder / "first" / name),
            str(folder / str(number)),
            "fp32",
        )
        written[target] = str(folder / str(number) / name)
    return written, figures


def test_there_are_layouts_of_every_kind() -> None:
    assert len(EVERY) == 25
    assert {layout["pipeline"] for _, layout in EVERY.values()} == {1, 2, 4}
    assert {layout["tensor"] for _, layout in EVERY.values()} == {1, 2, 4}
    assert {layout["expert"] for _, layout in EVERY.values()} == {1, 2, 4}


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_of_any_layout_resumes_on_this_one(ranks, everywhere, name):
    """Whichever layout wrote it, each rank holds the same bits after loading it; so the steps from one of
    them are the steps from all of them."""
    written, uninterrupted = everywhere
    world_size, layout = EVERY[name]
    sources = list(written.values())
    found = ranks(world_size).run("tests.checkpoints_on_ranks:load_each", layout, sources, STEPS, MORE)
    for rank, (hashes, figures) in enumerate(found):
        other = [origin for origin, held in zip(written, hashes) if held != hashes[0]]
        assert not other, f"rank {rank} holds something else after a load from {other}"
        assert_same_curve(figures, uninterrupted, name)


def test_a_bf16_checkpoint_resumes_elsewhere_from_its_fp32_main_parameters(ranks, saved):
    checkpoint, uninterrupted = saved("bf16")["data 2"]
    (resumed,) = ranks(2).run(
        "tests.steps_on_ranks:resume", {"tensor": 2, "expert": 2}, [checkpoint], STEPS, 2, precision="bf16"
    )[0]
    for step, expected in zip(resumed, uninterrupted):
        assert step["loss"] == pytest.approx(expected["loss"], rel=5e-3)

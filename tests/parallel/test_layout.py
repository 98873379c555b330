"""Layouts: what divides, what is refused, and that the remedy in the message is true."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import LayoutError
from parallel.layout import Layout, ParallelConfig, resolve_layout, smallest_world

SHAPE = dict(num_layers=4, num_kv_heads=4, attention_experts=8, mlp_experts=8, micro_batch_size=2, global_batch_size=16)


def resolve(world: int, parallel: dict | None = None, **shape: int) -> Layout:
    return resolve_layout(ParallelConfig(**(parallel or {})), world, **(SHAPE | shape))


def refusal(world: int, parallel: dict | None = None, **shape: int) -> str:
    with pytest.raises(LayoutError) as info:
        resolve(world, parallel, **shape)
    assert info.value.exit_code == 2 and "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ("world", "parallel", "data"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (2, {"tensor": 2}, 1),
        (2, {"pipeline": 2}, 1),
        (2, {"pipeline": 2, "virtual_pipeline": 2}, 1),
        (2, {"expert": 2}, 2),
        (2, {"tensor": 2, "expert": 2}, 1),
        (4, {"pipeline": 2, "expert": 2}, 2),
        (8, {"tensor": 2, "pipeline": 2, "expert": 4}, 2),
    ],
)
def test_layouts_that_divide(world: int, parallel: dict, data: int) -> None:
    layout = resolve(world, parallel)
    assert layout.data == data and layout.world_size == layout.tensor * layout.pipeline * layout.data
    assert layout.expert * layout.expert_data == layout.tensor * layout.data


def test_one_virtual_stage_is_none() -> None:
    assert resolve(2, {"pipeline": 2, "virtual_pipeline": 1}).virtual_pipeline is None
    assert resolve(1, {"virtual_pipeline": 1}).virtual_pipeline is None


def test_a_layout_is_frozen_and_describes_itself() -> None:
    layout = resolve(4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.tensor = 3  # type: ignore[misc]
    text = layout.describe()
    assert (
        text.startswith("4 ranks = tensor 1 x pipeline 2 x data 2")
        and "2 virtual stages" in text
        and "experts over 2" in text
    )


@pytest.mark.parametrize(
    ("world", "parallel", "shape", "reason", "remedy"),
    [
        (2, {"tensor": 3}, {}, "parallel.tensor 3 does not divide the 4 kv heads", "parallel.tensor: 2"),
        (
            4,
            {"tensor": 4},
            {"num_kv_heads": 6},
            "parallel.tensor 4 does not divide the 6 kv heads",
            "parallel.tensor: 2",
        ),
        (
            3,
            {"pipeline": 3},
            {"global_batch_size": 12},
            "parallel.pipeline 3 does not divide the 4 layers",
            "parallel.pipeline: 1",
        ),
        (
            2,
            {"pipeline": 2, "virtual_pipeline": 3},
            {},
            "= 6 does not divide the 4 layers",
            "parallel.virtual_pipeline: 2",
        ),
        (
            2,
            {"virtual_pipeline": 2},
            {},
            "needs parallel.pipeline of 2 or more",
            "parallel.virtual_pipeline: 1",
        ),
        (
            2,
            {"expert": 2, "overlap_dispatch": True},
            {"global_batch_size": 6, "micro_batch_size": 1},
            "gives each data rank 3 micro-batch(es), and parallel.overlap_dispatch takes them two at a time",
            "training.global_batch_size: 4",
        ),
        (
            4,
            {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "overlap_dispatch": True},
            {"global_batch_size": 4, "micro_batch_size": 1},
            "a multiple of parallel.pipeline 2, twice that with parallel.overlap_dispatch",
            "training.global_batch_size: 8",
        ),
        (6, {"tensor": 2, "pipeline": 2}, {}, "= 4 does not divide the 6 processes", "4 processes"),
        (4, {"expert": 3}, {}, "parallel.expert 3 does not divide the 8 MLP experts", "parallel.expert: 2"),
        (
            4,
            {"expert": 4},
            {"attention_experts": 6},
            "does not divide the 6 attention experts",
            "parallel.expert: 2",
        ),
        (2, {"expert": 4}, {}, "does not divide tensor 1 x data 2 = 2", "parallel.expert: 2"),
        (
            2,
            {},
            {"global_batch_size": 7},
            "7 is not a multiple of micro_batch_size 2 x data 2 = 4",
            "training.global_batch_size: 8",
        ),
        (3, {"expert": 2}, {}, "does not divide tensor 1 x data 3 = 3", "2 processes"),
        (
            2,
            {"pipeline": 2, "virtual_pipeline": 2},
            {"global_batch_size": 6},
            "gives each data rank 3 micro-batch(es)",
            "training.global_batch_size: 4",
        ),
        (
            2,
            {"expert": 2},
            {"attention_experts": 0, "mlp_experts": 0, "dense_ffn_size": 12},
            "parallel.expert 2 has no experts of this model to share out",
            "parallel.expert: 1",
        ),
        (
            2,
            {"expert": 2, "attention_experts": "replicated"},
            {"mlp_experts": 0, "dense_ffn_size": 12},
            "parallel.expert 2 has no experts of this model to share out",
            "parallel.expert: 1",
        ),
        (
            4,
            {"tensor": 4},
            {"mlp_experts": 0, "dense_ffn_size": 6},
            "parallel.tensor 4 does not divide the MLP's width 6",
            "parallel.tensor: 2",
        ),
    ],
)
def test_refusals_name_the_reason_and_the_nearest(
    world: int, parallel: dict, shape: dict, reason: str, remedy: str
) -> None:
    message = refusal(world, parallel, **shape)
    assert reason in message
    assert message.endswith(f"the nearest that would do: {remedy}")


def test_replicated_attention_experts_need_not_divide() -> None:
    parallel = {"expert": 4, "attention_experts": "replicated"}
    assert resolve(4, parallel, attention_experts=6).expert == 4


def test_experts_of_the_attention_alone_are_shared_out() -> None:
    layout = resolve(2, {"expert": 2}, mlp_experts=0, dense_ffn_size=12)
    assert layout.expert == 2


def test_no_processes() -> None:
    assert "at least 1 process" in refusal(0)


def test_the_smallest_world() -> None:
    assert smallest_world(ParallelConfig()) == 1
    assert smallest_world(ParallelConfig(tensor=2, expert=2)) == 2
    assert smallest_world(ParallelConfig(tensor=2, expert=4, pipeline=3)) == 12
    assert smallest_world(ParallelConfig(expert=8)) == 8


@settings(max_examples=200, deadline=None)
@given(
    world=st.integers(1, 16),
    tensor=st.integers(1, 6),
    pipeline=st.integers(1, 6),
    virtual=st.integers(1, 4),
    expert=st.integers(1, 8),
    layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    experts=st.integers(0, 12),
    ffn=st.integers(1, 12),
    micro=st.integers(1, 4),
    batch=st.integers(1, 48),
)
def test_every_remedy_is_true(
    world, tensor, pipeline, virtual, expert, layers, heads, experts, ffn, micro, batch
) -> None:
    """Whatever is refused: what the message proposes is accepted."""
    parallel = dict(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, expert=expert)
    shape = dict(
        num_layers=layers,
        num_kv_heads=heads,
        attention_experts=experts,
        mlp_experts=experts,
        dense_ffn_size=None if experts else ffn,
        micro_batch_size=micro,
        global_batch_size=batch,
    )
    try:
        layout = resolve(world, parallel, **shape)
    except LayoutError as error:
        _, found, remedy = str(error).partition("the nearest that would do: ")
        if not found:
            assert "no layout of" in str(error)
            return
        for key, value in re.findall(r"\w+\.(\w+): (\d+)", remedy):
            (shape if key in shape else parallel)[key] = int(value)
        processes = re.search(r"(\d+) process", remedy)
        layout = resolve(int(processes.group(1)) if processes else world, parallel, **shape)
        world = layout.world_size
    assert layout.tensor * layout.pipeline * layout.data == world
    assert heads % layout.tensor == 0 and experts % layout.expert == 0
    assert experts or (layout.expert == 1 and ffn % layout.tensor == 0)
    assert layers % (layout.pipeline * (layout.virtual_pipeline or 1)) == 0
    assert shape["global_batch_size"] % (micro * layout.data) == 0

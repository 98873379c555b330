"""The planner on dense and grouped-query models: memory against the engine, step time, sweeps."""

from __future__ import annotations

import pytest

from moe_train.errors import UserError
from moe_train.model.config import DenseMLPConfig, GroupedQueryAttentionConfig, MixtureOfMLPConfig
from moe_train.plan import activations, memory, shards, step_time
from tests.memory_on_ranks import wide_model
from tests.small_models import SMALL, changes
from tests.steps_on_ranks import make_layout, small_model

LAYOUTS = {
    "llama": [{"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
    "olmoe": [{"tensor": 2, "expert": 2}, {}],
    "skywork": [{"expert": 2}],
}
WIDE = {
    "dense": {
        "attention": GroupedQueryAttentionConfig(num_heads=8, num_kv_heads=4, head_dim=16),
        "mlp": DenseMLPConfig(ffn_hidden_size=192),
    },
    "mixture": {
        "attention": GroupedQueryAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True),
        "mlp": MixtureOfMLPConfig(ffn_hidden_size=96, num_experts=4, top_k=2, bias=False),
    },
}


@pytest.mark.parametrize(
    "model, layout", [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts], ids=str
)
def test_state_is_exact(ranks, model, layout):
    values = changes(SMALL[model]())
    measured = ranks(2).run("tests.memory_on_ranks:state_bytes", layout, values, "bf16", True)
    shape = make_layout(2, **layout)
    for rank, found in enumerate(measured):
        assert memory.state_bytes(small_model(**values), shape, shards.place(shape, rank), "bf16") == found, rank


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=["data", "tensor"])
@pytest.mark.parametrize("model", WIDE)
def test_activations_within_5_percent(ranks, model, layout, recompute):
    measured = ranks(2).run("tests.memory_on_ranks:activation_bytes", layout, WIDE[model], recompute, 64)
    shape = make_layout(2, **layout)
    work = activations.Workload(wide_model(**WIDE[model]), shape, 64, 2, 4)
    for rank, found in enumerate(measured):
        planned = activations.stage_bytes(work, shards.place(shape, rank).stage, 2, recompute)
        assert planned == pytest.approx(found, rel=0.05), f"rank {rank}"


def test_nothing_goes_to_experts_that_are_not_there():
    work = activations.Workload(wide_model(**WIDE["dense"]), make_layout(4, tensor=2, expert=2), 64, 2, 4)
    assert activations.dispatch_bytes(work) == activations.dispatch_bytes(work, worst=True) == 0
    tensor, expert = step_time.exchanged_bytes(work, "none", layers=1)
    assert expert == 0 and tensor == 10 * 128 * 64 * 4 / 2  # two pairs of layers, five trips of S x B x H each


def test_a_dense_model_has_no_sparsity_to_vary(tmp_path):
    from moe_train.plan.sweep import sweep

    with pytest.raises(UserError, match="--sparsity varies the experts of a mixture"):
        sweep(["1e13"], base=_dense_demo(tmp_path), out=str(tmp_path / "out"), sparsities=[0.5])


def test_a_sweep_over_dense_models_keeps_their_groups(tmp_path):
    from moe_train.config import load_run
    from moe_train.plan.sweep import sweep

    sweep(["1e13"], base=_dense_demo(tmp_path), out=str(tmp_path / "out"), around="1M", sizes=3)
    models = [load_run(path).model for path in (tmp_path / "out").glob("c*.yaml") if "mixture" not in path.name]
    assert len({model.hidden_size for model in models}) == 3
    assert {model.attention.queries_per_kv_head for model in models} == {2}
    assert {model.num_parameters() for model in models} == {model.num_active_parameters() for model in models}


def _dense_demo(folder) -> str:
    """The demo's run file with a dense model."""
    import yaml

    from moe_train.config import load_run

    run = yaml.safe_load(load_run("demo").to_yaml())
    model = small_model(**WIDE["dense"]).model_dump(mode="json")
    run["model"] = {**model, "vocab_size": run["model"]["vocab_size"], "max_sequence_length": 4096}
    run["parallel"]["expert"] = 1
    (folder / "dense.yaml").write_text(yaml.safe_dump(run))
    return str(folder / "dense.yaml")

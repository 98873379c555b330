"""What the dispatcher by DeepEP refuses; that it trains, tests/integration/test_layouts.py shows."""

from __future__ import annotations

import pytest

REFUSALS = {"not installed": ("bf16", False), "precision": ("fp32", True), "ranks": ("bf16", True)}


@pytest.mark.parametrize(
    "case, reason",
    [
        (
            "not installed",
            "flex needs DeepEP 1 (github.com/deepseek-ai/DeepEP, tag v1.2.1, from source), and megatron-core finds",
        ),
        ("precision", "flex sends bf16 only"),
        ("ranks", "flex is not for 3 expert ranks: Unsupported number of EP ranks: 3"),
    ],
)
def test_what_it_cannot_do_is_an_error_before_the_first_step(monkeypatch, case, reason) -> None:
    import torch
    from megatron.core.transformer import TransformerConfig

    from parallel.dispatch.alltoall import AllToAllDispatcher
    from parallel.dispatch.flex import FlexDispatcher
    from parallel.errors import EngineError
    from tests.deep_ep_on_cpu import deep_ep_on_cpu

    precision, installed = REFUSALS[case]
    monkeypatch.setattr(
        AllToAllDispatcher, "__init__", lambda self, *_, **__: setattr(self, "ep_size", 3 if case == "ranks" else 2)
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, params_dtype=dtype, bf16=precision == "bf16"
    )
    if installed:
        with deep_ep_on_cpu(), pytest.raises(EngineError) as refused:
            FlexDispatcher(6, config)
    else:
        with pytest.raises(EngineError) as refused:
            FlexDispatcher(6, config)
    assert reason in str(refused.value) and "\n" not in str(refused.value)

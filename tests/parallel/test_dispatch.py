"""The routing plan on one rank, trip by trip, against plain indexing; gradients against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import Layout
from parallel.turns import finish

TOKENS, EXPERTS, WIDTH, HEADS = 9, 5, 4, 2


@pytest.fixture(scope="module")
def topology():
    from parallel import engine

    yield engine.start(Layout(world_size=1, tensor=1, pipeline=1, virtual_pipeline=None, expert=1, data=1), seed=1)
    engine.stop()


def new_dispatcher(topology, row_multiple: int = 1):
    from megatron.core.transformer import TransformerConfig

    from parallel.dispatch.alltoall import AllToAllDispatcher

    engine = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
    )
    return AllToAllDispatcher(EXPERTS, engine, topology, row_multiple=row_multiple)


@pytest.fixture(scope="module")
def dispatcher(topology):
    return new_dispatcher(topology)


@pytest.fixture(params=[1, 2, 5])
def routed(request, dispatcher):
    """(plan, experts [T, k]): expert 3 is nobody's choice unless everybody must take it."""
    top_k = request.param
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(top_k))
    scores[:, 3] = -1.0
    experts = scores.topk(top_k).indices
    return dispatcher.plan(experts), experts


@pytest.fixture(params=["some", "none of the first two", "all", "nothing"])
def partly_sent(request, dispatcher):
    """(plan, experts [T, 2], sent [T, 2]): pairs are left out."""
    generator = torch.Generator().manual_seed(4)
    experts = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    sent = torch.rand(TOKENS, 2, generator=generator) < 0.6
    sent[:2] &= request.param != "none of the first two"
    sent = {"all": torch.ones_like(sent), "nothing": torch.zeros_like(sent)}.get(request.param, sent)
    return dispatcher.plan(experts, sent), experts, sent


def at_once(trip):
    """A trip as a plain function."""
    return lambda *args: finish(trip(*args))


def collect_pairs(plan):
    return lambda rows: finish(plan.collect_pairs(rows, HEADS))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def pairs_of(x_tnkd: torch.Tensor) -> torch.Tensor:
    """``[T * k, n * d]``."""
    return x_tnkd.transpose(1, 2).flatten(2).flatten(0, 1)


def pairs_by_expert(experts: torch.Tensor) -> list[tuple[int, int]]:
    """(token, slot) of every row: by expert, then by token."""
    pairs = [(token, slot) for token in range(TOKENS) for slot in range(experts.shape[1])]
    return sorted(pairs, key=lambda pair: int(experts[pair]))


def test_counts(routed):
    plan, experts = routed
    assert plan.rows.counts == [int((experts == expert).sum()) for expert in range(EXPERTS)]
    assert plan.rows.counts[3] == (TOKENS if experts.shape[1] == EXPERTS else 0)


def test_tokens_go_to_their_experts(routed):
    plan, experts = routed
    x = draw(TOKENS, WIDTH)
    rows = at_once(plan.dispatch_tokens)(x)
    assert torch.equal(rows, torch.stack([x[token] for token, _ in pairs_by_expert(experts)]))
    assert torch.autograd.gradcheck(at_once(plan.dispatch_tokens), (x,))


def test_pairs_go_out_and_come_home(routed):
    plan, experts = routed
    x = draw(TOKENS, HEADS, experts.shape[1], WIDTH // HEADS)
    rows = at_once(plan.dispatch_pairs)(x)
    assert torch.equal(rows, torch.stack([x[token, :, slot].flatten() for token, slot in pairs_by_expert(experts)]))
    assert torch.equal(collect_pairs(plan)(rows), x)
    assert torch.autograd.gradcheck(at_once(plan.dispatch_pairs), (x,))
    assert torch.autograd.gradcheck(collect_pairs(plan), (rows.detach().requires_grad_(),))


def test_answers_are_weighted_by_their_gates(routed):
    plan, experts = routed
    rows, gates, bias = draw(TOKENS * experts.shape[1], WIDTH), draw(TOKENS, experts.shape[1]), draw(WIDTH)
    expected = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for row, (token, slot) in zip(rows, pairs_by_expert(experts)):
        expected[token] += gates[token, slot] * row
    collect_weighted = at_once(plan.collect_weighted)
    torch.testing.assert_close(collect_weighted(rows, gates), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(collect_weighted(rows, gates, bias), expected + bias, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(collect_weighted, (rows, gates))
    assert torch.autograd.gradcheck(collect_weighted, (rows, gates, bias))


def test_what_is_left_out_is_not_sent_and_comes_back_as_zeros(partly_sent):
    plan, experts, sent = partly_sent
    pairs = [pair for pair in pairs_by_expert(experts) if sent[pair]]
    assert plan.rows.counts == [int(((experts == expert) & sent).sum()) for expert in range(EXPERTS)]
    x, x_tnkd = draw(TOKENS, WIDTH), draw(TOKENS, HEADS, 2, WIDTH // HEADS)
    assert torch.equal(at_once(plan.dispatch_tokens)(x), x[[token for token, _ in pairs]])
    rows = at_once(plan.dispatch_pairs)(x_tnkd)
    assert torch.equal(rows, pairs_of(x_tnkd)[[2 * token + slot for token, slot in pairs]])
    assert torch.equal(collect_pairs(plan)(rows), x_tnkd * sent[:, None, :, None])
    rows, gates = draw(len(pairs), WIDTH), draw(TOKENS, 2)
    expected = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for row, (token, slot) in zip(rows, pairs):
        expected[token] += gates[token, slot] * row
    torch.testing.assert_close(at_once(plan.collect_weighted)(rows, gates), expected, atol=1e-12, rtol=0)
    for trip, inputs in (
        (at_once(plan.dispatch_tokens), (x,)),
        (at_once(plan.dispatch_pairs), (x_tnkd,)),
        (collect_pairs(plan), (rows,)),
        (at_once(plan.collect_weighted), (rows, gates)),
    ):
        inputs = tuple(value.detach().requires_grad_() for value in inputs)
        if all(value.numel() for value in inputs):
            assert torch.autograd.gradcheck(trip, inputs)
        else:
            assert torch.equal(trip(*inputs), torch.zeros_like(trip(*inputs)))


@pytest.mark.parametrize("multiple", [4, 16])
@pytest.mark.parametrize("some_left_out", [False, True])
def test_rows_are_filled_up_with_zeros_that_are_nobodys(topology, multiple, some_left_out):
    generator = torch.Generator().manual_seed(6)
    experts = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    sent = torch.rand(TOKENS, 2, generator=generator) < 0.7 if some_left_out else torch.ones(TOKENS, 2, dtype=bool)
    plan = new_dispatcher(topology, multiple).plan(experts, sent if some_left_out else None)
    pairs = [pair for pair in pairs_by_expert(experts) if sent[pair]]
    counts = [sum(int(experts[pair]) == expert for pair in pairs) for expert in range(EXPERTS)]
    assert plan.rows.counts == [-(-count // multiple) * multiple for count in counts]
    real = torch.cat([torch.arange(padded) < count for padded, count in zip(plan.rows.counts, counts)])

    x, x_tnkd, gates = draw(TOKENS, WIDTH), draw(TOKENS, HEADS, 2, WIDTH // HEADS), draw(TOKENS, 2)
    rows = at_once(plan.dispatch_tokens)(x)
    assert torch.equal(rows[real], x[[token for token, _ in pairs]]) and not rows[~real].any()
    rows = at_once(plan.dispatch_pairs)(x_tnkd)
    assert torch.equal(rows[real], pairs_of(x_tnkd)[[2 * token + slot for token, slot in pairs]])
    assert not rows[~real].any()
    assert torch.equal(collect_pairs(plan)(rows), x_tnkd * sent[:, None, :, None])
    answers = draw(len(real), WIDTH)  # of experts with a bias, say: what they make of zeros is nobody's either
    expected = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for row, (token, slot) in zip(answers[real], pairs):
        expected[token] += gates[token, slot] * row
    torch.testing.assert_close(at_once(plan.collect_weighted)(answers, gates), expected, atol=1e-12, rtol=0)
    for trip, inputs in (
        (at_once(plan.dispatch_tokens), (x,)),
        (at_once(plan.dispatch_pairs), (x_tnkd,)),
        (collect_pairs(plan), (answers,)),
        (at_once(plan.collect_weighted), (answers, gates)),
    ):
        assert torch.autograd.gradcheck(trip, tuple(value.detach().requires_grad_() for value in inputs))

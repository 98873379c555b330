"""The experts' linear layer against its loop, empty experts included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

IN, OUT = 6, 9
COUNTS = {
    "uneven": [3, 1, 7, 2],
    "empty first, middle and last": [0, 4, 0, 0, 5, 0],
    "all to one": [0, 8],
    "one expert": [5],
    "no rows": [0, 0, 0],
}


def problem(counts: list[int], dtype: torch.dtype):
    """Rows, weights and the gradient of the answer."""
    generator = torch.Generator().manual_seed(len(counts))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(sum(counts), IN).requires_grad_(),
        draw(len(counts), OUT, IN).requires_grad_(),
        draw(sum(counts), OUT),
    )


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_is_the_loop(topology, counts):
    from moe_train.model.grouped_linear import _GroupedLinear, grouped_linear_reference

    x, weight, grad = problem(counts, torch.float64)
    y = _GroupedLinear.apply(x, weight, counts)
    y.backward(grad)
    ours = y.detach(), x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    y = grouped_linear_reference(x, weight, counts)
    y.backward(grad)
    for mine, expected in zip(ours, (y.detach(), x.grad, weight.grad)):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=0)
    for expert, count in enumerate(counts):
        assert (ours[2][expert].abs().max() > 0) == (count > 0)


def test_each_row_meets_its_own_expert(topology):
    """The reference itself: rows 0-1 to expert 0, row 2 to expert 2."""
    from moe_train.model.grouped_linear import grouped_linear_reference

    x = torch.tensor([[1.0], [2.0], [3.0]])
    weight = torch.tensor([[[10.0]], [[100.0]], [[1000.0]]])
    assert grouped_linear_reference(x, weight, [2, 0, 1]).flatten().tolist() == [10.0, 20.0, 3000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_go_straight_to_the_buffer(topology, dtype):
    """With a ``main_grad`` to add to, no gradient is returned and two backwards add up, in fp32."""
    from moe_train.model.grouped_linear import _GroupedLinear

    counts = [3, 0, 4]
    x, weight, grad = problem(counts, dtype)
    _GroupedLinear.apply(x, weight, counts).backward(grad)
    expected = weight.grad.float()
    weight.grad = None
    weight.main_grad = torch.zeros(weight.shape)
    weight.accumulate_in_place = True
    for _ in range(2):
        _GroupedLinear.apply(x, weight, counts).backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 2 * expected, atol=1e-5, rtol=0)


def test_the_layer_knows_its_place(topology):
    from moe_train.model.grouped_linear import GroupedLinear

    engine = SimpleNamespace(params_dtype=torch.float32)  # all of the engine that it reads
    layer = GroupedLinear("layers.0.mlp.down", 4, IN, OUT, engine, topology)
    placement = layer.weight.placement
    assert (placement.name, placement.global_shape) == ("layers.0.mlp.down.weight", (4, OUT, IN))
    assert layer.weight.allreduce is False, "experts are reduced over their own replicas"
    whole = GroupedLinear("layers.0.mlp.down", 4, IN, OUT, engine, topology, sharded=False)
    assert not hasattr(whole.weight, "allreduce") and whole.weight.sequence_parallel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [counts for counts in COUNTS.values() if sum(counts)])
def test_torchs_grouped_product_is_the_loop_too(topology, counts, dtype):
    """What runs on GPUs runs here as well."""
    from moe_train.model.grouped_linear import grouped_linear_reference, grouped_mm
    from parallel.dispatch.rows import ExpertRows

    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((sum(counts), 16), (len(counts), 24, 16), (sum(counts), 24))
    )
    rows = ExpertRows(torch.tensor(counts))
    assert rows.counts == counts
    answers = []
    for product in (grouped_mm, grouped_linear_reference):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(*inputs, rows if product is grouped_mm else counts)
        y.backward(grad)
        answers.append((y.detach(), *(tensor.grad for tensor in inputs)))
    for ours, expected in zip(*answers):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("on_host", [True, False])
def test_the_grouped_product_adds_to_the_buffer(topology, monkeypatch, on_host):
    """Expert by expert where the host knows the counts, else all at once; DDP is told, and finds no memory taken."""
    from moe_train.model.gradients import accumulate_in_place
    from moe_train.model.grouped_linear import grouped_mm
    from parallel.dispatch.rows import ExpertRows

    monkeypatch.setattr(ExpertRows, "known_to_host", on_host)
    counts, generator = [3, 0, 5], torch.Generator().manual_seed(3)
    x, grad = (torch.randn(8, size, generator=generator).bfloat16() for size in (16, 24))
    module = torch.nn.Module()
    module.weight = weight = torch.nn.Parameter(torch.randn(3, 24, 16, generator=generator).bfloat16())
    module.share_embeddings_and_output_weights = False
    rows = ExpertRows(torch.tensor(counts))
    grouped_mm(x, weight, rows).backward(grad)
    expected, weight.grad = weight.grad.float(), None
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
    accumulate_in_place(module)
    seen = []
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: seen.append((weight.grad, weight.grad_added_to_main_grad)))
    for _ in range(2):
        grouped_mm(x, weight, rows).backward(grad)
        weight.grad = None
    torch.testing.assert_close(weight.main_grad, 2 * expected, atol=0.02, rtol=0.01)
    assert [added for _, added in seen] == [True, True], "as DDP's hook finds it"
    assert all(marker.untyped_storage().nbytes() == weight.element_size() for marker, _ in seen)

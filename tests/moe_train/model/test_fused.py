"""The compiled chains of elementwise operations: what they compute, and how often they are compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

EXPERTS, K, ROWS = 8, 2, (24, 12, 30)
"""Numbers of rows: as many compilations for all of them as the case says."""


def randoms(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def routing(rows: int):
    """Logits without ties, also in bf16, and what the backward of the choice takes."""
    generator = torch.Generator().manual_seed(rows)
    order = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(rows)])
    logits = order * 0.5 - 1.75
    gates, probability = randoms((rows, K), (2, EXPERTS), seed=rows)
    return logits, order.topk(K).indices, gates, probability


def places(rows: int):
    """``rows / K`` tokens' slots in rows that are sorted, and the way back."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    return order, order.argsort()


def cases():
    """Name -> (function, arguments for a number of rows in a precision, compilations)."""
    from moe_train.model import head, mlp, norm, rope, router
    from parallel.dispatch import moves

    def norm_backward(rows, dtype):
        grad, x, weight = randoms((rows, 32), (rows, 32), (32,), dtype=dtype)
        return grad, x, weight, x.float().square().mean(-1, keepdim=True).rsqrt()

    def choice_backward(rows, dtype):
        logits, experts, gates, probability = routing(rows)
        return gates.to(dtype), torch.tensor(0.3), probability, logits.to(dtype), experts, True, 0.7, rows - 2, 2

    def head_gradient(rows, dtype):
        (logits,) = randoms((rows, 40), dtype=dtype)
        top = logits.amax(1).float()
        return logits, torch.arange(rows) - 1, top, (logits.float() - top[:, None]).exp().sum(1), 0.1

    def weighted(rows, dtype, left_out=False):
        (x, gates), (_, inverse) = randoms((rows, 16), (rows // K, K), dtype=dtype), places(rows)
        slots = inverse.add(2 * left_out).clamp(max=rows).view(-1, K)
        return x, gates, None if left_out else x[0] * 2, slots, left_out

    def weighted_backward(rows, dtype):
        grad, x, gates = randoms((rows // K, 16), (rows, 16), (rows // K, K), dtype=dtype)
        return grad, x, gates, *places(rows), False, False

    def some_nobodys(rows, dtype):
        return *randoms((rows, 16), dtype=dtype), torch.arange(0, rows + 1, 4)

    def heads_of_rows(rows, dtype, left_out=False):
        (x,), (_, inverse) = randoms((rows, 16), dtype=dtype), places(rows)
        return x, inverse.add(2 * left_out).clamp(max=rows).view(-1, K), 4, left_out

    def rows_of_heads(rows, dtype, filled=False):
        (x,), (order, _) = randoms((rows // K, 4, K, 4), dtype=dtype), places(rows)
        return x, order.add(2 * filled).clamp(max=rows), filled

    def turn(rows, dtype):
        return randoms((rows, 2, 4, 8), (rows, 1, 1, 4), (rows, 1, 1, 4), dtype=dtype)

    return {
        "norm": (norm._normalize, lambda rows, dtype: (*randoms((rows, 32), (32,), dtype=dtype), 1e-6), 2),
        "norm, backward": (norm._normalize_backward, norm_backward, 2),
        "rotation": (rope._turn, turn, 2),
        "rotation, backward": (rope._turn_back, turn, 2),
        "SwiGLU": (mlp._swiglu, lambda rows, dtype: randoms((rows, 48), dtype=dtype), 1),
        "SwiGLU, backward": (mlp._swiglu_backward, lambda rows, dtype: randoms((rows, 24), (rows, 48), dtype=dtype), 1),
        "router": (
            router._choose_and_sum,
            lambda rows, dtype: (routing(rows)[0].to(dtype), K, False, 0.7, rows - 2, 2),
            2,
        ),
        "router, kept alone": (router.choose, lambda rows, dtype: (routing(rows)[0].to(dtype), K, True, None), 2),
        "router, backward": (router._choice_backward, choice_backward, 2),
        "head": (head._total_and_target, lambda rows, dtype: head_gradient(rows, dtype)[:3], 1),
        "head, gradient": (head._gradient, head_gradient, 1),
        "dispatch": (
            moves._sum_of_slots,
            lambda rows, dtype: (lambda x, _, __, *slots: (x, *slots))(*weighted(rows, dtype)),
            2,
        ),
        "dispatch, some nobody's": (moves._or_zeros, some_nobodys, 2),
        "dispatch, heads of rows": (moves._take_heads, heads_of_rows, 2),
        "dispatch, heads of rows, some left out": (moves._take_heads, lambda *which: heads_of_rows(*which, True), 2),
        "dispatch, rows of heads": (moves._take_pairs, rows_of_heads, 2),
        "dispatch, rows of heads, filled up": (moves._take_pairs, lambda *which: rows_of_heads(*which, True), 2),
        "dispatch, weighted": (moves._weighted_sum_of_slots, weighted, 2),
        "dispatch, some left out": (moves._weighted_sum_of_slots, lambda rows, dtype: weighted(rows, dtype, True), 2),
        "dispatch, backward": (moves._weighted_sum_backward, weighted_backward, 2),
    }


COMPILED_WITH_GCC = ("norm", "norm, backward", "SwiGLU, backward", "router", "router, backward")


@pytest.mark.parametrize("name", cases())
def test_compiled_is_as_written_and_compiled_for_no_number_of_rows(name, monkeypatch) -> None:
    """Those named are compiled to machine code here, in fp32; the others as far as the compiler's own graph, which
    shows how often that is needed, and what it computes."""
    from torch._dynamo.utils import counters

    function, arguments, compilations = cases()[name]
    compile_function = torch.compile
    backend = "inductor" if name in COMPILED_WITH_GCC else "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_function(*args, backend=backend, **kwargs))
    torch._dynamo.reset()
    counters.clear()
    for dtype in (torch.float32,) if backend == "inductor" else (torch.float32, torch.bfloat16):
        for rows in ROWS:
            given = arguments(rows, dtype)
            given[0].requires_grad_()  # as in a forward; the next number of rows is evaluated
            with torch.set_grad_enabled(rows == ROWS[0]):
                compiled = function.compiled(*given)
            with torch.no_grad():
                for expected in (function(*given), function.plain(*given)):
                    # Of two terms that cancel, each is rounded or not.
                    close = {"atol": 0.02, "rtol": 0.016} if dtype == torch.bfloat16 else {}
                    torch.testing.assert_close(compiled, expected, **close)
    assert counters["stats"]["unique_graphs"] <= compilations * (1 if backend == "inductor" else 2)
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_gradient_of_the_choice(renormalize, scale) -> None:
    """By hand and by autograd, with two tokens of padding."""
    from moe_train.model.router import _Choice, _sum

    rows, groups = 12, 2
    ours, theirs = (routing(rows)[0].requires_grad_() for _ in range(2))
    _, _, grad_gates, grad_probability = routing(rows)
    for gates, _, z, probability, _ in (
        _Choice.apply(ours, K, renormalize, scale, rows - 2, groups),
        _sum(theirs, K, renormalize, scale, rows - 2, groups, torch.topk),
    ):
        ((gates * grad_gates).sum() + 0.3 * z + (probability * grad_probability).sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_loss_of_the_head_both_ways(topology) -> None:
    from moe_train.model.head import VocabularyHead, _cross_entropy_fused, _cross_entropy_in_place

    head = VocabularyHead(torch.nn.Parameter(torch.zeros(44, 4)), 40, topology)
    (logits,) = randoms((9, 40))
    labels = torch.arange(9) * 4
    nll, grad = _cross_entropy_fused(logits, labels, head, 9)
    other_nll, other_grad = _cross_entropy_in_place(logits.clone(), labels, head, 9)
    logits.requires_grad_()
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(nll, F.cross_entropy(logits, labels, reduction="none").detach())
    torch.testing.assert_close(grad, logits.grad)
    torch.testing.assert_close(other_nll, nll)
    torch.testing.assert_close(other_grad, grad)
    assert math.isclose(nll.mean().item(), F.cross_entropy(logits, labels).item(), rel_tol=1e-6)


def test_torchs_own_switch_turns_it_off() -> None:
    program = "import torch; from parallel.fuse import fused; print(fused(torch.neg).compiled(torch.ones(3)).tolist())"
    environ = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "CXX": "no-compiler"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == "[-1.0, -1.0, -1.0]", done.stderr


def test_cpus_call_no_compiler(monkeypatch) -> None:
    from parallel.fuse import fused

    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert fused(torch.neg)(torch.ones(3)).tolist() == [-1, -1, -1]
    assert fused(torch.neg, eager=torch.abs)(torch.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("missing", [None, "a C compiler", "Python's headers", "its backend for this GPU"])
def test_what_the_compiler_lacks_is_said_and_nothing_is_compiled(monkeypatch, tmp_path, missing) -> None:
    """Triton builds its own part when the first kernel is called: too late to go on without it."""
    from torch.utils import _triton

    from parallel import fuse

    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fuse.shutil, "which", lambda name: None if missing == "a C compiler" else f"/usr/bin/{name}")
    headers = tmp_path / "none" if missing == "Python's headers" else tmp_path
    monkeypatch.setattr(fuse.sysconfig, "get_path", lambda *_: str(headers))
    monkeypatch.setattr(_triton, "has_triton", lambda: missing != "its backend for this GPU")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert fuse.has_compiler.__wrapped__() == (missing is None)
    assert [str(each.message).startswith(f"torch.compile lacks {missing}") for each in said] == [True] * (
        missing is not None
    )


def test_each_width_has_a_kernel_of_its_own(monkeypatch) -> None:
    """And none for a width that is a variable, which would then serve the first one too."""
    from parallel.fuse import fused

    graphs, called = [], []

    def backend(graph, _):
        number = len(graphs)
        graphs.append(graph)
        return lambda *args: called.append(number) or graph.forward(*args)

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend=backend))
    torch._dynamo.reset()
    scaled = fused(lambda x, weight: x * weight)
    for length, width in ((16, 32), (16, 48), (16, 32), (8, 48), (24, 32)):
        scaled.compiled(torch.ones(length, 4, width), torch.ones(width))
    assert called[:3] == [0, 1, 0] and len(graphs) == 4, called
    torch._dynamo.reset()

"""The chunked cross-entropy against fp64: chunks, padding rows, labels on the borders of both."""

from __future__ import annotations

import pytest
import torch

HIDDEN, VOCAB, BATCH, LENGTH = 10, 23, 3, 50  # 150 rows: chunks of 64, 64 and 22 at the smallest setting


def problem(padding: int, rows_of_padding: int = 0):
    """Hidden states ``[S, B, H]``, a weight with rows of padding (loud, to be noticed) and labels."""
    generator = torch.Generator().manual_seed(padding)
    x = torch.randn(LENGTH + rows_of_padding, BATCH, HIDDEN, generator=generator)
    weight = torch.nn.Parameter(torch.randn(VOCAB + padding, HIDDEN, generator=generator))
    weight.data[VOCAB:] = 50.0
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    labels[0, 0], labels[1, 5], labels[2, -1] = 0, VOCAB - 1, VOCAB - 1
    return x.requires_grad_(), weight, labels


def fp64_loss(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
    """(nll [B, S], gradients of x and weight of 3 x the mean)."""
    x64 = x.detach().double().requires_grad_()
    w64 = weight.detach().double().requires_grad_()
    logits = (x64[: labels.shape[1]] @ w64[:VOCAB].T).permute(1, 2, 0)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (3.0 * nll.mean()).backward()
    return nll.detach(), x64.grad, w64.grad


@pytest.mark.parametrize("logits_per_chunk", [1, 1 << 22], ids=["three chunks", "one chunk"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("rows_of_padding", [0, 1])
def test_loss_and_gradients(topology, monkeypatch, logits_per_chunk, padding, rows_of_padding):
    from moe_train.model import head

    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", {"cpu": logits_per_chunk})
    x, weight, labels = problem(padding, rows_of_padding)
    loss, nll = head.VocabularyHead(weight, VOCAB, topology).loss(x, labels)
    (3.0 * loss).backward()
    expected, grad_x, grad_w = fp64_loss(x, weight, labels)
    assert nll.shape == labels.shape and not nll.requires_grad
    torch.testing.assert_close(nll.double(), expected, atol=1e-5, rtol=1e-6)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    torch.testing.assert_close(x.grad.double(), grad_x, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), grad_w, atol=1e-6, rtol=1e-5)
    assert weight.grad[VOCAB:].abs().sum() == 0, "padding learns"


def test_gradient_goes_straight_to_the_buffer(topology):
    from moe_train.model.head import VocabularyHead

    x, weight, labels = problem(2)
    _, _, expected = fp64_loss(x, weight, labels)
    weight.main_grad, weight.accumulate_in_place = torch.zeros(weight.shape), True
    for _ in range(2):
        (3.0 * VocabularyHead(weight, VOCAB, topology).loss(x, labels)[0]).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad.double(), 2 * expected, atol=2e-6, rtol=1e-5)


def test_logits_leave_padding_out(topology):
    from moe_train.model.head import VocabularyHead

    x, weight, _ = problem(5, rows_of_padding=1)
    logits = VocabularyHead(weight, VOCAB, topology).logits(x.detach(), LENGTH)
    assert logits.shape == (BATCH, LENGTH, VOCAB) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, (x[:LENGTH] @ weight[:VOCAB].T).transpose(0, 1), atol=1e-5, rtol=0)
    last = VocabularyHead(weight, VOCAB, topology).logits(x.detach(), LENGTH, LENGTH - 1)
    torch.testing.assert_close(last, logits[:, -1:])


def test_large_logits_do_not_overflow(topology):
    from moe_train.model.head import VocabularyHead

    x, weight, labels = problem(0)
    loss, nll = VocabularyHead(weight, VOCAB, topology).loss(x.detach() * 1e4, labels)
    expected, *_ = fp64_loss(x * 1e4, weight, labels)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-2)
    assert torch.isfinite(loss)

"""Packed documents: a window of several equals Hugging Face's JetMoE run on each of them alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_train.model.documents import document_mask, document_numbers, document_positions
from tests.moe_train.model.test_against_huggingface import huggingface_twin, model_config

END = 2
LENGTHS = [[5, 1, 7, 4], [1, 1, 12, 3], [17]]
"""Documents of each window, their ends included; the last of a window is cut off."""


def windows() -> torch.Tensor:
    """``[3, 18]`` ids: END where a document ends, in inputs of 17, and only there."""
    ids = torch.randint(3, 51, (len(LENGTHS), sum(LENGTHS[0]) + 1), generator=torch.Generator().manual_seed(3))
    for row, lengths in zip(ids, LENGTHS):
        at = 0
        for length in lengths[:-1]:
            at += length
            row[at - 1] = END
    return ids


def test_positions_and_mask_by_hand():
    ids = torch.tensor([[7, END, END, 8, 9], [8, 9, 7, 7, END]])
    assert document_positions(ids, END).t().tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    mask = document_mask(document_numbers(ids, END), torch.bfloat16, queries_per_position=2)
    assert mask.dtype == torch.bfloat16 and mask.isfinite().all() and mask.unique().numel() == 2
    mask = mask == 0
    assert mask.shape == (2, 1, 10, 5)
    first = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask[0, 0].int().tolist() == first + first
    assert mask[1, 0, :5].int().tolist() == torch.ones(5, 5).tril().int().tolist()


@pytest.fixture(scope="module")
def both(topology):
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions

    config = model_config()
    model = build_model(config, topology, ModelOptions(document_end=END))[0]
    ours = {parameter.placement.name: parameter for parameter in model.parameters()}
    twin, theirs = huggingface_twin(config, ours)
    return model, ours, twin, theirs


def alone(twin, ids_bs: torch.Tensor) -> torch.Tensor:
    """The twin's logits ``[B, S, V]`` of inputs ``[B, S]``, each document in a call of its own."""
    rows = [
        torch.cat([twin(part[None], use_cache=False).logits for part in row.split(lengths)], dim=1)
        for row, lengths in zip(ids_bs, LENGTHS)
    ]
    return torch.cat(rows)


def test_logits_are_those_of_the_documents_alone(both):
    model, _, twin, _ = both
    ids = windows()[:, :-1]
    with torch.no_grad():
        logits, expected, mixed = model(ids), alone(twin, ids), twin(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    assert (mixed - expected).abs().max() > 0.1, "what is masked made no difference"


def test_gradients_are_those_of_the_documents_alone(both):
    model, ours, twin, theirs = both
    ids = windows()
    loss, nll_bs = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    expected_bs = F.cross_entropy(alone(twin, ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    expected_bs.mean().backward()
    torch.testing.assert_close(nll_bs, expected_bs.detach(), atol=5e-5, rtol=0)
    for name, parameter in ours.items():
        expected = theirs[name].grad
        torch.testing.assert_close(
            parameter.grad.view_as(expected), expected, atol=1e-5 * expected.abs().max().item() + 1e-8, rtol=0
        )


def what_a_gpu_is_asked_for() -> dict[str, tuple[bool, bool]]:
    """Of attention by its kind: whether cuDNN may do it, and whether keys are grouped."""
    from unittest import mock

    from moe_train.model.attention_core import LayerCache, attend, causal_attention
    from moe_train.model.tokens import Tokens

    found, attention = {}, F.scaled_dot_product_attention

    def ask(kind: str, length: int, masked=False, cache=None, dtype=torch.bfloat16) -> None:
        def asked(q, k, v, **options):
            found[kind] = torch.backends.cuda.cudnn_sdp_enabled(), options.get("enable_gqa", False)
            return attention(q, k, v, **options)

        q_sbngd = torch.ones(length, 1, 2, 2, 8, dtype=dtype, device="cuda")
        table = torch.ones(length, 4, dtype=dtype, device="cuda")
        documents = torch.zeros(1, length, dtype=torch.int64, device="cuda")
        mask = document_mask(documents, dtype, 2) if masked else None
        tokens = Tokens(1, length, 0, rotary=(table, table), documents=documents, mask=mask)
        with mock.patch.object(F, "scaled_dot_product_attention", asked):
            attend(q_sbngd, q_sbngd[:, :, :, 0], q_sbngd[:, :, :, 0], tokens, causal_attention, cache)

    cache = LayerCache()
    ask("causal", 192)
    ask("documents", 128, masked=True)
    ask("documents of 192", 192, masked=True)
    ask("a prompt", 192, cache=cache)
    ask("a token after it", 1, cache=cache)
    ask("fp32", 128, dtype=torch.float32)
    return found


def test_a_gpu_takes_cudnns_attention_where_it_is_sound_and_planned_once(gpu_ranks):
    assert gpu_ranks(1).run("tests.moe_train.model.test_documents:what_a_gpu_is_asked_for") == [
        {
            "causal": (True, True),
            "documents": (True, False),
            "documents of 192": (False, False),
            "a prompt": (True, True),
            "a token after it": (False, True),
            "fp32": (True, False),
        }
    ]

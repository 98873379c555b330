"""The language-model head and its loss, without the logits of a whole micro-batch in memory.

The loss of :class:`VocabularyHead` is computed chunk by chunk of tokens: logits, softmax statistics (reduced over the
tensor ranks that share the vocabulary), and at once the gradients of input and weight, so that neither logits nor
probabilities are kept. Rows of padding in the vocabulary take no part.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, gather_from_tensor_model_parallel_region

from moe_train.model.gradients import add_product, added_to_main_grad, has_main_grad
from parallel.fuse import compiles, fused
from parallel.topology import Topology

LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Small enough for a CPU's caches; on a GPU large enough for the matrix products (0.5 GiB in fp32)."""


class VocabularyHead:
    """Turns final hidden states into losses or logits with a vocabulary-parallel weight ``[V_padded / TP, H]``."""

    def __init__(self, weight: torch.nn.Parameter, vocab_size: int, topology: Topology):
        self.weight, self.vocab_size, self.topology = weight, vocab_size, topology
        self.first = topology.tensor_rank * len(weight)
        self.valid = max(0, min(len(weight), vocab_size - self.first))

    def loss(self, x_sbh: torch.Tensor, labels_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[s, B, H]`` and labels ``[B, S]`` to the mean loss (nats per token) and each token's, ``[B, S]``
        detached."""
        x_nh, shape = self._whole_sequence(x_sbh)
        length = labels_bs.shape[1]
        x_nh = x_nh[: length * shape[1]]  # positions of padding come last
        loss, nll = _LinearCrossEntropy.apply(x_nh, self.weight, labels_bs.t().reshape(-1), self)
        return loss, nll.view(length, -1).t()

    def logits(self, x_sbh: torch.Tensor, length: int, first: int = 0) -> torch.Tensor:
        """``[s, B, H]`` to the fp32 logits of positions ``first`` to ``length``, ``[B, length - first, V]``, on every
        tensor rank."""
        x_nh, (_, batch) = self._whole_sequence(x_sbh)
        logits = gather_from_tensor_model_parallel_region(x_nh[first * batch : length * batch] @ self.weight.t())
        return logits[:, : self.vocab_size].float().view(length - first, batch, -1).transpose(0, 1)

    def _whole_sequence(self, x_sbh: torch.Tensor) -> tuple[torch.Tensor, torch.Size]:
        if self.topology.layout.tensor > 1:
            x_sbh = gather_from_sequence_parallel_region(x_sbh, tensor_parallel_output_grad=True)
        return x_sbh.flatten(0, 1), x_sbh.shape[:2]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nh, weight, labels_n, head):
        count = len(labels_n)
        nll = torch.empty(count, dtype=torch.float32, device=x_nh.device)
        with_grad = ctx.needs_input_grad[0]
        grad_x = torch.empty_like(x_nh) if with_grad else None
        grad_w = torch.zeros(weight.shape, dtype=torch.float32, device=x_nh.device) if with_grad else None
        valid_weight = weight[: head.valid]
        chunk = min(count, max(64, LOGITS_PER_CHUNK[x_nh.device.type] // len(weight)))
        buffer = x_nh.new_empty(chunk, head.valid)
        cross_entropy = _cross_entropy_fused if head.valid and compiles(x_nh) else _cross_entropy_in_place
        for begin in range(0, count, chunk):
            part = slice(begin, min(begin + chunk, count))
            x, labels = x_nh[part], labels_n[part] - head.first
            logits = torch.mm(x, valid_weight.t(), out=buffer[: len(x)])
            nll[part], grad_logits = cross_entropy(logits, labels, head, count if with_grad else None)
            if with_grad:
                torch.mm(grad_logits, valid_weight, out=grad_x[part])
                add_product(grad_w[: head.valid], grad_logits.t(), x)
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w, weight)
        ctx.mark_non_differentiable(nll)
        return nll.mean(), nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_x, grad_w, weight = ctx.saved_tensors
        grad_x.mul_(grad_loss)
        if has_main_grad(weight):
            weight.main_grad.addcmul_(grad_w, grad_loss)
            added_to_main_grad(weight)
            return grad_x, None, None, None
        return grad_x, grad_w.mul_(grad_loss).to(weight.dtype), None, None


def _cross_entropy_in_place(logits, labels, head: VocabularyHead, count: int | None):
    """Of logits ``[n, V / TP]`` the negative log-likelihoods ``[n]``, and with a ``count`` of tokens the gradient of
    their mean by the logits, in the precision of these. One fp32 tensor of the logits' shape, written over again and
    again."""
    dtype, logits = logits.dtype, logits.float()
    ours = (labels >= 0) & (labels < head.valid)
    at = labels.clamp(0, max(head.valid - 1, 0))[:, None]
    empty = logits.shape[1] == 0  # a rank may hold nothing but padding
    top = logits.new_full((len(logits),), -torch.inf) if empty else logits.amax(dim=1)
    top = head.topology.max_over_tensor_ranks(top)
    logits.sub_(top[:, None])
    if empty:
        target = logits.new_zeros(len(logits))
    else:  # without a mask as an index, which would have the host wait for a GPU
        target = logits.gather(1, at)[:, 0].mul_(ours)
    probability = logits.exp_()
    total, target = head.topology.sum_over_tensor_ranks(torch.stack([probability.sum(dim=1), target]))
    nll = total.log() - target
    if count is None:
        return nll, None
    probability.div_(total[:, None])
    if not empty:
        probability.scatter_(1, at, probability.gather(1, at).sub_(ours[:, None].float()))
    return nll, probability.div_(count).to(dtype)


def _cross_entropy_fused(logits, labels, head: VocabularyHead, count: int | None):
    """The same in passes that each read the logits as they are and write no other tensor of their size but the
    gradient."""
    top = head.topology.max_over_tensor_ranks(_largest(logits))
    total, target = head.topology.sum_over_tensor_ranks(_total_and_target(logits, labels, top))
    return total.log() - target, None if count is None else _gradient(logits, labels, top, total, 1 / count)


@fused(rows=True)
def _largest(logits: torch.Tensor) -> torch.Tensor:
    return logits.amax(dim=1).float()


@fused(rows=True)
def _total_and_target(logits: torch.Tensor, labels: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """``[2, n]``: the sum of the exponentials, and the logit of the label where it is on this rank; both below
    ``top``."""
    at = labels.clamp(0, logits.shape[1] - 1)[:, None]
    target = (logits.gather(1, at)[:, 0].float() - top) * (at[:, 0] == labels)
    return torch.stack([(logits.float() - top[:, None]).exp().sum(dim=1), target])


@fused(rows=True)
def _gradient(logits, labels, top, total, scale) -> torch.Tensor:
    probability = (logits.float() - top[:, None]).exp() / total[:, None]
    chosen = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    return ((probability - chosen.float()) * scale).to(logits.dtype)

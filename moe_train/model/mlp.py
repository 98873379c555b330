"""The kinds of MLP, all gated: ``down(act(gate x) * up x)``. Each maps ``[s, B, H] -> [s, B, H]``, s the part of the
sequence on this tensor rank.

A kind is a computation that takes turns (:mod:`parallel.turns`): the mixture yields while rows travel.

The mixture (JetMoE eq. 3, 4) is ``sum_s gate_s * expert_s(x) + bias``, dropless. With ``recompute: selective`` nothing
inside of an MLP is kept for the backward: the widest activations of the model are computed again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_train.model.config import ModelConfig
from moe_train.model.kernels import kernels_of
from moe_train.model.options import ModelOptions
from moe_train.model.parameters import output_bias
from moe_train.model.router import Router
from moe_train.model.tokens import Tokens
from parallel.dispatch.kinds import DISPATCHERS
from parallel.fuse import fused
from parallel.topology import Topology
from parallel.transformer_engine import row_multiple
from parallel.turns import Steps, without_waiting


class MixtureOfMLP(torch.nn.Module):
    """Experts of which each token uses some. What lies between the two trips is computed again from the dispatched
    rows, without another exchange.
    """

    def __init__(self, name: str, config: ModelConfig, engine, topology: Topology, options: ModelOptions):
        super().__init__()
        mlp, hidden, dtype = config.mlp, config.hidden_size, options.dtype
        kernels = kernels_of(options)
        self.engine, self.recompute = engine, kernels.recompute if options.recompute == "selective" else None
        self.activation = mlp.activation
        self.router = Router(
            f"{name}.router", hidden, mlp.num_experts, mlp.top_k, config.router_of("mlp"), topology, dtype
        )
        multiple = row_multiple(options.fp8_recipe)
        self.dispatcher = DISPATCHERS[options.dispatcher](mlp.num_experts, engine, topology, row_multiple=multiple)
        experts, ffn = mlp.num_experts, mlp.ffn_hidden_size
        self.gate_up = kernels.grouped_linear(f"{name}.gate_up", experts, hidden, 2 * ffn, engine, topology)
        self.down = kernels.grouped_linear(f"{name}.down", experts, ffn, hidden, engine, topology)
        self.bias = output_bias(f"{name}.bias", hidden, topology, dtype) if mlp.bias else None

    def forward(self, x_sbh: torch.Tensor, tokens: Tokens) -> Steps[torch.Tensor]:
        x_th = x_sbh.flatten(0, 1)
        gates_tk, experts_tk, sent_tk = self.router(x_th, tokens)
        plan = self.dispatcher.plan(experts_tk, sent_tk)
        rows = yield from plan.dispatch_tokens(x_th)

        def experts(rows: torch.Tensor) -> torch.Tensor:
            return self.down(gated_activation(self.gate_up(rows, plan.rows), self.activation), plan.rows)

        if self.recompute and torch.is_grad_enabled():
            answers = self.recompute(self.engine, experts, rows)
        else:
            answers = experts(rows)
        return (yield from plan.collect_weighted(answers, gates_tk, self.bias)).view_as(x_sbh)


class DenseMLP(torch.nn.Module):
    """One MLP for every token, its width split over the tensor ranks."""

    def __init__(self, name: str, config: ModelConfig, engine, topology: Topology, options: ModelOptions):
        super().__init__()
        mlp, hidden = config.mlp, config.hidden_size
        kernels = kernels_of(options)
        self.engine, self.recompute = engine, kernels.recompute if options.recompute == "selective" else None
        self.activation = mlp.activation
        self.gate_up = kernels.column_parallel(f"{name}.gate_up", (2, mlp.ffn_hidden_size, hidden), 1, engine, topology)
        self.down = kernels.row_parallel(f"{name}.down", (hidden, mlp.ffn_hidden_size), engine, topology)

    @without_waiting
    def forward(self, x_sbh: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return self.recompute(self.engine, self._compute, x_sbh)
        return self._compute(x_sbh)

    def _compute(self, x_sbh: torch.Tensor) -> torch.Tensor:
        return self.down(gated_activation(self.gate_up(x_sbh)[0], self.activation))[0]


MLP = {"mixture": MixtureOfMLP, "dense": DenseMLP}
"""``kind`` of a model's MLP -> its module."""

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """``act(gate) * up`` for ``gate_up = [gate | up]``, ``[..., 2F] -> [..., F]``."""
    if activation == "silu":
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps the input alone."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad):
        return _swiglu_backward(grad, *ctx.saved_tensors)


@fused(rows=True)
def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward_in_place(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Writes both halves into one tensor."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    grad_gate, grad_up = result.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return result


@fused(rows=True, eager=_swiglu_backward_in_place)
def _swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)

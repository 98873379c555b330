"""AdamW whose moments live in host memory and whose update runs on the CPU: 8 bytes of a parameter less on the GPU.

megatron-core's distributed optimizer keeps an fp32 copy of the parameters that a rank updates; that copy stays on the
device. Each step brings the gradients to the host, updates a copy there, and brings the result back. docs/gpu.md says
when it pays.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_train.errors import UserError


class OffloadedAdamW(torch.optim.Optimizer):
    """Takes the place of the AdamW that megatron-core made: the same groups, parameters and arithmetic.

    Args:
        original: the optimizer that it replaces, before its first step.
        kernel: ``torch`` (its fused AdamW) or ``deepspeed`` (its CPU Adam).

    Attributes:
        state: by parameter, ``exp_avg`` and ``exp_avg_sq`` in host memory. ``step`` is kept by group.
    """

    def __init__(self, original: torch.optim.Optimizer, kernel: str):
        super().__init__([torch.nn.Parameter(torch.empty(0))], defaults={})
        # Put in afterwards, as megatron-core does: its ranges of fp32 parameters are views, which no constructor takes.
        self.param_groups = [dict(group) for group in original.param_groups]
        self._hosts: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        host_groups = []
        for group in self.param_groups:
            group["step"] = 0
            hosts = [self._host_copy(parameter) for parameter in group["params"]]
            host_groups.append({"params": hosts, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}})
        self._kernel = kernel
        self._adam = _make(kernel, host_groups)
        for parameter, host in self._hosts.items():
            moments = {
                name: torch.zeros_like(host, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")
            }
            self.state[parameter] = moments
            self._adam.state[host].update(moments, step=0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        for parameter, host in self._hosts.items():
            host.copy_(parameter, non_blocking=True)  # it may have been loaded from a checkpoint
            if parameter.grad is None:
                host.grad = None
                continue
            if host.grad is None:
                # else the copy is several times slower
                host.grad = torch.empty_like(host, pin_memory=parameter.is_cuda)
            host.grad.copy_(parameter.grad, non_blocking=True)
        _wait(self._hosts)
        for group, host_group in zip(self.param_groups, self._adam.param_groups):
            host_group.update(lr=group["lr"], weight_decay=group["weight_decay"])
            for host in host_group["params"]:
                taken = group["step"]
                self._adam.state[host]["step"] = torch.tensor(float(taken)) if self._kernel == "torch" else taken
            group["step"] += 1
        self._adam.step()
        for parameter, host in self._hosts.items():
            parameter.copy_(host, non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients of the device's parameters; those on the host are overwritten by each step."""
        super().zero_grad(set_to_none)

    def _host_copy(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        pinned = parameter.is_cuda
        host = torch.empty(parameter.shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
        self._hosts[parameter] = torch.nn.Parameter(host)
        return self._hosts[parameter]


def _make(kernel: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kernel == "torch":
        return torch.optim.AdamW(groups, fused=True)
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        raise UserError(
            "optimizer.offload: deepspeed is not installed: pip install 'moe-train[deepspeed]', or set "
            "optimizer.offload=torch"
        ) from None
    return DeepSpeedCPUAdam(groups, adamw_mode=True)


def _wait(parameters) -> None:
    """Until copies to the host are there."""
    if any(parameter.is_cuda for parameter in parameters):
        torch.cuda.synchronize()

"""AdamW over megatron-core's data parallelism and distributed optimizer.

Gradients are reduced and optimizer states sharded over the data-parallel ranks (experts: over the expert-data-parallel
ranks), in fp32, also where the model is bf16. Matrices decay, norms and biases do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as EngineOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from moe_train.model.gradients import accumulate_in_place
from moe_train.model.transformer import Transformer
from moe_train.training.config import OptimizerConfig
from moe_train.training.offload import OffloadedAdamW

BUCKET_SIZE = 40_000_000
"""Elements of a bucket at least, where communication is overlapped: large enough for the network's full bandwidth."""


def wrap_data_parallel(chunks: list[Transformer], overlap: bool) -> list[DistributedDataParallel]:
    """Give each chunk a gradient buffer and its reduction.

    With ``overlap`` (GPUs) gradients are reduced beside the backward, bucket by bucket, and updated weights gathered
    beside the next forward, each bucket before the first module that needs it. Between an update and that forward a
    rank's weights are whole only after :meth:`Optimizer.gather_weights`.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=BUCKET_SIZE if overlap else None,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0 or not overlap)
        for index, chunk in enumerate(chunks)
    ]
    engine = chunks[0].config
    engine.finalize_model_grads_func = finalize_model_grads
    if overlap:
        engine.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    for chunk in chunks:
        accumulate_in_place(chunk)
    return wrapped


@dataclass(frozen=True)
class ShardState:
    """What one rank's optimizer keeps for a flat range of one parameter.

    ``start`` is where the range begins in the flattened local parameter; ``main`` is the fp32 copy that is updated (the
    parameter's own storage where the model is fp32), ``exp_avg`` and ``exp_avg_sq`` the moments; all 1-D, of one
    length.
    """

    parameter: torch.nn.Parameter
    start: int
    main: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class Optimizer:
    """The optimizer of this rank: gradient norm, clipping, update, and access to its sharded state.

    Args:
        chunks: the wrapped chunks of the model.
        config: learning rate, betas, weight decay, clipping.
        bf16: whether the model's parameters are bf16 (fp32 main parameters are kept then).
    """

    def __init__(self, chunks: list[DistributedDataParallel], config: OptimizerConfig, bf16: bool):
        self.clip_grad = config.clip_grad
        self._chunks, self._topology = chunks, chunks[0].module.topology
        no_decay = ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.dim() == 1))
        self._chain = get_megatron_optimizer(
            EngineOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.betas[0],
                adam_beta2=config.betas[1],
                adam_eps=config.eps,
                clip_grad=0.0,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=True,
            ),
            chunks,
            config_overrides={no_decay: ParamGroupOverride(wd_mult=0.0)},
            use_gloo_process_groups=False,
        )
        for part in self._parts:
            for group in part.optimizer.param_groups:
                group["weight_decay"] = config.weight_decay * group["wd_mult"]
                if isinstance(part.optimizer, torch.optim.AdamW):
                    group["fused"] = True
            if config.offload is not None:
                part.optimizer = OffloadedAdamW(part.optimizer, config.offload)

    @property
    def _parts(self) -> list[DistributedOptimizer]:
        """One optimizer for the dense parameters and one for the experts."""
        return [part for part in self._chain.chained_optimizers if part.optimizer is not None]

    def zero_grad(self) -> None:
        """Clear gradients: at the start of every step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._chain.zero_grad()

    def gradient_norm(self) -> float:
        """Prepare the fp32 gradients of this step and return their norm over all parameters of the model."""
        self._chain.prepare_grads()
        gradients = [gradient for part in self._parts for gradient in part.get_main_grads_for_grad_norm()]
        # Not megatron-core's: without Apex or Transformer Engine that waits for the device once for each parameter.
        norms = (
            torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1, device=self._topology.device)
        )
        return float(self._topology.sum_over_world(norms.double().square().sum()).sqrt())

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip to ``clip_grad`` and apply one AdamW update with learning rate ``lr``."""
        excess = gradient_norm / self.clip_grad if self.clip_grad is not None else 0.0
        for part in self._parts:
            gradients = [main.grad for main in part.get_parameters()]
            if excess > 1.0 and gradients:  # a rank may update nothing of a small model
                torch._foreach_div_(gradients, excess)
            for group in part.optimizer.param_groups:
                group["lr"] = lr
        self._chain.step_with_ready_grads()

    def gather_weights(self) -> None:
        """Make this rank's weights whole where the next forward would: before they are read outside of one. Every rank
        calls it."""
        for chunk in self._chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    # ---- state, for checkpoints

    @property
    def steps_taken(self) -> int:
        """Updates so far, as AdamW's bias correction counts them."""
        counts = [0]
        for part in self._parts:
            for group in part.optimizer.param_groups:
                first = [part.optimizer.state[parameter] for parameter in group["params"][:1]]
                counts += [int(holder["step"]) for holder in (group, *first) if "step" in holder]
        return max(counts)  # Apex and older versions of Transformer Engine do not count on where a group is empty

    def set_steps_taken(self, steps: int) -> None:
        """Set the count of updates, after the state has been filled in from a checkpoint."""
        for part in self._parts:
            for group in part.optimizer.param_groups:
                if isinstance(part.optimizer, torch.optim.AdamW):
                    for parameter in group["params"]:
                        part.optimizer.state[parameter]["step"] = torch.full((), float(steps), device=parameter.device)
                else:
                    group["step"] = steps

    def shards(self) -> Iterator[ShardState]:
        """The state of every flat range that this rank updates, allocated (zero) where no step was taken yet."""
        for part in self._parts:
            groups = zip(
                part.model_float16_groups + part.model_fp32_groups,
                part.shard_fp32_from_float16_groups + part.shard_fp32_groups,
            )
            for parameters, mains in groups:
                for parameter, main in zip(parameters, mains):
                    state = part.optimizer.state[main]
                    for moment in ("exp_avg", "exp_avg_sq"):
                        if moment not in state:
                            state[moment] = torch.zeros_like(main)
                    if isinstance(part.optimizer, torch.optim.AdamW) and "step" not in state:
                        state["step"] = torch.zeros((), device=main.device)
                    held = part._get_model_param_range_map(parameter)["param"]
                    yield ShardState(parameter, held.start, main.detach(), state["exp_avg"], state["exp_avg_sq"])

    def reload_main_parameters(self) -> None:
        """Take the model's weights as they are now: after they were loaded without an optimizer state."""
        self._chain.reload_model_params()

"""Transformer Engine on what looks like a GPU: its Python as it is, its C++ module replaced by torch.

What is real: its modules, autograd functions, recipes, FP8 tensors, the caching of quantised weights, the accumulation
into ``main_grad``, its Adam. What is not: kernels and their speed. FP8 is rounded to as the hardware does, with the
scales of per-tensor recipes (``delayed``, ``tensorwise``); products of its numbers are summed in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys

import torch


def train(
    layout: dict, steps: int = 4, recipe: str | None = None, kernels: str = "transformer_engine", **options
) -> list[dict]:
    """As :func:`tests.steps_on_ranks.train`, with 32 sequences a micro-batch so that FP8 finds its multiples of 16."""
    return _run(layout, steps, recipe, kernels, options)


def save(layout: dict, folder: str, steps: int, more: int, recipe: str) -> list[dict]:
    """Take ``steps`` steps, save, take ``more``: the figures of the latter."""
    from pathlib import Path

    from moe_train.checkpoint.config import CheckpointConfig
    from moe_train.checkpoint.save import Checkpointer

    def saved_between(built, figures):
        chunks, _, optimizer, _, topology = built
        checkpointer = Checkpointer(Path(folder), CheckpointConfig(), chunks, optimizer, topology)
        checkpointer.save(steps, {"step": steps, "samples": steps * 64, "tokens": 0})
        checkpointer.wait()
        return figures(range(steps, steps + more))

    return _run(layout, steps, recipe, "transformer_engine", {}, saved_between)


def resume(layout: dict, checkpoint: str, steps: int, more: int, recipe: str) -> list[dict]:
    """Go on from a checkpoint in a model of other initial weights."""
    from pathlib import Path

    from moe_train.checkpoint.load import load_checkpoint

    def loaded_before(built, figures):
        load_checkpoint(Path(checkpoint), built[0], built[2], built[4])
        return figures(range(steps, steps + more))

    return _run(layout, 0, recipe, "transformer_engine", {"seed": 77}, loaded_before)


def products(recipe: str | None) -> list[int]:
    """How many matrix products of a step ran in FP8, and how many there were."""
    from parallel.transformer_engine import counted_products

    def counted(built, figures):
        figures(range(1))
        with counted_products() as count:
            figures(range(1, 2))
        return [count.fp8, count.total]

    return _run({}, 0, recipe, "transformer_engine", {} if recipe else {"precision": "bf16"}, counted)


def bytes_of_fp8_weights() -> tuple[int, int]:
    """Of the copies that are kept of weights between micro-batches, and what the memory planner counts for them."""
    from moe_train.plan.memory import state_bytes
    from moe_train.plan.shards import place

    def counted(built, figures):
        figures(range(1))
        chunks, *_, topology = built
        copies = [
            copy
            for module in chunks[0].modules()
            for copy in getattr(module, "_fp8_workspaces", {}).values()
            if hasattr(copy, "_fp8_dtype")
        ]
        held = sum(part.numel() for copy in copies for part in (copy._data, copy._transpose) if part is not None)
        model, layout = chunks[0].model_config, topology.layout
        planned, without = (
            state_bytes(model, layout, place(layout, topology.rank), precision)["weights"]
            for precision in ("fp8", "bf16")
        )
        return held, planned - without

    return _run({}, 0, "tensorwise", "transformer_engine", {}, counted)


def built(preset: str, recipe: str | None) -> dict:
    """What a preset is made of, its layers on the meta device."""
    from moe_train.config import load_model
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions
    from parallel import engine
    from tests import steps_on_ranks

    topology = dataclasses.replace(engine.start(steps_on_ranks.make_layout(1), seed=1), device=torch.device("meta"))
    options = ModelOptions(dtype=torch.bfloat16, kernels="transformer_engine", fp8_recipe=recipe)
    (model,) = build_model(load_model(preset), topology, options)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "names": {parameter.placement.name for parameter in model.parameters()},
        "modules": {type(module).__name__ for module in model.modules()},
    }


def _run(layout: dict, steps: int, recipe: str | None, kernels: str, options: dict, then=None) -> list[dict]:
    from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig
    from tests import steps_on_ranks

    model = steps_on_ranks.small_model(
        attention=MixtureOfAttentionConfig(num_kv_heads=4, head_dim=16, num_experts=4, top_k=2),
        mlp=MixtureOfMLPConfig(ffn_hidden_size=32, num_experts=4, top_k=2),
        depth=options.pop("depth", None),
    )
    options = {"precision": "fp8" if recipe else "fp32", "kernels": kernels, "fp8_recipe": recipe, **options}
    layout = steps_on_ranks.make_layout(int(os.environ.get("WORLD_SIZE", 1)), **layout)

    def figures(numbers: range) -> list[dict]:
        return steps_on_ranks.run_steps(built, numbers, model.vocab_size, micro_batch=32, global_batch=64)

    if torch.cuda.is_available():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # it remembers earlier models of this process
    built = steps_on_ranks.build(layout, model, **options)
    made_by = {type(part.optimizer).__module__.partition(".")[0] for part in built[2]._parts}
    assert made_by == {"transformer_engine" if torch.cuda.is_available() else "torch"}
    built[1].micro_batch_size = 32
    first = figures(range(steps))
    return first if then is None else then(built, figures)


def install() -> None:
    """Have Transformer Engine compute with these functions, for the rest of the process."""
    for name in ("FLASH_ATTN", "FUSED_ATTN", "MASKED_SOFTMAX_FUSION"):
        os.environ[f"NVTE_{name}"] = "0"  # leaves its attention in plain torch
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch as extension

    for function in FUNCTIONS:
        original = getattr(extension, function.__name__)
        for module in [each for name, each in sys.modules.items() if name.startswith("transformer_engine")]:
            if vars(module).get(function.__name__) is original:
                setattr(module, function.__name__, function)


# ---- the functions of the C++ module, with its arguments


def generic_gemm(
    a, transpose_a, b, transpose_b, out, quantizer, dtype, bias, bias_dtype, gelu, gelu_in, grad, *rest, **_
):
    """Column-major ``op(a) op(b)``, which in rows is ``op(b) op(a)``; ``rest``: workspace, its size, accumulate, ..."""
    left, right = _plain(b), _plain(a)
    rows = left.flatten(0, -2).float()
    result = (rows.t() if transpose_b else rows) @ (right.float().t() if transpose_a else right.flatten(0, -2).float())
    if out is None:
        shape = result.shape if transpose_b else (*left.shape[:-1], result.shape[-1])
        kept = b.dtype if isinstance(b, torch.Tensor) else torch.bfloat16
        out = result.view(shape).to(kept)
    elif rest[2]:
        out.add_(result.view_as(out))
    else:
        out.copy_(result.view_as(out))
    return out, None, None, None


def te_general_grouped_gemm(a, transpose_a, b, transpose_b, out, dtype, splits, bias, bias_dtype, single_output, *rest):
    """A product for each pair of ``a`` and ``b``; ``rest``: gelu input, grad, workspaces, their size, accumulate,
    ..."""
    outs = out[0].split(_numbers(splits)) if single_output else out
    for first, second, into in zip(a, b, outs):
        if into.numel():
            generic_gemm(first, transpose_a, second, transpose_b, into, *[None] * 7, None, 0, rest[4])
    return bias


def split_quantize(x, splits, quantizers, **_):
    splits = _numbers(splits)
    assert not any(rows % 16 for rows in splits), f"the hardware wants multiples of 16 rows, not {splits}"
    return [quantize(part, quantizer) for part, quantizer in zip(x.split(splits), quantizers)]


def quantize(x, quantizer, out=None, noop=None):
    """Per-tensor scaling to FP8: by the tensor's own largest value, or with the scale of the quantizer, which notes
    that."""
    largest = x.detach().abs().max().float() if x.numel() else torch.zeros(())
    fp8 = _fp8(quantizer.dtype)
    if "CurrentScaling" in type(quantizer).__name__:
        scale = torch.where(largest > 0, torch.finfo(fp8).max / largest, 1.0)
    else:
        scale = quantizer.scale.view(())
        quantizer.amax.copy_(torch.maximum(quantizer.amax.view(()), largest).view_as(quantizer.amax))
    data = (x.float() * scale).clamp(-torch.finfo(fp8).max, torch.finfo(fp8).max).to(fp8).view(torch.uint8)
    if out is None:
        out = create_empty_quantized_tensor(quantizer, x.shape, x.dtype)
    if out._data is not None:
        out._data.copy_(data.view_as(out._data))
    if out._transpose is not None:
        out._transpose.copy_(data.movedim(-1, 0))
        out._transpose_invalid = False
    out._scale_inv.copy_((1 / scale).view_as(out._scale_inv))
    return out


def create_empty_quantized_tensor(quantizer, shape, dtype, *_):
    """An FP8 tensor with the layouts that the quantizer is set to."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    numbers = functools.partial(torch.empty, dtype=torch.uint8, device="cuda")
    columns = (shape[-1], *shape[:-1])
    parts = {
        "data": numbers(tuple(shape)) if quantizer.rowwise_usage else None,
        "data_transpose": numbers(columns) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": torch.ones(1, device="cuda"),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **parts)
    return Float8Tensor(shape=tuple(shape), dtype=dtype, **parts)


def fp8_transpose(data, dtype, *, out=None):
    transposed = data.movedim(-1, 0).contiguous()
    return transposed if out is None else out.copy_(transposed)


def fused_amax_and_scale_update_after_reduction(amax, histories, scales, algorithm, fp8, margin):
    """Delayed scaling: note the largest values, and scale by the largest of the history."""
    assert algorithm == "max"
    for history, scale, noted in zip(histories, scales, amax.split([scale.numel() for scale in scales])):
        history[0].copy_(noted)
        history.copy_(history.roll(-1, 0))
        largest = history.amax(0)
        scale.copy_(torch.where(largest > 0, torch.finfo(_fp8(fp8)).max / largest, scale))
        history[0].zero_()


def rmsnorm_fwd(x, weight, eps, *_):
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * scale.unsqueeze(-1) * weight.float()).to(x.dtype), None, scale


def rmsnorm_bwd(grad, x, scale, weight, *_):
    normed, grad = x.float() * scale.unsqueeze(-1), grad.float()
    grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
    grad = grad * weight.float()
    return (scale.unsqueeze(-1) * (grad - normed * (grad * normed).mean(-1, keepdim=True))).to(x.dtype), grad_weight


def multi_tensor_adam(chunk, skip, lists, lr, beta1, beta2, eps, step, decoupled, correct, decay):
    """AdamW of fp32 gradients, parameters and moments."""
    assert decoupled and correct
    for grad, parameter, moment, square in zip(*lists):
        moment.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt_().add_(eps)
        parameter.add_(moment / (1 - beta1**step) / root + decay * parameter, alpha=-lr)


FUNCTIONS = (
    generic_gemm,
    te_general_grouped_gemm,
    split_quantize,
    quantize,
    create_empty_quantized_tensor,
    fp8_transpose,
    fused_amax_and_scale_update_after_reduction,
    rmsnorm_fwd,
    rmsnorm_bwd,
    multi_tensor_adam,
)


def _numbers(splits) -> list[int]:
    return splits.tolist() if torch.is_tensor(splits) else list(splits)


def _fp8(dtype) -> torch.dtype:
    return torch.float8_e4m3fn if "E4M3" in str(dtype) else torch.float8_e5m2


def _plain(x) -> torch.Tensor:
    """An operand as the product takes it: FP8 numbers times their scale."""
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return x
    data = x._data if x._data is not None else x._transpose.movedim(0, -1).contiguous()
    return data.view(_fp8(x._fp8_dtype)).float() * x._scale_inv

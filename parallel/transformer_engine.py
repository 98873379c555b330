"""NVIDIA's Transformer Engine: whether it is there, what this device can do with it, and whether FP8 really ran.

megatron-core takes its absence in silence (its FP8 context does nothing then), and so it does a recipe that the device
cannot do. Here both are errors before the first step, and the products of the first step are counted.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from parallel.errors import EngineError

OLDEST = (2, 9)
RECIPES = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
"""Recipe -> the question that Transformer Engine answers about it."""
PRODUCTS = ("generic_gemm", "te_general_grouped_gemm")
"""Every matrix product of Transformer Engine goes through a function of its C++ module that is called so, or begins
so."""


def choose_kernels(wanted: str | None, recipe: str | None) -> str:
    """``torch`` or ``transformer_engine``: what the model of this rank is built from.

    Args:
        wanted: one of the two, or None: Transformer Engine where there is a GPU and it is installed.
        recipe: the FP8 recipe, or None without FP8, which only Transformer Engine has.

    Raises:
        EngineError: what is asked for is not to be had here.
    """
    needs_it = "training.precision: fp8" if recipe else "training.kernels: transformer_engine"
    if wanted == "torch":
        if recipe:
            raise EngineError(f"{needs_it} needs Transformer Engine: leave training.kernels out, or set bf16")
        return "torch"
    required = recipe is not None or wanted is not None
    if not torch.cuda.is_available():
        if required:
            raise EngineError(
                f"{needs_it} needs a GPU, and this rank sees none; run it where there is one, or leave the key out"
            )
        return "torch"
    version = find_transformer_engine()
    if version is None:
        if required:
            raise EngineError(
                f"{needs_it} needs Transformer Engine, which is not installed: pip install 'moe-train[gpu]'"
            )
        return "torch"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        if required:
            raise EngineError(f"{needs_it} needs Transformer Engine {oldest} or later, and {version} is installed")
        return "torch"
    if recipe is not None:
        _check_recipe(recipe)
    return "transformer_engine"


def find_transformer_engine() -> str | None:
    """The version of the installed Transformer Engine, or None.

    Raises:
        EngineError: it is installed, but its part for torch does not load.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        import transformer_engine.pytorch  # noqa: F401  (after torch, whose libraries it needs)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"Transformer Engine is installed but does not load ({reason}): build it for this torch, "
            f"{torch.__version__}, or uninstall it"
        ) from error
    return importlib.metadata.version("transformer_engine")


def _check_recipe(recipe: str) -> None:
    """Raise :class:`EngineError` unless the device can do ``recipe``."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    answers = {name: getattr(FP8GlobalStateManager, question)() for name, question in RECIPES.items()}
    can, reason = answers[recipe]
    if not can:
        others = [name for name, (possible, _) in answers.items() if possible]
        instead = f"set {' or '.join(others)}" if others else "set training.precision to bf16"
        raise EngineError(
            f"training.fp8_recipe: {recipe} is not for {torch.cuda.get_device_name()} ({reason.rstrip('.')}): {instead}"
        )


def row_multiple(recipe: str | None) -> int:
    """What the rows of an FP8 product are a multiple of (1 without FP8)."""
    if recipe is None:
        return 1
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    return get_fp8_align_size(Fp8Recipe(recipe))


def precision_context(config) -> AbstractContextManager:
    """In it Transformer Engine's layers compute in the FP8 recipe of ``config``, the engine's; nothing without one.

    Raises:
        EngineError: FP8 is asked for and megatron-core gives a context that does nothing.
    """
    if not config.fp8:
        return nullcontext()
    from megatron.core.fp8_utils import get_fp8_context

    context = get_fp8_context(config)
    if isinstance(context, nullcontext):
        raise EngineError("training.precision: fp8, but megatron-core does not see Transformer Engine")
    return context


@dataclass
class Products:
    """Matrix products of Transformer Engine: how many, and how many of them took FP8 operands."""

    total: int = 0
    fp8: int = 0


@contextmanager
def counted_products() -> Iterator[Products]:
    """Count what runs inside by looking at what Transformer Engine hands to its C++ module. A grouped product counts
    once."""
    import transformer_engine_torch as extension

    count = Products()
    originals = {name: getattr(extension, name) for name in dir(extension) if name.startswith(PRODUCTS)}
    for name, original in originals.items():
        setattr(extension, name, _counted(original, count))
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(extension, name, original)


def _counted(product, count: Products):
    def call(*args, **kwargs):
        first = args[0]  # a tensor, or what stands for a quantised one; a list of them for a grouped product
        while isinstance(first, list | tuple):
            first = first[0]
        count.total += 1
        count.fp8 += type(first) not in (torch.Tensor, torch.nn.Parameter)
        return product(*args, **kwargs)

    return call

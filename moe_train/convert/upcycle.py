"""``moe-train checkpoint upcycle``: a mixture of experts out of a dense model, as Skywork-MoE does it (arXiv
2406.06563).

Each expert begins as a copy of the dense MLP and a token's gates add up to 1: so the mixture computes what the dense
model did, whatever its routers choose, until training makes the experts differ. One parameter is in memory at a time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.yaml_marks import Document, Mark, explain, parse_yaml
from moe_train.errors import DamagedError, UserError
from moe_train.model.config import MixtureOfMLPConfig, ModelConfig

if TYPE_CHECKING:
    import torch

    from moe_train.checkpoint.weights import WeightsReader
    from moe_train.convert.huggingface import HuggingFaceModel

KEPT_STATE = (
    "step",
    "samples",
    "tokens",
    "ledger",
    "faults",
    "load_balancing_coefs",
    "optimizer_steps",
    "random",
    "precision",
)
"""What of a run's state goes with its optimizer's."""


def upcycle(
    dense: str | Path,
    out: str | Path,
    experts: int,
    top_k: int,
    router_std: float = 0.01,
    noise: float = 0.0,
    reinitialize: float = 0.0,
    seed: int = 1234,
    router: dict[str, Any] | None = None,
    keep_optimizer: bool = False,
) -> int:
    """Write the checkpoint ``out``: the dense model with ``experts`` copies of each MLP, of which a token uses
    ``top_k``.

    Args:
        dense: one of our checkpoints, or a Hugging Face folder, of a model with ``mlp.kind: dense``.
        router_std: of the new routers' weights; their biases, if they have any, are 0.
        noise: added to each expert's weights, as a part of the standard deviation of the dense weight.
        reinitialize: the part of each expert's hidden channels, another choice for each expert, whose weights are drawn
            anew with the standard deviation of the dense weight.
        seed: of routers, noise and channels.
        router: keys of the new ``mlp.router`` over the model's ``router``, such as ``{"normalize_logits": True}``; the
            routers of attention stay as they were.
        keep_optimizer: carry over the moments too (copied like the weights, 0 for what is new), and where the run
            stood: what comes out is resumed (``--resume``), not initialised from.

    Raises:
        UserError: the checkpoint does not fit, or ``out`` exists, or a layer is too large for the memory.
        DamagedError: the checkpoint is not what its manifest says.
    """
    source = _open(dense)
    config = mixture_config(source.config, str(dense), experts, top_k, router or {})
    for name, value, limit in (
        ("--noise", noise, None),
        ("--reinitialize", reinitialize, 1.0),
        ("--router-std", router_std, None),
    ):
        if not 0 <= value <= (math.inf if limit is None else limit) or math.isinf(value):  # nan is neither
            raise UserError(f"{name} {value:g}: give {'a part, from 0 to 1' if limit else '0 or more'}")
    from moe_train.checkpoint.weights import Entry, write_entries

    kinds = ["weights", *(_optimizer_kinds(source, dense) if keep_optimizer else ())]
    make = _Maker(source, config, router_std, noise, reinitialize, seed)
    shapes = config.parameter_shapes()
    entries = [
        Entry(f"{kind}.{name}", shape, make.dtype(kind, name)) for kind in kinds for name, shape in shapes.items()
    ]
    tensors = ((f"{kind}.{name}", make(kind, name, shape)) for kind in kinds for name, shape in shapes.items())
    origin = {
        "dense": str(dense),
        "experts": experts,
        "top_k": top_k,
        "noise": noise,
        "reinitialize": reinitialize,
        "seed": seed,
    }
    kept = {key: source.state[key] for key in KEPT_STATE if key in source.state} if keep_optimizer else {}
    try:
        write_entries(out, config, entries, tensors, source.tokenizer, {**kept, "upcycled": origin})
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise UserError(f"--experts {experts}: the copies of one MLP are more than there is memory for") from None
    _report(source.config, config, str(out), noise or reinitialize, keep_optimizer)
    return 0


def mixture_config(dense: ModelConfig, source: str, experts: int, top_k: int, router: dict[str, Any]) -> ModelConfig:
    """The config of the mixture; raises UserError, one line, where there is none."""
    from pydantic import ValidationError

    if dense.mlp.kind != "dense":
        raise UserError(
            f"{source}: mlp.kind is {dense.mlp.kind}: its MLPs are experts already; upcycling starts from a dense model"
        )
    if not 1 <= top_k < experts:
        raise UserError(
            f"--experts {experts} --top-k {top_k}: give more experts than a token uses, and 1 or more of these"
        )
    mlp = MixtureOfMLPConfig(
        ffn_hidden_size=dense.mlp.ffn_hidden_size,
        num_experts=experts,
        top_k=top_k,
        activation=dense.mlp.activation,
        bias=False,
    )
    values = dense.model_dump() | {"mlp": mlp.model_dump() | {"router": router or None}}
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, ModelConfig, Document(values, {(): Mark("--router", 0)}))) from None
    if not config.router_of("mlp").renormalize:
        raise UserError(
            "renormalize: false: gates that do not add up to 1 make the copies compute something else; give"
            " --router renormalize=true"
        )
    return config


def read_router_keys(texts: list[str]) -> dict[str, Any]:
    """``["normalize_logits=true"]`` -> ``{"normalize_logits": True}``, values as in a run file."""
    keys = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--router {text}: write KEY=VALUE, such as normalize_logits=true")
        keys[key] = parse_yaml(value, f"--router {text}", lines=False).data
    return keys


class _Maker:
    """Makes the parameters of the mixture, one at a time, out of those of the dense model."""

    def __init__(self, source, config: ModelConfig, router_std: float, noise: float, reinitialize: float, seed: int):
        self._source, self._config, self._router_std = source, config, router_std
        self._noise, self._reinitialize, self._seed = noise, reinitialize, seed

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """Moments and main parameters are fp32; a router has the precision of the norm before it."""
        import torch

        if kind != "weights":
            return torch.float32
        return self._source.dtype(
            name.replace("mlp.router.weight", "mlp_norm.weight").replace("mlp.router.bias", "mlp_norm.weight")
        )

    def __call__(self, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        is_weight = kind in ("weights", "main")
        if ".mlp.router." in name:
            drawn = is_weight and name.endswith(".weight")
            return self._draw(name, shape, self._router_std) if drawn else torch.zeros(shape)
        dense = self._read(kind, name)
        if ".mlp." not in name:
            return dense
        copies = dense.reshape(1, *shape[1:]).expand(shape)
        if not (self._noise or self._reinitialize):
            return copies
        copies = copies.float().clone()
        std = float(dense.float().std()) if is_weight else 0.0
        for expert, copy in enumerate(copies):
            if self._noise:
                copy += self._draw(f"{name}/noise/{expert}", shape[1:], self._noise * std)
            if self._reinitialize:
                self._redraw(copy, name, expert, std)
        return copies

    def _redraw(self, expert: torch.Tensor, name: str, number: int, std: float) -> None:
        """Draw some hidden channels of one expert anew: the same for its gate, up and down projections, of which they
        are rows, rows and columns."""
        import torch

        hidden = self._config.mlp.ffn_hidden_size
        layer = name.rpartition(".mlp.")[0]
        order = torch.randperm(hidden, generator=self._generator(f"{layer}/channels/{number}"))
        channels = order[: round(self._reinitialize * hidden)]
        drawn = self._draw(f"{name}/drawn/{number}", tuple(expert.shape), std)
        if name.endswith("down.weight"):
            expert[:, channels] = drawn[:, channels]
        else:
            rows = torch.cat([channels, channels + hidden])
            expert[rows] = drawn[rows]

    def _read(self, kind: str, name: str) -> torch.Tensor:
        if kind == "weights" and "main" not in getattr(self._source, "optimizer_kinds", ()):
            return self._source.read(name)
        return self._source.read_kind("main" if kind == "weights" else kind, name)  # the exact one, where there are two

    def _draw(self, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
        import torch

        return torch.empty(shape).normal_(0.0, std, generator=self._generator(name)) if std else torch.zeros(shape)

    def _generator(self, name: str) -> torch.Generator:
        import torch
        import xxhash

        return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{self._seed}/{name}".encode()) % 2**63)


def _open(path: str | Path) -> WeightsReader | HuggingFaceModel:
    """The dense model, whichever format it is in, every file of it checked."""
    path = Path(path)
    if (path / "config.json").is_file():
        from moe_train.convert.huggingface import HuggingFaceModel

        return HuggingFaceModel(path)
    from moe_train.checkpoint.manifest import check_files, read_manifest
    from moe_train.checkpoint.weights import WeightsReader

    reader = WeightsReader(path)
    if damage := check_files(reader.path, read_manifest(reader.path)):
        raise DamagedError(f"{reader.path}: {damage}")
    return reader


def _optimizer_kinds(source: WeightsReader | HuggingFaceModel, dense: str | Path) -> list[str]:
    kinds = getattr(source, "optimizer_kinds", [])
    if "exp_avg" not in kinds:
        raise UserError(f"{dense} holds weights alone: there is no optimizer state to keep; leave --keep-optimizer out")
    return kinds


def _report(dense: ModelConfig, config: ModelConfig, out: str, changed: float, resumable: bool) -> None:
    mlp = config.mlp
    print(
        f"{out}: {config.num_parameters():,} parameters, {config.num_active_parameters():,} active, from"
        f" {dense.num_parameters():,}: {mlp.num_experts} experts a layer, top-{mlp.top_k}"
    )
    print(
        "the copies were changed: it does not compute what the dense model did"
        if changed
        else "it computes what the dense model did"
    )
    start = f"--resume {out}" if resumable else f"checkpoint.initialize_from: {out}"
    print(f"start from it with {start}; whether that is better than from scratch: moe-train plan upcycle")

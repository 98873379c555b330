"""A checkpoint on a layout, ready to compute: what scoring and generating share.

The starting process checks everything that needs no ranks (:func:`plan`), starts them
(:func:`start_ranks`), and each of them builds its part of the model (:func:`open_session`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.checkpoint.folder import read_run_state, resolve_checkpoint
from moe_train.checkpoint.manifest import check_files, read_manifest
from moe_train.errors import DamagedError, warn
from moe_train.inference.config import InferenceConfig
from moe_train.model.config import ModelConfig
from parallel.layout import smallest_world
from parallel.spawn import SpawnResult, rank_environment, run_rank, run_ranks, spawn_ranks

if TYPE_CHECKING:
    import torch

    from moe_train.model.attention_core import LayerCache
    from moe_train.model.transformer import Transformer
    from parallel.topology import Topology


@dataclass(frozen=True)
class Plan:
    """What is to be loaded, and how."""

    checkpoint: Path
    model: ModelConfig
    config: InferenceConfig
    precision: str
    world_size: int

    def payload(self) -> dict[str, Any]:
        """What :func:`open_session` takes, as JSON carries it."""
        return {
            "checkpoint": str(self.checkpoint),
            "model": self.model.model_dump(mode="json"),
            "config": self.config.model_dump(mode="json"),
            "precision": self.precision,
            "world_size": self.world_size,
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Plan:
        return cls(
            checkpoint=Path(payload["checkpoint"]),
            model=ModelConfig.model_validate(payload["model"]),
            config=InferenceConfig.model_validate(payload["config"]),
            precision=payload["precision"],
            world_size=payload["world_size"],
        )


def plan(checkpoint: str | Path, nproc: int | None, overrides: Iterable[str]) -> Plan:
    """Find the checkpoint and check that the layout fits it.

    Its files are looked at, not read: `moe-train checkpoint verify` does that.

    Args:
        checkpoint: an ``iter_*`` folder, a run's folder (its latest checkpoint), or what ``convert`` wrote.
        nproc: ranks; None: those of the launcher (torchrun, srun), else the fewest that the layout takes.

    Raises:
        an error with ``exit_code`` 2 or 4, one line.
    """
    config = InferenceConfig.from_overrides(overrides)
    path = resolve_checkpoint(checkpoint, warn)
    if damage := check_files(path, read_manifest(path), hashes=False):
        raise DamagedError(f"{path}: {damage}")
    state = read_run_state(path)
    model = ModelConfig.model_validate(state["model"])
    launched = rank_environment()
    world_size = launched.world_size if launched else nproc or smallest_world(config.parallel)
    config.layout(model, world_size)
    precision = config.training.precision or {"fp32": "fp32"}.get(state["precision"], "bf16")
    return Plan(path, model, config, precision, world_size)


def start_ranks(planned: Plan, target: str, arguments: dict[str, Any]) -> int:
    """Call ``target(plan payload, **arguments)`` on every rank; errors are printed. Returns the exit status.

    Under torchrun or srun this process is one of the ranks.
    """
    ranks = rank_environment()
    call = {"planned": planned.payload(), **arguments}
    if ranks is not None:
        ranks.export()
        return run_rank(target, call)
    return run_ranks(planned.world_size, target, call)


def call_ranks(planned: Plan, target: str, arguments: dict[str, Any]) -> SpawnResult:
    """The same for programs: ranks are always started, and nothing is printed of how they ended."""
    return spawn_ranks(planned.world_size, target, {"planned": planned.payload(), **arguments})


class Session:
    """This rank's part of a loaded model.

    Attributes:
        config: of the model.
        plan: what was asked for.
        topology: this rank's place.
    """

    def __init__(self, planned: Plan, model: Transformer, topology: Topology):
        self.plan, self.config, self.topology = planned, planned.model, topology
        self._model = model.eval()

    def new_caches(self) -> list[LayerCache]:
        """An empty cache for each layer of this rank."""
        from moe_train.model.attention_core import LayerCache

        return [LayerCache() for _ in self._model.layers]

    def forward(
        self,
        ids_bs: torch.Tensor,
        labels_bs: torch.Tensor | None = None,
        caches: list[LayerCache] | None = None,
        first_position: int = 0,
    ) -> torch.Tensor | None:
        """Run the model over ``ids_bs`` ``[B, S]``, which is the same on all ranks of one data rank.

        With labels, the negative log-likelihood of each, ``[B, S]``; without, the logits after the last
        position, ``[B, V]``. Both in fp32 and on the ranks of the last stage only; None elsewhere. With
        experts spread over data ranks all of them must call it together, with any shape each.
        """
        import torch

        from parallel.pipeline import through_stages

        def stage(received: torch.Tensor | None) -> torch.Tensor:
            self._model.set_input_tensor(received)
            output = self._model(ids_bs, labels_bs, caches, first_position, last_only=True)
            return output[1] if isinstance(output, tuple) else output

        tensor_ranks = self.topology.layout.tensor
        handed_on = (-(-ids_bs.shape[1] // tensor_ranks), len(ids_bs), self.config.hidden_size)
        with torch.no_grad():
            result = through_stages(stage, self.topology, handed_on, self._model.options.dtype)
        return result[:, -1] if result is not None and labels_bs is None else result


@contextmanager
def open_session(planned: dict[str, Any]) -> Iterator[Session]:
    """On a rank: start the engine, build this rank's part of the model and load it; stop at the end."""
    from parallel import engine  # the first import of megatron-core: it takes seconds

    what = Plan.from_payload(planned)
    topology = engine.start(what.config.layout(what.model, what.world_size), seed=0)
    try:
        yield load_session(what, topology)
    finally:
        engine.stop()


def load_session(planned: Plan, topology: Topology) -> Session:
    """Build and load on ranks whose engine runs already."""
    from moe_train.checkpoint.load import load_checkpoint
    from moe_train.model.build import DTYPES, build_model
    from moe_train.model.options import ModelOptions

    options = ModelOptions(
        dtype=DTYPES[planned.precision],
        sharded_attention=planned.config.parallel.attention_experts == "sharded",
        initialize=False,
    )
    chunks = build_model(planned.model, topology, options)
    load_checkpoint(planned.checkpoint, chunks, None, topology)
    return Session(planned, chunks[0], topology)

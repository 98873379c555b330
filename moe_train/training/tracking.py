"""Weights & Biases and TensorBoard, as `logging` in the run file asks. Only rank 0 makes trackers.

Figures have the names of metrics.jsonl there, in slash groups here (`train/loss`, `router/z_loss`, `optimizer/lr`,
`throughput/mfu`), over steps and over tokens. Tracking is an onlooker: but for a user's mistake, an error of it is
told and ends the tracker, never the run.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from moe_train.errors import UserError
from moe_train.training.config import LoggingConfig, WandbConfig
from moe_train.training.run_folder import write_atomically

IDENTITY = "trackers.json"
GROUPS = {
    "loss": "train",
    "load_balancing_loss": "router",
    "z_loss": "router",
    "depth": "router",
    "grad_norm": "optimizer",
    "lr": "optimizer",
    "tokens_per_second": "throughput",
    "step_seconds": "throughput",
    "tflops_per_gpu": "throughput",
    "mfu": "throughput",
}
"""Where a figure of metrics.jsonl stands in the trackers; `train/` if it is not here and has no group of its own."""


class Tracker(Protocol):
    """One place that figures are sent to."""

    def log(self, step: int, tokens: int, figures: Mapping[str, float]) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def close(self, code: int) -> None: ...


class Trackers:
    """All trackers of a run, as one.

    Args:
        logging: the section `logging` of the run file.
        folder: the run's folder; trackers write below it, and keep their run's identity in its `trackers.json`.
        config: the resolved config, to be shown beside the figures.
        step, tokens: where the run goes on from; a part of it that is computed again replaces what was shown of it.
        state: what `state()` gave at the checkpoint that the run resumes from; used where the folder knows nothing.
        warn: gets one line when a tracker gives up.

    Raises:
        UserError: a package is missing, `wandb.mode: online` has no key, or wandb does not take a name.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        folder: Path | str,
        config: Mapping[str, Any],
        step: int = 0,
        tokens: int = 0,
        state: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] | None = None,
    ):
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        self._trackers: dict[str, Tracker] = {}
        self._state = dict(state or {})
        if logging.wandb is not None and logging.wandb.mode != "disabled":
            known = self._state.get("wandb")
            self._start("wandb", WandbTracker, logging.wandb, Path(folder), config, known, self._warn)
        if logging.tensorboard:
            self._start("tensorboard", TensorBoardTracker, Path(folder) / "tensorboard", step, tokens)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl."""
        figures = dict(grouped(line))
        for name in list(self._trackers):
            self._guard(name, lambda tracker: tracker.log(line["step"], line["tokens"], figures))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run goes on in the same place, also from another folder or
        machine."""
        return {**self._state, **{name: tracker.state() for name, tracker in self._trackers.items()}}

    def close(self, code: int = 0) -> None:
        """Flush and end, with the exit status of the run."""
        for name in list(self._trackers):
            self._guard(name, lambda tracker: tracker.close(code))
        self._trackers.clear()

    def _start(self, name: str, kind: Callable[..., Tracker], *arguments: Any) -> None:
        try:
            self._trackers[name] = kind(*arguments)
        except UserError:
            raise
        except Exception as error:
            self._warn(f"{name} cannot start ({type(error).__name__}: {error}); metrics.jsonl has everything")

    def _guard(self, name: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._trackers[name])
        except Exception as error:
            del self._trackers[name]
            self._warn(f"{name} stopped tracking ({type(error).__name__}: {error}); metrics.jsonl has everything")


class WandbTracker:
    """One Weights & Biases run over all starts of ours. Works without network and account (offline)."""

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        run_config: Mapping[str, Any],
        state: Mapping[str, Any] | None,
        warn: Callable[[str], None],
    ):
        mode = config.mode or ("online" if has_wandb_key() else "offline")
        if mode == "online" and not has_wandb_key():
            raise UserError(
                "logging.wandb.mode is online, but there is no key: set WANDB_API_KEY, run `wandb login`, or use mode: "
                "offline"
            )
        # Before the import: its own console lines and its prompt are of no use in a job.
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logging.wandb needs the package wandb ({error}): pip install wandb, or set logging.wandb to null"
            ) from error
        self.run_id = _run_id(folder, state)
        arguments: dict[str, Any] = {
            "id": self.run_id,
            "project": config.project,
            "entity": config.entity,
            "name": config.name or folder.resolve().name,
            "dir": str(folder),
            "config": dict(run_config),
        }
        settings = wandb.Settings(silent=True, console="off")
        if mode == "online":
            try:
                self._run = wandb.init(mode="online", resume="allow", settings=settings, **arguments)
            except Exception as error:
                warn(
                    f"wandb cannot be reached ({error}); it is kept offline, `wandb sync {folder}/wandb/offline-*` "
                    "sends it"
                )
                mode = "offline"
        if mode == "offline":
            try:
                self._run = wandb.init(mode="offline", settings=settings, **arguments)
            except wandb.UsageError as error:
                raise UserError(f"logging.wandb: {error}; correct it, or set logging.wandb to null") from None
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def log(self, step: int, tokens: int, figures: Mapping[str, float]) -> None:
        self._run.log({"tokens": tokens, **figures}, step=step)

    def state(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def close(self, code: int) -> None:
        self._run.finish(exit_code=code)


class TensorBoardTracker:
    """Two runs in one folder: `by_step` and `by_tokens`, the same figures over either axis."""

    def __init__(self, folder: Path, step: int, tokens: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"logging.tensorboard needs the package tensorboard ({error}): pip install tensorboard, or set it to "
                "false"
            ) from error
        # Points of a part that is computed again disappear from the view.
        self._by_step = SummaryWriter(str(folder / "by_step"), purge_step=step + 1)
        self._by_tokens = SummaryWriter(str(folder / "by_tokens"), purge_step=tokens + 1)

    def log(self, step: int, tokens: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._by_step.add_scalar(name, value, step)
            self._by_tokens.add_scalar(name, value, tokens)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self, code: int) -> None:
        self._by_step.close()
        self._by_tokens.close()


def grouped(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a metrics line with their names in groups; nested mappings become paths.

    Step and tokens are the axes and are left out.
    """
    for key, value in line.items():
        if not prefix and key in ("step", "tokens"):
            continue
        if isinstance(value, Mapping):
            yield from grouped(value, f"{prefix}{key}/")
            continue
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        name = prefix + key
        yield (name if "/" in name else f"{GROUPS.get(key, 'train')}/{name}"), value


def has_wandb_key() -> bool:
    """Whether wandb could log in without asking: a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: Path, state: Mapping[str, Any] | None) -> str:
    """The id of this run: the folder's own, else the checkpoint's, else the job's (WANDB_RUN_ID), else a new one."""
    try:
        return json.loads((folder / IDENTITY).read_text(encoding="utf-8"))["wandb"]["run_id"]
    except (FileNotFoundError, ValueError, KeyError):
        return new_run_id(folder, (state or {}).get("run_id"))


def new_run_id(folder: Path, run_id: str | None = None) -> str:
    """Give the run in ``folder`` the id ``run_id``, else the job's, else one of its own, whatever a checkpoint in it
    says."""
    run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / IDENTITY, json.dumps({"wandb": {"run_id": run_id}}) + "\n")
    return run_id

"""What can be said about a run before a rank is started: without torch, in well under a second."""

from __future__ import annotations

import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_pipeline.errors import DamagedDataError, MissingDataError
from data_pipeline.heldout import open_heldout
from data_pipeline.ledger import Ledger
from data_pipeline.sources import Source, open_sources
from moe_train.checkpoint.folder import read_run_state, resolve_checkpoint
from moe_train.config import DataConfig, RunConfig, load_resolved
from moe_train.errors import DamagedError, HardwareError, UserError
from moe_train.resume_rules import Change, check_resume
from moe_train.training.run_folder import RunFolder


def check_run(config: RunConfig, world_size: int, resume: str) -> list[Change]:
    """Check layout, mixture and the run's folder; return what changed since the last start and is to be recorded.

    Raises:
        an error with ``exit_code`` 2, one line, for whatever would stop the run later; with 5 for a corpus of the run
        that is gone.
    """
    config.layout(world_size)
    if not config.data.mixture:
        raise UserError("data.mixture is not set")
    check_mixture(config, resume)
    folder = RunFolder(config.output_dir)
    if resume == "never" and folder.holds_run:
        raise UserError(
            f"{folder.path} holds a run and --resume never was given: choose another output_dir, or --resume auto"
        )
    if resume not in ("auto", "never"):
        _check_checkpoint("--resume", resume)
    if last_checkpoint_state(folder) is None:
        if config.checkpoint.initialize_from is not None and resume in ("auto", "never"):
            _check_checkpoint("checkpoint.initialize_from:", config.checkpoint.initialize_from)
        return []
    if folder.config_path.exists() and (resume == "auto" or _is_of(folder, resolve_checkpoint(resume))):
        return check_resume(load_resolved(folder.config_path), config)
    return []


def _check_checkpoint(key: str, path: str) -> None:
    """Whether ``path``, which ``key`` gives, means a checkpoint; what is in it is for the ranks to judge."""
    try:
        resolve_checkpoint(path)
    except UserError as error:
        raise UserError(f"{key} {path}: {'no such checkpoint' if not Path(path).exists() else error}") from None


def check_mixture(config: RunConfig, resume: str) -> Ledger | None:
    """Check that the corpora are there and last as long as the mixture asks for, and that no edit of it is one of what
    was fed already.

    Args:
        resume: ``auto``, ``never`` or the path of a checkpoint.

    Returns:
        the ledger that the run will go by; None where that is for the ranks to find out.

    Raises:
        an error with ``exit_code`` 2, one line; HardwareError as `open_corpora`.
    """
    folder = RunFolder(config.output_dir)
    state = None if resume == "never" else _run_state(folder.path if resume == "auto" else resume)
    try:
        before = None if state is None else Ledger.from_json(state["ledger"])
    except (KeyError, DamagedDataError):
        before = None
    sources = open_corpora(config, before)
    if before is not None:
        return before.resume(config.mixture, sources, state["samples"])
    # The ranks judge what cannot be read, and may take an older one; a copy of a lost folder may hold another past.
    if state is not None or folder.holds_run or config.checkpoint.copy_to is not None:
        return None
    return Ledger.start(config.mixture, sources)


def open_corpora(config: RunConfig, before: Ledger | None) -> dict[str, Source]:
    """The sources of the run's mixture, opened and checked.

    Args:
        before: what the run has fed so far, if it has.

    Raises:
        DataError: a mistake in the mixture or its files.
        HardwareError: a file is gone under the same path where the run has read it before. That is no mistake in the
            mixture, and another node, or a later start, may see it.
    """
    mixture = config.mixture
    try:
        return open_sources(mixture, config.model.vocab_size)
    except (MissingDataError, OSError):
        if before is None:
            raise
        known = {name: each.paths for name, each in before.mixture.sources.items()}
        same = {name: each for name, each in mixture.sources.items() if known.get(name) == each.paths}
        tokenizer = mixture.tokenizer if mixture.tokenizer == before.mixture.tokenizer else None
        try:
            open_sources(mixture.model_copy(update={"sources": same, "tokenizer": tokenizer}), config.model.vocab_size)
        except (MissingDataError, OSError) as error:
            raise HardwareError(
                f"{str(error).partition(';')[0]} on {socket.gethostname()}, but the run has read it before: mend the "
                "mount or the disk, or leave the node out, and start again; if it was moved or removed for good, edit "
                f"{config.data.mixture}"
            ) from None
        raise


def without_heldout(config: RunConfig, scored: Collection[str] | None = None) -> str | None:
    """One line on the sources that validation, where it is asked for, will have no figures of; None where there are
    none. As it is by default, it is not asked for: it takes what held-out text there is.

    Args:
        scored: the sources that have a held-out window; found out where it is not given.
    """
    mixture = config.mixture
    if config.data.validation in (None, DataConfig.model_fields["validation"].default):
        return None
    if scored is None:
        heldout = open_heldout(mixture, config.model.vocab_size)
        scored = [name for name, source in heldout.items() if source.num_windows]
    fed = {name for phase in mixture.phases for name, weight in phase.weights.items() if weight}
    missing = ", ".join(name for name in mixture.sources if name in fed and name not in scored)
    if not missing:
        return None
    return (
        f"data.validation measures {'not all' if scored else 'nothing'}: no held-out window of "
        f"{mixture.sequence_length} tokens in {missing}; keep text back with `moe-train prepare --holdout`"
    )


def _run_state(path: str | Path) -> dict[str, Any] | None:
    """The run state of the checkpoint that ``path`` means, or None where there is none to read."""
    try:
        return read_run_state(resolve_checkpoint(path))
    except (UserError, DamagedError, ValueError):
        return None


def _is_of(folder: RunFolder, checkpoint: Path) -> bool:
    """Whether ``checkpoint`` is one of ``folder``'s own."""
    return checkpoint.resolve().parent == folder.checkpoints.resolve()


def last_checkpoint_state(folder: RunFolder) -> dict[str, Any] | None:
    """The run state of the newest checkpoint that the folder's pointer names, or None where there is none to read."""
    return _run_state(folder.path)


def completion(config: RunConfig) -> str | None:
    """How to go on with a run whose last checkpoint leaves nothing to do; None where there is something to do."""
    folder = RunFolder(config.output_dir)
    state = last_checkpoint_state(folder)
    if state is None or folder.read_outcome().get("code") != 0:
        return None
    limit = config.training.max_steps
    if limit is not None and state["step"] >= limit:
        return (
            f"{folder.path} is complete: step {state['step']} of training.max_steps {limit}. "
            f"To go on: raise training.max_steps, or set it to null for the whole mixture"
        )
    batch = config.training.batch_size(state["tokens"])
    if state["samples"] + batch <= config.mixture.num_samples:
        return None
    return (
        f"{folder.path} is complete: step {state['step']}, {state['tokens']:,} tokens, the whole mixture. To go on: "
        f"give the last phase of {config.data.mixture} more tokens, or add a phase, and start it again"
    )

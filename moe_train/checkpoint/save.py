"""Saving: every rank writes what it owns, and nothing is a checkpoint until all of it is on disk.

A checkpoint is written to ``iter_0000100.writing.TOKEN``. Each rank leaves a receipt with what it wrote; when
rank 0 has all receipts it writes the metadata, the run state and the manifest, renames the folder and only
then moves the pointer. Since receipts are files, nothing in the background waits in a collective, and a rank
that dies leaves no receipt and so no checkpoint.

By default (``checkpoint.async``) a thread does that from a copy in host memory, while training goes on.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.planner import SavePlan

from moe_train.checkpoint.config import CheckpointConfig
from moe_train.checkpoint.coverage import what_is_not_covered
from moe_train.checkpoint.folder import FORMAT_VERSION, RUN_STATE, WRITING, checkpoint_name, clean, commit
from moe_train.checkpoint.manifest import check_files, describe, write_manifest
from moe_train.checkpoint.mirror import Mirror, Mirroring
from moe_train.checkpoint.pieces import HostCopies, Piece, pieces_of_scales, pieces_to_save
from moe_train.checkpoint.random_state import random_state
from moe_train.checkpoint.retention import remove_superseded
from moe_train.checkpoint.writer import Written, merge_plans, plan, write_metadata, write_pieces
from moe_train.errors import PolicyStop
from moe_train.model.transformer import Transformer
from moe_train.training.optimizer import Optimizer
from parallel.topology import Topology

RECEIPT_SECONDS = 1800.0
"""How long rank 0 waits for the receipts of the others."""
COPY_SECONDS = 3600.0
"""How long a run that has ended waits for its last copy."""
COPY_POLL_SECONDS = 2.0
"""How often the ranks ask rank 0 meanwhile."""


class Checkpointer:
    """Saves the checkpoints of a run.

    Args:
        folder: ``checkpoints/`` of the run, on a file system that all ranks share.
        warn: gets one line when a checkpoint could not be written (training goes on and the ones before
            stay), and when training had to wait for one.
        saved: called on rank 0 with the path of each committed checkpoint, from the thread that wrote it.
        may_commit: called on rank 0 before a checkpoint is committed; an error that it raises prevents that,
            and ends the run if it has an ``exit_code``.
        tokenizer: goes into each checkpoint as it is now, whatever becomes of the file during the run.
        mirror: on rank 0, where committed checkpoints are copied.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        chunks: list[Transformer],
        optimizer: Optimizer,
        topology: Topology,
        tokenizer: Path | None = None,
        warn: Callable[[str], None] = print,
        saved: Callable[[Path], None] = lambda path: None,
        may_commit: Callable[[], None] = lambda: None,
        mirror: Mirror | None = None,
    ):
        self.folder, self.config, self.topology = folder, config, topology
        self.warn, self.saved, self.may_commit = warn, saved, may_commit
        self.tokenizer = (tokenizer.name, tokenizer.read_bytes()) if tokenizer and topology.rank == 0 else None
        self._model_config, self._chunks, self._optimizer = chunks[0].model_config, chunks, optimizer
        self._copies = HostCopies()
        self._save: _Save | None = None
        self._last_failure: str | None = None
        self._mirroring = Mirroring(mirror, self._copied) if mirror else None
        if topology.rank == 0:
            for path in clean(folder):
                warn(f"{path} is left from an earlier start and cannot be removed")
        # A rank of an earlier start that still writes must not write into a folder of this one. Until rank 0
        # has cleaned up, no rank knows the token, and so none writes.
        self._token = topology.from_rank_zero(secrets.token_hex(4))

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        """Save ``step``; waits first for a save that is still being written. Every rank calls it."""
        began, before = time.perf_counter(), self._save
        self.wait()
        waited = time.perf_counter() - began
        if before is not None and waited > 1.0:
            self._warn(f"step {step}: waited {waited:.1f} s for {before.target.name}, which was still being written")
        pieces = pieces_to_save(self._optimizer) + pieces_of_scales(self._chunks, to_save=True)
        if self.config.async_save:
            pieces = self._copies.take(pieces)
        state = {
            "format_version": FORMAT_VERSION,
            **run_state,
            "optimizer_steps": self._optimizer.steps_taken,
            "model": self._model_config.model_dump(mode="json"),
            "layout": self.topology.layout.describe(),
            "random": random_state(),
        }
        self._save = _Save(self, self.folder / checkpoint_name(step), self._token, pieces, state)
        self._save.start()
        if not self.config.async_save:
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether this rank still writes in the background."""
        return self._save is not None and self._save.is_alive()

    def wait(self) -> None:
        """Until the save in flight, if any, is on disk on every rank and committed, or has failed on all.
        Every rank calls it.

        Raises:
            PolicyStop: ``may_commit`` forbade it for good, or it failed and ``on_failed_save`` is ``stop``.
        """
        if self._save is None:
            return
        save, self._save = self._save, None
        failures = self.topology.gather(save.wait_for_own_part())
        first = next((failure for failure in failures if failure), None)
        if self.topology.rank == 0:
            save.finish(first)
        else:
            save.join()  # it holds tensors: not to be freed by a thread while the interpreter ends
        failure, fatal = self.topology.from_rank_zero((save.failure, save.fatal) if self.topology.rank == 0 else None)
        self._last_failure = failure
        if failure is None:
            return
        if self.topology.rank == 0:
            shutil.rmtree(save.writing, ignore_errors=True)
        text = f"the checkpoint {save.target.name} was not written ({failure}); the ones before are untouched"
        if fatal or self.config.on_failed_save == "stop":
            raise PolicyStop(text)
        self._warn(text)

    def finish(self, waiting: Callable[[], None] = lambda: None) -> None:
        """:meth:`wait`, at the end of a run, and until the copies are made: what is not on disk now is lost.

        Every rank waits for the copies of rank 0, which would be cut where a launcher ends all ranks once one has
        ended: a moment at a time, as no collective may last for as long as a copy does.

        Args:
            waiting: called every few seconds until the copies are made.

        Raises:
            PolicyStop: the last checkpoint could not be written.
        """
        self.wait()
        since = time.monotonic()
        while self.config.copy_to is not None and self.topology.from_rank_zero(self._wait_for_copy(since)):
            waiting()
        if self._last_failure is not None:
            raise PolicyStop(
                f"the last checkpoint could not be written ({self._last_failure}):"
                f" the steps since the one before it are lost; see to {self.folder} and start the run again"
            )

    def close(self, seconds: float = 60.0) -> None:
        """Let a save in flight come to its end when the run ends by an error. Asks nothing of other ranks."""
        if self._save is not None:
            self._save.join(seconds)

    def committed(self, path: Path) -> None:
        """On rank 0, from the thread that wrote it: a checkpoint is there now."""
        self.saved(path)
        in_use: set[Path] = set()
        if self._mirroring is not None:
            self._mirroring.submit(path)
            in_use = self._mirroring.in_use
        try:
            remove_superseded(self.folder, self.config, in_use)
        except OSError as error:
            self.warn(f"an old checkpoint in {self.folder} could not be removed ({error})")

    def _wait_for_copy(self, since: float) -> bool:
        """On rank 0, for a moment: whether there is still something to wait for."""
        if self._mirroring is None or self._mirroring.wait(COPY_POLL_SECONDS):
            return False
        late = time.monotonic() - since > COPY_SECONDS
        if late:
            self._warn(f"the last copy to {self.config.copy_to} took more than {COPY_SECONDS:g} s and was given up")
        return not late

    def _copied(self, checkpoint: Path, error: str | None) -> None:
        if error is not None:
            self.warn(f"{checkpoint.name} was not copied to {self.config.copy_to} ({error})")

    def _warn(self, text: str) -> None:
        if self.topology.rank == 0:
            self.warn(text)


class _Save(threading.Thread):
    """One checkpoint on its way to the disk, on one rank."""

    def __init__(self, owner: Checkpointer, target: Path, token: str, pieces: list[Piece], state: dict[str, Any]):
        super().__init__(name=f"saving {target.name}", daemon=True)
        self.target, self.writing = target, target.with_name(f"{target.name}{WRITING}.{token}")
        self.failure: str | None = None
        self.fatal = False
        self._owner, self._pieces, self._state = owner, pieces, state
        self._rank, self._world_size = owner.topology.rank, owner.topology.layout.world_size
        self._own_part = threading.Event()
        self._abort: str | None = None

    def run(self) -> None:
        try:
            self.writing.mkdir(parents=True, exist_ok=True)
            written = write_pieces(self.writing, self._rank, self._pieces)
            self._leave_receipt(plan(self._pieces), written)
        except BaseException as error:  # whatever it is, training goes on and says so
            self._fail(error)
        finally:
            self._own_part.set()
        if self._rank == 0 and self.failure is None:
            try:
                self._commit()
            except BaseException as error:
                self._fail(error)

    def wait_for_own_part(self) -> str | None:
        """Until this rank's file is on disk; what went wrong with it."""
        self._own_part.wait()
        return None if self.failure is None else f"rank {self._rank}: {self.failure}"

    def finish(self, failure: str | None) -> None:
        """On rank 0, that every rank has come to the end of its part, or with what ``failure``: until
        committed, or not."""
        self._abort = failure
        self.join()
        self.failure = failure or self.failure

    def _commit(self) -> None:
        owner = self._owner
        plans, written = zip(*self._collect_receipts())
        metadata = merge_plans(list(plans))
        if fault := what_is_not_covered(metadata, owner._model_config):
            raise RuntimeError(f"the ranks' parts do not make a whole: {fault}")
        entries = write_metadata(self.writing, metadata, written)
        (self.writing / RUN_STATE).write_text(json.dumps(self._state, indent=1) + "\n", encoding="utf-8")
        others = [RUN_STATE]
        if owner.tokenizer is not None:
            name, content = owner.tokenizer
            (self.writing / name).write_bytes(content)
            others.append(name)
        entries |= describe(self.writing, others)
        for rank, each in enumerate(written):
            entries |= each.entries
            self._receipt(rank).unlink()
        if fault := check_files(self.writing, entries, hashes=False):
            raise RuntimeError(f"what was written is not there: {fault}")
        write_manifest(self.writing, entries)
        owner.may_commit()
        commit(self.target, self.writing)
        owner.committed(self.target)

    def _collect_receipts(self) -> list[tuple[SavePlan, Written]]:
        deadline = time.monotonic() + RECEIPT_SECONDS
        receipts = []
        for rank in range(self._world_size):
            path = self._receipt(rank)
            while not path.exists():
                if self._abort is not None:
                    raise RuntimeError(self._abort)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} did not write its part in {RECEIPT_SECONDS:g} s")
                time.sleep(0.01)
            receipts.append(pickle.loads(path.read_bytes()))
        return receipts

    def _leave_receipt(self, own_plan: SavePlan, written: Written) -> None:
        path = self._receipt(self._rank)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(pickle.dumps((own_plan, written)))
        os.replace(temporary, path)

    def _receipt(self, rank: int) -> Path:
        return self.writing / f"rank_{rank:05d}.receipt"

    def _fail(self, error: BaseException) -> None:
        text = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:  # without its number
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        self.failure = text
        self.fatal = getattr(error, "exit_code", None) is not None

"""Saving: every rank writes what it owns, and nothing is a checkpoint until all of it is on disk.

A checkpoint is written to ``iter_0000100.writing``. Each rank leaves a receipt with the sizes and hashes of its files; when rank 0
has all receipts it writes the metadata, the run state and the manifest, renames the folder and only then moves the
pointer. Since receipts are files, no rank waits in a collective, and a rank that dies leaves no receipt and so no checkpoint.

In the background (``checkpoint.async``) the same is done by a thread from a copy in host memory, while training goes on.
"""
from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan

from moe_train.checkpoint.config import CheckpointConfig
from moe_train.checkpoint.folder import FORMAT_VERSION, RUN_STATE, WRITING, clean, commit, remove_superseded
from moe_train.checkpoint.manifest import describe, write_manifest
from moe_train.checkpoint.pieces import Piece, pieces_to_save
from moe_train.checkpoint.storage import PieceSaver
from moe_train.model.jetmoe import JetMoE
from moe_train.training.optimizer import Optimizer
from parallel.topology import Topology

RECEIPT_SECONDS = 1800.0
"""How long rank 0 waits for the receipts of the others."""


class Checkpointer:
    """Saves the checkpoints of a run.

    Args:
        folder: ``checkpoints/`` of the run, on a file system that all ranks share.
        warn: gets one line when a checkpoint could not be written; training goes on and the ones before stay.
        saved: called on rank 0 with the path of each committed checkpoint, from the thread that wrote it.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        chunks: list[JetMoE],
        optimizer: Optimizer,
        topology: Topology,
        tokenizer: Path | None = None,
        warn: Callable[[str], None] = print,
        saved: Callable[[Path], None] = lambda path: None,
    ):
        self.folder, self.config, self.topology = folder, config, topology
        self.tokenizer, self.warn, self.saved = tokenizer, warn, saved
        self._model_config, self._optimizer = chunks[0].model_config, optimizer
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if topology.rank == 0:
            clean(folder)

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        """Save ``step``; waits first for a save that is still being written. Every rank calls it."""
        self.wait()
        target = self.folder / f"iter_{step:07d}"
        pieces = pieces_to_save(self._optimizer)
        if self.config.async_save:
            pieces = [piece.snapshot() for piece in pieces]
        saver = PieceSaver(pieces)
        plan, metadata = self._plan(saver)
        state = {
            "format_version": FORMAT_VERSION,
            **run_state,
            "optimizer_steps": self._optimizer.steps_taken,
            "model": self._model_config.model_dump(mode="json"),
            "layout": self.topology.layout.describe(),
        }
        self._thread = threading.Thread(
            target=self._write, args=(target, saver, plan, metadata, state), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.config.async_save:
            self.wait()

    def wait(self) -> None:
        """Until the save in flight, if any, is on disk on every rank and committed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failures = [failure for failure in self.topology.gather(self._failure) if failure]
        self._failure = None
        if failures and self.topology.rank == 0:
            self.warn(failures[0])

    def _plan(self, saver: PieceSaver) -> tuple[SavePlan, Any]:
        """Agree on who writes what; the metadata is known to rank 0 alone."""
        plans = self.topology.gather(saver.create_local_plan())
        plans, metadata = saver.create_global_plan(plans)
        plans = FileSystemWriter("unused").prepare_global_plan(plans)
        return plans[self.topology.rank], metadata if self.topology.rank == 0 else None

    def _write(self, target: Path, saver: PieceSaver, plan: SavePlan, metadata: Any, state: dict[str, Any]) -> None:
        writing = target.with_name(target.name + WRITING)
        try:
            writing.mkdir(parents=True, exist_ok=True)
            writer = FileSystemWriter(writing)
            results = writer.write_data(plan, saver).wait()
            files = sorted({result.storage_data.relative_path for result in results})
            self._leave_receipt(writing, {"results": results, "files": describe(writing, files)})
            if self.topology.rank == 0:
                receipts = self._collect_receipts(writing)
                writer.finish(metadata, [receipt["results"] for receipt in receipts])
                self._commit(target, writing, state, receipts)
        except Exception as error:  # whatever it is, training goes on and says so
            self._failure = f"the checkpoint {target.name} was not written ({type(error).__name__}: {error}); the ones before are untouched"
            self._leave_failure(writing)

    def _commit(self, target: Path, writing: Path, state: dict[str, Any], receipts: list[dict]) -> None:
        (writing / RUN_STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        ours = [RUN_STATE, ".metadata"]
        if self.tokenizer is not None:
            shutil.copyfile(self.tokenizer, writing / self.tokenizer.name)
            ours.append(self.tokenizer.name)
        entries = describe(writing, ours)
        for rank, receipt in enumerate(receipts):
            entries.update(receipt["files"])
            _receipt(writing, rank).unlink()
        write_manifest(writing, entries)
        commit(target, writing)
        remove_superseded(self.folder, self.config, keep=target)
        self.saved(target)

    def _leave_receipt(self, writing: Path, receipt: dict) -> None:
        path = _receipt(writing, self.topology.rank)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(pickle.dumps(receipt))
        os.replace(temporary, path)

    def _leave_failure(self, writing: Path) -> None:
        """Tell rank 0 not to wait for this rank."""
        try:
            _receipt(writing, self.topology.rank).with_suffix(".failed").touch()
        except OSError:
            pass  # the disk is full or gone: rank 0 finds out the same way

    def _collect_receipts(self, writing: Path) -> list[dict]:
        deadline = time.monotonic() + RECEIPT_SECONDS
        receipts = []
        for rank in range(self.topology.layout.world_size):
            path = _receipt(writing, rank)
            while not path.exists():
                if path.with_suffix(".failed").exists():
                    raise RuntimeError(f"rank {rank} could not write its part")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} did not write its part in {RECEIPT_SECONDS:g} s")
                time.sleep(0.01)
            receipts.append(pickle.loads(path.read_bytes()))
        return receipts


def _receipt(writing: Path, rank: int) -> Path:
    return writing / f"rank_{rank:05d}.receipt"

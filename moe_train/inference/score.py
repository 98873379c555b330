"""``moe-train score``: the negative log-likelihood of every token of given sequences, on any layout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.target import check_target
from moe_train.errors import UserError
from moe_train.inference.session import Session, open_session, plan, start_ranks

TOKENS_PER_FORWARD = 8192
"""Sequences are taken together up to about this many tokens."""

TARGET = "moe_train.inference.score:score_rank"


def score(
    checkpoint: str | Path,
    ids: str | Path,
    out: str | Path,
    nproc: int | None = None,
    overrides: Iterable[str] = (),
) -> int:
    """Score the rows of ``ids`` and write the array ``nll`` to ``out``.

    Args:
        checkpoint: an ``iter_*`` folder, a run's folder, or what ``convert`` wrote.
        ids: a ``.npy`` file of whole numbers ``[batch, sequence]``.
        out: the ``.npz`` file to write: ``nll`` ``[batch, sequence - 1]``, float32, nats; entry t is that
            of token t + 1.
        nproc: ranks to start (default: the fewest that the layout takes).
        overrides: keys of a run file's sections parallel and training, such as ``parallel.tensor=2``.

    Returns the exit status. Raises an error with ``exit_code`` for what is wrong before a rank is started.
    """
    planned = plan(checkpoint, nproc, overrides)
    read_ids(ids, planned.model.vocab_size)
    target = check_target(out, "--out")
    return start_ranks(planned, TARGET, {"ids": str(Path(ids).resolve()), "out": str(target.resolve())})


def score_rank(planned: dict[str, Any], ids: str, out: str) -> int:
    """One rank of :func:`score`."""
    with open_session(planned) as session:
        nll = score_ids(session, read_ids(ids, session.config.vocab_size), progress=session.topology.rank == 0)
        if session.topology.rank == 0:
            partial = f"{out}.partial"
            with open(partial, "wb") as file:  # a file, so that savez does not add .npz to the name
                np.savez(file, nll=nll)
            os.replace(partial, out)
            print(
                f"{out}: {nll.shape[0]} x {nll.shape[1]} tokens, {nll.mean(dtype=np.float64):.4f} nats each on average"
            )
    return 0


def read_ids(path: str | Path, vocab_size: int) -> np.ndarray:
    """Token ids ``[batch, sequence]`` from a ``.npy`` file. Raises UserError, one line, for anything else."""
    try:
        ids = np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"--ids {path}: there is no such file") from None
    except (ValueError, OSError, EOFError):
        raise UserError(f"--ids {path}: is not a .npy file of numbers; write one with numpy.save") from None
    if not isinstance(ids, np.ndarray):
        raise UserError(f"--ids {path}: is an archive; save one array with numpy.save")
    if ids.dtype.kind not in "iu":
        raise UserError(f"--ids {path}: holds {ids.dtype}, not whole numbers; save for example int32")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UserError(
            f"--ids {path}: has the shape {list(ids.shape)}; [batch, sequence] with 2 tokens a row or more is needed"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        row, column = (int(at[0]) for at in np.nonzero(ids == wrong))
        raise UserError(
            f"--ids {path}: id {wrong} at [{row}, {column}] is outside of the model's vocabulary"
            f" of {vocab_size} (0 to {vocab_size - 1})"
        )
    return ids


def score_ids(session: Session, ids: np.ndarray, progress: bool = False) -> np.ndarray:
    """``[batch, sequence]`` to ``[batch, sequence - 1]`` float32, on every rank; all call it alike.

    Rows are shared out over the data ranks. All of them take the same number of steps, because experts may
    be spread over them: a rank without rows left repeats one.
    """
    import torch

    topology = session.topology
    data, data_rank = topology.layout.data, topology.data_rank
    batch, length = ids.shape
    mine = range(data_rank * batch // data, (data_rank + 1) * batch // data)
    size = session.plan.config.training.micro_batch_size or max(1, TOKENS_PER_FORWARD // (length - 1))
    longest = -(-batch // data)
    steps = -(-longest // size)
    nll = torch.zeros(batch, length - 1, device=topology.device)
    for step in _track(range(steps), progress):
        rows = mine[step * size : (step + 1) * size]
        counted = rows or mine[-1:] or range(1)  # the last two are computed for company, and dropped
        part = torch.from_numpy(ids[counted.start : counted.stop].astype(np.int64)).to(topology.device)
        result = session.forward(part[:, :-1], part[:, 1:])
        if result is not None and rows and topology.tensor_rank == 0:
            nll[rows.start : rows.stop] = result
    topology.sum_over_world(nll)  # each row comes from one rank: adding zeros changes nothing
    return nll.cpu().numpy()


def _track(steps: range, progress: bool):
    """``steps`` with a progress bar on a terminal."""
    if not progress or not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, "scoring", console=Console(stderr=True), transient=True)

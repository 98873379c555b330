"""How whole runs end and go another way: going back to a checkpoint that was kept, and who ends last."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from moe_train.checkpoint.folder import checkpoint_name, checkpoints
from moe_train.checkpoint.load import find_checkpoint
from moe_train.checkpoint.manifest import is_complete
from moe_train.config import load_run
from moe_train.training.fence import owner_of
from moe_train.training.run import rank_target
from moe_train.training.run_folder import RunFolder, read_metrics
from parallel.spawn import spawn_ranks
from tests.integration.runs import outcome, run, write_corpora

QUICK = ("data.validation=null", "parallel.expert=1")


def test_a_run_goes_back_to_a_checkpoint_that_was_kept_elsewhere(tmp_path):
    """And keeps what it trains from there on, though what it gives up is of later steps; nor is that lost."""
    write_corpora(tmp_path)
    folder = RunFolder(tmp_path / "run")

    def train(*arguments: str) -> tuple[int, str]:
        return run(tmp_path, *QUICK, "checkpoint.keep_last=3", *arguments, nproc=1)

    def names() -> list[str]:
        return sorted(path.name for path in folder.checkpoints.glob("iter_*"))

    status, said = train("training.max_steps=16", "checkpoint.interval=4 steps")
    assert status == 0, said
    kept = shutil.copytree(folder.checkpoints / "iter_0000008", tmp_path / "kept" / "iter_0000008")
    before = names()

    status, said = train("--resume", str(kept), "model.mlp.ffn_hidden_size=16")
    assert status == 2 and "a checkpoint of another model" in said, said
    assert names() == before == [f"iter_{step:07d}" for step in (8, 12, 16)]

    status, said = train("--resume", str(kept), "training.max_steps=11", "checkpoint.interval=1 steps")
    assert status == 0 and "given up" in said, said
    own = [f"iter_{step:07d}" for step in (9, 10, 11)]
    assert names() == [*own, "iter_0000012.superseded", "iter_0000016.superseded"]
    assert find_checkpoint(folder.checkpoints).name == own[-1]
    assert [line["step"] for line in read_metrics(folder.path)] == list(range(1, 12))

    given_up = folder.checkpoints / "iter_0000016.superseded"
    status, said = train("--resume", str(given_up), "training.max_steps=17", "checkpoint.interval=1 steps")
    assert status == 0 and "at step 16" in said, said
    assert checkpoints(folder.checkpoints)[-1].name == "iter_0000017" and given_up.exists()


def train_slowly(config: dict[str, Any], resume: str) -> int:
    """A rank of a run whose last copy and outcome take rank 0 a while; rank 1 notes what is there when it may end."""
    from moe_train.checkpoint.mirror import Mirror
    from moe_train.training.fence import Fence
    from moe_train.training.run import train_rank

    for owner, name in ((Mirror, "push"), (RunFolder, "finish"), (Fence, "release")):
        setattr(owner, name, _slowed(getattr(owner, name)))
    status, folder = train_rank(config, resume), RunFolder(config["output_dir"])
    if os.environ["RANK"] == "1":
        outcome, copies = folder.read_outcome(), folder.path.parent / "copies" / "run"
        copied = is_complete(copies / checkpoint_name(outcome["step"] or 0))
        seen = [outcome["code"], owner_of(folder.path).ended is not None, copied]
        (folder.path / "seen.json").write_text(json.dumps(seen))
    return status


def _slowed(method):
    def slow(*arguments: Any):
        time.sleep(1)
        return method(*arguments)

    return slow


def test_no_rank_ends_before_the_last_copy_and_the_outcome(tmp_path):
    """srun ends rank 0 at once when another rank has ended with 3, and after a minute when with 0."""
    write_corpora(tmp_path)
    overrides = (f"checkpoint.copy_to={tmp_path}/copies", "training.max_wall_time=1s")
    config = load_run(tmp_path / "run.yaml", [*QUICK, *overrides])
    _, arguments, logs = rank_target(config, "auto")
    result = spawn_ranks(2, "tests.integration.test_ends:train_slowly", arguments, logs)
    assert (result.code, outcome(Path(config.output_dir))["code"]) == (3, 3), result
    assert json.loads((tmp_path / "run" / "seen.json").read_text()) == [3, True, True]

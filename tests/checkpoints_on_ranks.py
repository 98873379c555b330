"""Saving and loading of a small model on any layout, as every rank of a test's pool does it."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch

from tests.steps_on_ranks import build, make_layout, run_steps, small_model


def _built(layout: dict, precision: str, seed: int = 5):
    return build(make_layout(int(os.environ["WORLD_SIZE"]), **layout), small_model(), precision, seed=seed)


def _checkpointer(built, folder: str, **config: Any):
    from moe_train.checkpoint.config import CheckpointConfig
    from moe_train.checkpoint.save import Checkpointer

    chunks, _, optimizer, _, topology = built
    said: list[str] = []
    options = {name: config.pop(name) for name in ("may_commit", "saved", "tokenizer", "mirror") if name in config}
    checkpointer = Checkpointer(
        Path(folder), CheckpointConfig(**config), chunks, optimizer, topology, warn=said.append, **options
    )
    return checkpointer, said


def _state(step: int) -> dict[str, int]:
    return {"step": step, "samples": 8 * step, "tokens": 120 * step}


def train_and_save(layout: dict, folder: str, precision: str, steps: int = 2) -> None:
    """Take steps, so that moments and weights are all different, and save."""
    built = _built(layout, precision)
    run_steps(built, range(steps), small_model().vocab_size)
    checkpointer, _ = _checkpointer(built, folder)
    checkpointer.save(steps, _state(steps))
    checkpointer.finish()


def save_each_step(layout: dict, folder: str, steps: int, tokenizer: str, lose: bool = False) -> None:
    """Take steps and save after each, with a tokenizer; ``lose``: whose file goes before the first."""
    built = _built(layout, "fp32")
    checkpointer, _ = _checkpointer(built, folder, tokenizer=Path(tokenizer))
    if lose and built[-1].rank == 0:
        Path(tokenizer).unlink()
    for step in range(1, steps + 1):
        run_steps(built, range(step - 1, step), small_model().vocab_size)
        checkpointer.save(step, _state(step))
    checkpointer.finish()


def load_and_save(layout: dict, source: str, folder: str, precision: str) -> int:
    """Load into a model that began otherwise, and save what is there then; the optimizer's count of steps."""
    from moe_train.checkpoint.load import load_checkpoint

    built = _built(layout, precision, seed=99)
    chunks, _, optimizer, _, topology = built
    state = load_checkpoint(Path(source), chunks, optimizer, topology)
    checkpointer, _ = _checkpointer(built, folder)
    checkpointer.save(state["step"], _state(state["step"]))
    checkpointer.finish()
    return optimizer.steps_taken


def load_each(layout: dict, sources: list[str], steps: int, more: int) -> tuple[list[str], list[dict]]:
    """Load each checkpoint into a model and an optimizer that hold nothing but NaN: a hash of what this rank
    holds then. And the figures of ``more`` steps of micro-batches of one sequence from the last."""
    import xxhash

    from moe_train.checkpoint.load import load_checkpoint

    built = _built(layout, "fp32", seed=99)
    chunks, stepper, optimizer, _, topology = built
    stepper.micro_batch_size = 1
    weights = [each.placement.valid(each.detach()) for chunk in chunks for each in chunk.parameters()]
    moments = [each for shard in optimizer.shards() for each in (shard.exp_avg, shard.exp_avg_sq)]
    hashes = []
    for source in sources:
        for tensor in (*weights, *moments):
            tensor.fill_(torch.nan)
        state = load_checkpoint(Path(source), chunks, optimizer, topology)
        assert state["step"] == steps == optimizer.steps_taken
        digest = xxhash.xxh3_128()
        for tensor in (*weights, *moments):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        hashes.append(digest.hexdigest())
    return hashes, run_steps(built, range(steps, steps + more), small_model().vocab_size, micro_batch=1)


def weights_after_loading(source: str, precision: str) -> dict[str, torch.Tensor]:
    """On one rank: parameters and, as ``main.NAME``, what the optimizer updates (all of it, as there is one
    rank)."""
    from moe_train.checkpoint.load import load_checkpoint

    chunks, _, optimizer, _, topology = _built({}, precision, seed=99)
    load_checkpoint(Path(source), chunks, optimizer, topology)
    found = {each.placement.name: each.placement.valid(each.detach()).clone() for each in chunks[0].parameters()}
    for shard in optimizer.shards():
        name = shard.parameter.placement.name
        found[f"main.{name}"] = shard.main.view(shard.parameter.placement.local_shape).clone()
    return found


def bytes_read(layout: dict, source: str, precision: str) -> int:
    """What this rank reads of a checkpoint's files to load all it needs."""
    from moe_train.checkpoint import reader
    from moe_train.checkpoint.load import load_checkpoint

    chunks, _, optimizer, _, topology = _built(layout, precision, seed=99)
    read, fill = [], reader._fill

    def counted(file, begin, tensor):
        read.append(tensor.nbytes)
        fill(file, begin, tensor)

    reader._fill = counted
    try:
        load_checkpoint(Path(source), chunks, optimizer, topology)
    finally:
        reader._fill = fill
    return sum(read)


def save_while_training(folder: str, steps: int) -> list[str]:
    """A save at every step, in the background, with training going on at once."""
    built = _built({}, "fp32")
    checkpointer, said = _checkpointer(built, folder, keep_last=steps)
    for step in range(steps):
        run_steps(built, range(step, step + 1), small_model().vocab_size)
        checkpointer.save(step + 1, _state(step + 1))
    checkpointer.finish()
    return said


def save_with_small_files(folder: str, rank: int, limit: int) -> tuple[list[str], str]:
    """Save step 1; save step 2 while the files of ``rank`` may not grow beyond ``limit`` bytes, as on a disk
    that is full; save step 3.
    Step 4 is the last one and fails in the same way: what the run ends with."""
    built = _built({}, "fp32")
    topology = built[-1]
    checkpointer, said = _checkpointer(built, folder)
    checkpointer.save(1, _state(1))
    checkpointer.wait()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for step in (2, 3, 4):
            small = step != 3 and topology.rank == rank
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if small else most, most))
            checkpointer.save(step, _state(step))
            if step < 4:
                checkpointer.wait()
        try:
            checkpointer.finish()
            ended = "well"
        except Exception as error:
            ended = f"{error.exit_code}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, handler)
    return said, ended


def save_into(folder: str, async_save: bool) -> list[str]:
    """Save step 1 into a folder that may be of any kind; what was said."""
    checkpointer, said = _checkpointer(_built({}, "fp32"), folder, **{"async": async_save})
    checkpointer.save(1, _state(1))
    checkpointer.wait()
    return said


def save_forbidden(folder: str) -> str:
    """Save where the run has lost the right to commit; how it ends."""
    from moe_train.errors import PolicyStop

    def forbid():
        raise PolicyStop("another start owns the folder")

    checkpointer, _ = _checkpointer(_built({}, "fp32"), folder, may_commit=forbid)
    checkpointer.save(1, _state(1))
    try:
        checkpointer.wait()
    except PolicyStop as error:
        return str(error)
    return "well"


def finish_while_copying(folder: str, place: str, how: str) -> tuple[list[str], bool]:
    """Save step 1 into ``folder`` and end the run while the copy into ``place`` takes its time, ``fails``, or is
    ``given up``: what was said, and whether the copy was whole when this rank had finished."""
    from moe_train.checkpoint import save
    from moe_train.checkpoint.manifest import is_complete
    from moe_train.checkpoint.mirror import Mirror

    class Slow(Mirror):
        def push(self, path: Path) -> None:
            if how == "given up":
                return time.sleep(60)
            time.sleep(1)
            if how == "fails":
                raise OSError("the line is down")
            super().push(path)

    built = _built({}, "fp32")
    mirror = Slow(place, 2, Path(folder).parent) if built[-1].rank == 0 else None
    checkpointer, said = _checkpointer(built, folder, copy_to=place, mirror=mirror)
    before, waited = (save.COPY_SECONDS, save.COPY_POLL_SECONDS), []
    save.COPY_SECONDS, save.COPY_POLL_SECONDS = 1.0 if how == "given up" else 60.0, 0.1
    try:
        checkpointer.save(1, _state(1))
        checkpointer.finish(lambda: waited.append(True))
        assert waited  # the watchdog would have heard of it
    finally:
        save.COPY_SECONDS, save.COPY_POLL_SECONDS = before
    return said, is_complete(Path(place) / "iter_0000001")


def save_and_die(folder: str, rank: int) -> None:
    """Save step 1; then ``rank`` dies while its part of step 2 is being written, and the others wait a
    moment."""
    built = _built({}, "fp32")
    checkpointer, _ = _checkpointer(built, folder)
    checkpointer.save(1, _state(1))
    checkpointer.wait()
    if built[-1].rank == rank:
        from moe_train.checkpoint import save

        write_metadata, write_pieces = save.write_metadata, save.write_pieces

        def die(function):
            def dying(*args):
                function(*args)
                os.kill(os.getpid(), signal.SIGKILL)

            return dying

        # Rank 0 after its last file but the manifest, another rank between its file and its receipt.
        save.write_metadata, save.write_pieces = (
            die(write_metadata),
            write_pieces if rank == 0 else die(write_pieces),
        )
    checkpointer.save(2, _state(2))
    time.sleep(60 if built[-1].rank == rank else 2)
    raise RuntimeError("the other rank died")


def find(folder: str, which: str) -> str:
    """The checkpoint that all ranks agree to resume from, or how they fail."""
    from moe_train.checkpoint.load import find_checkpoint

    topology = _built({}, "fp32")[-1]
    try:
        return str(find_checkpoint(Path(folder), which, topology))
    except Exception as error:
        return f"{error.exit_code}: {error}"


def find_each_below(places: list[str], which: str) -> str:
    """The same in ``checkpoints`` below a place of each rank's own, as nodes may see different things of one disk."""
    before = os.getcwd()
    os.chdir(places[int(os.environ["RANK"])])
    try:
        return find("checkpoints", which)
    finally:
        os.chdir(before)

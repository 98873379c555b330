"""Checkpoints of weights alone: written and read without ranks, one tensor in memory at a time."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.inspect import verify
from moe_train.checkpoint.manifest import write_manifest
from moe_train.checkpoint.pieces import Piece
from moe_train.checkpoint.weights import WeightsReader, extract_weights, write_weights
from moe_train.checkpoint.writer import merge_plans, plan, write_metadata, write_pieces
from moe_train.errors import DamagedError, UserError
from tests.moe_train.checkpoint.conftest import MODEL, add_checkpoint

SHAPES = MODEL.parameter_shapes()
ROOT = Path(__file__).parents[3]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def test_there_and_back(tmp_path, weights) -> None:
    tokenizer = tmp_path / "spm.model"
    tokenizer.write_bytes(b"pieces")
    write_weights(tmp_path / "out", MODEL, weights.items(), torch.float32, tokenizer, {"step": 7})
    reader = WeightsReader(tmp_path / "out")
    assert reader.config == MODEL and reader.state["step"] == 7 and reader.state["precision"] == "fp32"
    assert reader.tokenizer.read_bytes() == b"pieces"
    assert reader.names == list(SHAPES) and reader.shapes == SHAPES
    assert all(torch.equal(reader.read(name), weights[name]) for name in SHAPES)
    assert verify(tmp_path / "out") == 0


def test_one_tensor_is_in_memory_at_a_time(tmp_path) -> None:
    given, most = [], 0

    def stream():
        nonlocal most
        for name, shape in SHAPES.items():
            tensor = torch.zeros(shape)
            given.append(weakref.ref(tensor))
            most = max(most, sum(each() is not None for each in given))
            yield name, tensor
            del tensor

    write_weights(tmp_path / "out", MODEL, stream(), torch.float32)
    assert most <= 2 < len(given) == len(SHAPES)


def test_each_in_its_own_precision(tmp_path, weights) -> None:
    dtypes = {name: torch.float32 if "router" in name else torch.bfloat16 for name in SHAPES}
    write_weights(tmp_path / "out", MODEL, weights.items(), dtypes)
    reader = WeightsReader(tmp_path / "out")
    for name in SHAPES:
        assert reader.dtype(name) == dtypes[name] and torch.equal(reader.read(name), weights[name].to(dtypes[name]))


def test_what_is_there_is_not_overwritten(tmp_path, weights) -> None:
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", MODEL, weights.items(), torch.float32)  # an empty folder is no loss
    with pytest.raises(UserError, match="out exists already"):
        write_weights(tmp_path / "out", MODEL, weights.items(), torch.float32)


def test_a_source_that_fails_leaves_nothing(tmp_path, weights) -> None:
    def stream():
        yield from list(weights.items())[:3]
        raise DamagedError("the source is damaged")

    with pytest.raises(DamagedError, match="the source"):
        write_weights(tmp_path / "out", MODEL, stream(), torch.float32)
    assert not list(tmp_path.iterdir())


def test_the_wrong_tensor_is_refused(tmp_path, weights) -> None:
    weights["embedding.weight"] = weights["embedding.weight"].t()
    with pytest.raises(ValueError, match=r"expected weights.embedding.weight of shape \(7, 4\)"):
        write_weights(tmp_path / "out", MODEL, weights.items(), torch.float32)


def of_a_bf16_run(folder: Path, main: dict[str, torch.Tensor]) -> Path:
    """A checkpoint with rounded weights and exact main parameters."""
    path = add_checkpoint(folder, 100)
    kinds = (("weights", torch.bfloat16), ("main", torch.float32))
    pieces = [
        Piece(
            f"{kind}.{name}",
            SHAPES[name],
            (0,) * len(SHAPES[name]),
            SHAPES[name],
            dtype,
            lambda t=tensor.to(dtype): t,
        )
        for kind, dtype in kinds
        for name, tensor in main.items()
    ]
    written = write_pieces(path, 0, pieces)
    from moe_train.checkpoint.manifest import describe

    entries = written.entries | write_metadata(path, merge_plans([plan(pieces)]), [written])
    write_manifest(path, entries | describe(path, ["run_state.json"]))
    return path


@pytest.mark.parametrize("precision, exact", [("fp32", True), ("bf16", False), (None, False)])
def test_weights_alone_in_another_precision(tmp_path, weights, precision, exact) -> None:
    path = of_a_bf16_run(tmp_path / "run" / "checkpoints", weights)
    assert verify(path) == 0
    assert extract_weights(tmp_path / "run", tmp_path / "out", precision) == 0
    reader = WeightsReader(tmp_path / "out")
    assert reader.state["step"] == 100
    for name, tensor in weights.items():
        assert torch.equal(reader.read(name), tensor if exact else tensor.bfloat16())


def test_damaged_weights_are_not_extracted(run, tmp_path) -> None:
    path = run / "checkpoints" / "iter_0000300" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedError, match="__0_0.distcp has other contents"):
        extract_weights(path.parent, tmp_path / "out")


FULL_DISK = """
import sys
sys.path.insert(0, {root!r})
import torch
from moe_train.checkpoint.weights import write_weights
from tests.moe_train.checkpoint.conftest import MODEL
try:
    write_weights("out", MODEL, ((n, torch.zeros(s)) for n, s in MODEL.parameter_shapes().items()), torch.float32)
except Exception as error:
    print(error.exit_code, error)
"""


def test_a_full_disk_says_so(tmp_path) -> None:
    """A file system of 8 KB, mounted for this test alone."""
    script, disk = tmp_path / "script.py", tmp_path / "disk"
    script.write_text(FULL_DISK.format(root=str(ROOT)))
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=8k small {disk} && cd {disk} && {sys.executable} {script} && ls"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.stdout == "2 out cannot be written (No space left on device): choose another folder\n", done.stderr

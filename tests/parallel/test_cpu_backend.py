"""Every stand-in still has the caller it was made for, and the engine checks its own version."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel import cpu_backend, engine
from parallel.errors import EngineError

STAND_INS = cpu_backend.stand_ins()


@pytest.mark.parametrize("stand_in", STAND_INS, ids=lambda stand_in: stand_in.target)
def test_megatron_core_still_asks_for_it(stand_in):
    caller = importlib.import_module(stand_in.caller)
    assert stand_in.words in inspect.getsource(caller)
    owner, name = stand_in.target.rsplit(".", 1)
    assert hasattr(cpu_backend._resolve(owner), name)


def test_no_target_is_replaced_twice():
    targets = [stand_in.target for stand_in in STAND_INS]
    assert len(set(targets)) == len(targets)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch is built with CUDA: what is fused there is compiled")
@pytest.mark.parametrize("unused", ["torch._inductor.compile_fx", "wandb", "tensorboard"])
def test_a_rank_on_a_cpu_starts_without_compiler_and_trackers(modules_of_a_rank, unused):
    """Which would take much of its start."""
    assert unused not in modules_of_a_rank and "megatron.core" in modules_of_a_rank


@pytest.fixture(scope="module")
def modules_of_a_rank() -> list[str]:
    """What a rank has imported when it begins to train, and can still import a tracker."""
    code = "import sys, parallel.engine, moe_train.training.loop; print(*sys.modules); import wandb, tensorboard"
    root = Path(__file__).resolve().parents[2]
    return subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split()


def test_another_version_of_megatron_core_is_refused(monkeypatch):
    versions = {"megatron-core": "0.19.2", "psutil": "7.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(EngineError, match=r"0\.19\.2 is installed.*pip install 'megatron-core==0\.16\.1'"):
        engine.check_megatron()


def test_a_missing_package_is_named(monkeypatch):
    def version(name):
        if name == "psutil":
            raise importlib.metadata.PackageNotFoundError(name)
        return engine.MEGATRON_VERSION

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(EngineError, match="pip install 'psutil'"):
        engine.check_megatron()

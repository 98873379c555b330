"""Whose time is whose: operations of a step, forward and backward, counted by the part they are found to belong to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from moe_train.model.depth_config import DepthConfig
from moe_train.profile.operations import costliest, host_waits, waiting_lines, write_costliest
from moe_train.profile.parts import MEANING, busy_time, events_with_parts, named_parts, time_by_part
from parallel.layout import Layout
from tests.integration.runs import ROOT, write_corpora
from tests.steps_on_ranks import MICRO_BATCH, build, small_model


@pytest.fixture(scope="module", params=["none", "full", "depth"])
def events(request):
    """Of forward and backward of one micro-batch through 4 layers of 4 experts each, and an update."""
    depth = request.param == "depth"
    from parallel import engine

    model = small_model(depth=DepthConfig(initial_gate=0.5) if depth else None)
    recompute = "none" if depth else request.param
    chunks, stepper, optimizer, _, _ = build(Layout(1, 1, 1, None, 1, 1), model, recompute=recompute)
    windows = torch.randint(0, 51, (MICRO_BATCH, 16), generator=torch.Generator().manual_seed(0))
    with named_parts(), torch.profiler.profile() as recorded:
        optimizer.zero_grad()
        stepper.train([windows])
        optimizer.update(1e-3, optimizer.gradient_norm())
    engine.stop()
    return request.param, recorded.events()


def test_matrix_products_belong_where_they_are_written(events):
    recompute, recorded = events
    products = Counter(
        part for event, part in events_with_parts(recorded) if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")
    )
    layers, experts = 4, 4
    forward = 2 if recompute == "full" else 1
    # Query, output, gate_up, down: a product of each expert forward, two backward (one where it accumulates in place).
    assert products["experts"] == layers * 4 * experts * (forward + 2)
    # Keys and values: one, and two backward. Routers are two of a layer.
    assert products["attention"] == layers * (forward + 2)
    assert products["router"] == 2 * layers * (forward + 2)
    assert products["head"] == 3
    assert products.pop("depth", 0) == (layers // 2 * (forward + 2) if recompute == "depth" else 0)
    assert set(products) == {"experts", "attention", "router", "head"}


def test_every_part_has_time_and_all_of_it_is_given_out(events):
    case, recorded = events
    spent = time_by_part(recorded, device=False)
    assert set(spent) == set(MEANING)
    idle = {part for part, microseconds in spent.items() if not microseconds}
    assert idle == (set() if case == "depth" else {"depth"}), spent
    every = sum(event.self_cpu_time_total for event in recorded if event.device_type == torch.autograd.DeviceType.CPU)
    assert sum(spent.values()) == pytest.approx(every, rel=1e-6)
    assert busy_time(recorded) == 0.0  # no GPU


def test_no_part_of_the_model_has_the_host_wait(events):
    """Loss and gradient norm are read once. AdamW reads its count of steps on a CPU alone, which is left out."""
    waits = host_waits(events[1], gpu=False, steps=1)
    assert waits.pop("aten::item in other") == 1
    waits.pop("aten::tolist in depth", None)
    assert waits == {"aten::item in optimizer": 1}, waits


def test_operations_by_name(events, tmp_path):
    rows = costliest(events[1], gpu=False, steps=2, count=5)
    everything = costliest(events[1], gpu=False, steps=2, count=10**6)
    assert rows == sorted(everything, key=lambda row: row["milliseconds"], reverse=True)[:5]
    assert not any(row["name"].startswith("part: ") for row in everything)
    calls = {row["name"]: row["calls"] for row in everything}
    assert calls["aten::mm"] == sum(event.name == "aten::mm" for event in events[1]) / 2
    write_costliest(events[1], False, 2, tmp_path / "kernels.txt")
    assert rows[0]["name"] in (tmp_path / "kernels.txt").read_text().splitlines()[1]


def of_a_gpu(name: str, parent=None, gpu=False, microseconds=0.0, annotation=False) -> SimpleNamespace:
    """An event as the profiler gives it on a GPU."""
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(
        name=name, cpu_parent=parent, device_type=kind, is_user_annotation=annotation, time_range=span, sequence_nr=-1
    )


def test_kernels_and_waits_of_a_gpu():
    router = of_a_gpu("part: router")
    item = of_a_gpu("aten::item", router)
    scalar = of_a_gpu("aten::_local_scalar_dense", item)
    own = of_a_gpu("profile: wait")
    events = [
        *(router, item, scalar, own),
        of_a_gpu("cudaStreamSynchronize", scalar),
        of_a_gpu("cudaDeviceSynchronize", own),
        of_a_gpu("cudaEventSynchronize"),
        of_a_gpu("cudaLaunchKernel", item),
        of_a_gpu("nvjet_bf16", gpu=True, microseconds=3000.0),
        of_a_gpu("sm90_e4m3_gemm", gpu=True, microseconds=2500.0),
        of_a_gpu("sm90_e4m3_gemm", gpu=True, microseconds=1500.0),
        of_a_gpu("part: router", gpu=True, microseconds=9000.0, annotation=True),
    ]
    assert host_waits(events, gpu=True, steps=2) == {"aten::item in router": 0.5, "cudaEventSynchronize in other": 0.5}
    assert costliest(events, gpu=True, steps=2) == [
        {"name": "sm90_e4m3_gemm", "milliseconds": 2.0, "calls": 1.0},
        {"name": "nvjet_bf16", "milliseconds": 1.5, "calls": 0.5},
    ]


def test_lines_that_wait_are_named():
    def step():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (line,) = waiting_lines(step, ROOT)
    assert line.startswith("tests/moe_train/profile/test_profile.py:") and waiting_lines(step, ROOT)[line] == 3


def test_training_is_as_it_was_afterwards():
    from moe_train.model.router import Router

    before = Router.forward
    with named_parts():
        assert Router.forward is not before
    assert Router.forward is before


def profile(folder, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moe_train", "profile", str(folder / "run.yaml"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)


def test_every_step_is_of_the_whole_batch_and_the_mixture_has_them(tmp_path, monkeypatch):
    from moe_train.config import load_run
    from moe_train.errors import UserError
    from moe_train.profile import run

    write_corpora(tmp_path)
    monkeypatch.chdir(tmp_path)
    config, given = load_run("run.yaml", ["training.batch_size_warmup={start: 2, tokens: 512}"]), []
    monkeypatch.setattr(run, "run_ranks", lambda nproc, target, arguments: given.append(arguments) or 0)
    with pytest.raises(UserError, match="--steps 20 takes 42 steps .* the mixture has 40; take at most 19"):
        run.profile(config, 2, 20, "out", True)
    assert run.profile(config, 2, 19, "out", True) == 0
    assert given[0]["config"]["training"]["batch_size_warmup"] is None


def test_the_command(tmp_path):
    write_corpora(tmp_path)
    done = profile(tmp_path, "--nproc", "2", "--steps", "1", "--out", "there", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "there/profile.json").read_text())
    assert set(result["parts"]) == set(MEANING) and result["device"] == "CPU" and result["mfu"] is None
    assert result["tokens_per_second"] == pytest.approx(64 / result["step_seconds"])
    assert sum(result["parts"].values()) + result["idle"] == pytest.approx(result["profiled_seconds"], rel=0.2)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        "kernels_rank_00000.txt",
        "kernels_rank_00001.txt",
        "profile.json",
        "trace_rank_00000.json.gz",
        "trace_rank_00001.json.gz",
    ]
    assert result["slice"]["world_size"] == 2 and result["slice"]["sequence_length"] == 16
    slice_ = result["slice"]
    assert 2 * slice_["micro_batches"] * slice_["micro_batch_size"] * slice_["sequence_length"] == 64
    assert not (tmp_path / "run").exists(), "the run's own folder was touched"
    again = profile(tmp_path, "--nproc", "2", "--out", "there")
    assert again.returncode == 2 and "there" in again.stderr and again.stderr.count("\n") == 1

"""The benchmark of a GPU, tried on a CPU: every contestant takes steps, and its balanced routing is balanced."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_train.config import load_model
from moe_train.model.config import ModelConfig

ROOT = Path(__file__).parents[1]
BATCH = (2, 1, 64)


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The benchmarks import each other by name, as scripts do."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_model("bench_60m").model_copy(update={"num_layers": 1, "vocab_size": 512})


@pytest.fixture(autouse=True)
def apart():
    """Each starts the engine as the first in its process does."""
    yield
    from parallel import engine

    engine.stop()


def steps(contestant, model) -> None:
    windows = torch.randint(0, model.vocab_size, (*BATCH[:2], BATCH[2] + 1), generator=torch.Generator().manual_seed(0))
    contestant.step(windows)
    with contestant.balanced():
        contestant.step(windows)


def test_ours(model, monkeypatch) -> None:
    from contestants import ours

    from moe_train.model.grouped_linear import GroupedLinear

    contestant = ours(model, "torch", BATCH, "bf16", "none", share=False)
    assert contestant.parameters == model.num_parameters() and contestant.routings == ("learned", "balanced")
    counts = []
    forward = GroupedLinear.forward
    monkeypatch.setattr(
        GroupedLinear, "forward", lambda self, x, rows: (counts.append(rows.counts), forward(self, x, rows))[1]
    )
    steps(contestant, model)
    learned, balanced = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    assert any(len(set(each)) > 1 for each in learned)
    assert all(set(each) == {BATCH[2] * model.mlp.top_k // 8} for each in balanced)


def test_the_share_of_one_of_eight_ranks(model, monkeypatch) -> None:
    from contestants import ours

    from moe_train.model.grouped_linear import GroupedLinear

    contestant = ours(model, "torch", BATCH, "bf16", "none", share=True)
    whole = model.num_parameters()
    experts = model.mlp.num_experts * 3 * 512 * 704 + model.attention.num_experts * 2 * 512 * 512
    assert contestant.parameters == whole - experts * 7 // 8 and contestant.routings == ("balanced",)
    seen = []
    forward = GroupedLinear.forward

    def watched(self, x, rows):
        seen.append((len(self.weight), len(x), rows.counts))
        return forward(self, x, rows)

    monkeypatch.setattr(GroupedLinear, "forward", watched)
    steps(contestant, model)
    pairs = BATCH[2] * model.mlp.top_k
    assert seen and all(each == (1, pairs, [pairs]) for each in seen)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face(model, attention, monkeypatch) -> None:
    pytest.importorskip("transformers")
    from rivals import huggingface
    from transformers.models.jetmoe import modeling_jetmoe

    contestant = huggingface(model, attention, "bf16")
    assert contestant.parameters == model.num_parameters()
    sizes = []
    experts = modeling_jetmoe.JetMoeParallelExperts
    forward = experts.forward
    monkeypatch.setattr(experts, "forward", lambda self, x, size: (sizes.append(size), forward(self, x, size))[1])
    steps(contestant, model)
    learned, balanced = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
    assert any(len(set(each)) > 1 for each in learned)
    assert all(set(each) == {BATCH[2] * model.mlp.top_k // 8} for each in balanced)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None and not torch.cuda.is_available(),
    reason="GPTModel takes its last norm from Transformer Engine where that is installed, which needs a GPU",
)
def test_megatron(model, monkeypatch) -> None:
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe.experts import SequentialMLP
    from rivals import megatron

    fused = []
    gate = mlp.weighted_bias_swiglu_impl
    monkeypatch.setattr(mlp, "weighted_bias_swiglu_impl", lambda *given: (fused.append(given), gate(*given))[1])
    contestant = megatron(model, "local", BATCH, "bf16", "none")
    hidden, heads = model.hidden_size, model.attention
    # queries and outputs of experts unused
    same = model.num_parameters() - (heads.num_experts - heads.top_k) * 2 * hidden * heads.width
    assert contestant.parameters == pytest.approx(same, rel=0.001)  # but for a router and biases
    theirs = contestant.model.flops_per_token(BATCH[2])
    assert theirs == pytest.approx(model.flops_per_token(BATCH[2]), rel=0.01)
    counts = []
    forward = SequentialMLP.forward

    def watched(self, rows, per_expert, *more):
        counts.append(per_expert.tolist())
        return forward(self, rows, per_expert, *more)

    monkeypatch.setattr(SequentialMLP, "forward", watched)
    steps(contestant, model)
    assert any(len(set(each)) > 1 for each in counts[: len(counts) // 2])
    assert all(set(each) == {BATCH[2] * model.mlp.top_k // 8} for each in counts[len(counts) // 2 :])
    assert fused, "its activation runs operation by operation"


def test_as_many_layers_as_fit(monkeypatch) -> None:
    import h100_step

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = load_model("jetmoe_8b")

    def fitted(memory: float, **changes) -> int:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
        arguments = dict(precision="bf16", sequence_length=4096, micro_batch_size=1, micro_batches=4, recompute="none")
        return h100_step.fitted_layers(whole, SimpleNamespace(**{**arguments, **changes}))

    layers = fitted(80e9)
    state = 18 * whole.model_copy(update={"num_layers": layers}).num_parameters()
    assert 0.6 * 80e9 < state < h100_step.ROOM * 80e9
    assert (
        fitted(80e9, recompute="full") >= layers > fitted(80e9, micro_batch_size=4) and fitted(1e12) == whole.num_layers
    )
    with pytest.raises(SystemExit, match="not one layer fits"):
        fitted(1e9)


def test_who_writes_scores_that_cannot_fit_is_left_out(monkeypatch, capsys) -> None:
    import h100_step

    def left_out(name: str, memory: float, size: int, length: int) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
        return h100_step.left_out(load_model(name), SimpleNamespace(micro_batch_size=size, sequence_length=length))

    assert left_out("jetmoe_8b", 1.0, 4, 4096) == []  # nothing is known of a CPU's
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    both = ["huggingface-eager", "megatron-local"]
    # 4 x 32 heads x 4096 x 4096: 25.8 GB
    assert left_out("jetmoe_8b", 85e9, 4, 4096) == left_out("jetmoe_8b", 150e9, 4, 4096) == both
    assert left_out("jetmoe_8b", 180e9, 4, 4096) == left_out("jetmoe_8b", 85e9, 1, 4096) == []
    assert left_out("mixtral_8x7b", 85e9, 4, 4096) == both and left_out("mixtral_8x7b", 85e9, 4, 2048) == []

    def child(name: str, more: list[str], limit: float) -> dict:
        return {"layers": 1, "left_out": both} if name == "machine" else {"error": "x"}

    monkeypatch.setattr(h100_step, "in_child", child)
    monkeypatch.setattr(sys, "argv", ["h100_step.py"])
    h100_step.main()
    said = capsys.readouterr()
    entries = json.loads(said.out)["contestants"]
    assert set(entries) == set(h100_step.CONTESTANTS) - set(both)
    assert said.err.startswith("left out: huggingface-eager, megatron-local (")


def test_rounds_are_put_together() -> None:
    import h100_step

    def found(*seconds: float) -> dict:
        return {"device": "NVIDIA H100 80GB HBM3", "flops_per_token": 1e10, "balanced": {"seconds": list(seconds)}}

    results = {"ours": found(0.5, 0.7), "other": found(1.0), "gone": {"error": "x"}}
    h100_step.merge(results["ours"], found(0.6))
    h100_step.merge(results["other"], {"error": "OutOfMemoryError: y"})
    arguments = SimpleNamespace(micro_batches=4, micro_batch_size=1, sequence_length=4096)
    for each in results.values():
        h100_step.finish(each, arguments)
    ours = results["ours"]["balanced"]
    assert ours["step_seconds"] == 0.6 and ours["mfu"] == pytest.approx(16384 / 0.6 * 1e10 / 989.4e12)
    assert results["other"]["error"].endswith("y")
    assert h100_step.ratios(results) == {"ours": {"balanced": 1.0}, "other": {"balanced": 0.6}}


def test_what_is_cut_off_leaves_what_it_has(tmp_path, monkeypatch) -> None:
    import h100_step

    file = tmp_path / "new/results.json"
    left = []

    def child(name: str, more: list[str], limit: float) -> dict:
        if name == "machine":
            return {"benchmark": "h100_step", "layers": 3, "left_out": []}
        left.append(json.loads(file.read_text())["contestants"])
        if name == "ours-te":
            return {"error": "EngineError: x"}
        if len(left) == 6:
            raise KeyboardInterrupt
        return {"device": "NVIDIA H100", "flops_per_token": 1e10, "balanced": {"seconds": [float(len(left))]}}

    monkeypatch.setattr(h100_step, "in_child", child)
    monkeypatch.setattr(
        sys, "argv", ["h100_step.py", "--only", "ours,ours-te,megatron-te", "--rounds", "2", "--out", str(file.parent)]
    )
    with pytest.raises(KeyboardInterrupt):
        h100_step.main()
    assert [list(each) for each in left[:4]] == [[], ["ours"], ["ours", "ours-te"], ["ours", "ours-te", "megatron-te"]]
    answer = json.loads(file.read_text())
    ours, theirs = (answer["contestants"][name]["balanced"] for name in ("ours", "megatron-te"))
    assert ours["seconds"] == [1.0, 4.0] and ours["step_seconds"] == 2.5 and theirs["step_seconds"] == 3.0
    assert answer["layers"] == 3 and answer["ratios"]["megatron-te"] == {"balanced": pytest.approx(2.5 / 3, abs=1e-4)}
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_the_script_goes_on_after_one_that_fails(tmp_path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/h100_step.py"),
        "--only",
        "ours-fp8-blockwise,ours",
        "--model",
        "bench_60m",
    ]
    command += [
        "--layers",
        "1",
        "--sequence-length",
        "64",
        "--steps",
        "1",
        "--micro-batch-size",
        "1",
        "--blocks",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    failed, ours = answer["contestants"]["ours-fp8-blockwise"], answer["contestants"]["ours"]
    assert set(failed) == {"error"} and "needs a GPU" in failed["error"] and failed["error"] in done.stderr
    assert (
        answer["layers"] == 1
        and answer["left_out"] == []
        and answer["ratios"] == {"ours": {"learned": 1.0, "balanced": 1.0}}
    )
    tokens = 4 * 64
    assert ours["balanced"]["tokens_per_second"] == pytest.approx(tokens / ours["balanced"]["step_seconds"])
    assert {"experts", "attention", "idle"} <= set(ours["balanced"]["milliseconds"]) and ours["balanced"]["host_waits"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == answer
    assert (tmp_path / "out/ours-balanced/kernels_rank_00000.txt").read_text().count("\n") > 20


def test_a_mistake_is_one_line_and_status_2() -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks/h100_step.py"), *arguments]
        done = subprocess.run(
            command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and not done.stdout
        return done.stderr

    without = said("--quick")
    assert "there is no GPU here; to try it on a CPU: --model bench_60m" in without and without.count("\n") == 1
    assert said("--model", "nope").startswith("error: there is no file nope")
    assert "0 is less than 1" in said("--rounds", "0")
    assert "--out /dev/null/x: Not a directory" in said("--out", "/dev/null/x")

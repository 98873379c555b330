"""Whole runs on what looks like GPUs (`tests.cuda_look_alike`), started as a user starts them."""

from __future__ import annotations

import importlib.util
import json

import pytest
import yaml

from tests.integration.runs import metrics, run, write_corpora

FIRST = 24  # steps, of the first device; after an evaluation
NEEDS_TRANSFORMER_ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed (extra [gpu])"
)


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    write_corpora(folder)
    status, said = run(folder)
    assert status == 0 and "fp32 on CPU" in said, said
    return folder


def losses(folder) -> dict[str, list[float]]:
    lines = metrics(folder / "run")
    return {name: [line[name] for line in lines if name in line] for name in ("loss", "grad_norm", "validation/web")}


@pytest.mark.parametrize("gpu_first", [True, False])
def test_a_run_begun_on_one_device_ends_on_the_other(on_a_cpu, tmp_path, gpu_first) -> None:
    write_corpora(tmp_path)
    for gpu, more in ((gpu_first, [f"training.max_steps={FIRST}"]), (not gpu_first, [])):
        status, said = run(tmp_path, *more, gpu=gpu)
        assert status == 0 and f"fp32 on {'NVIDIA H100' if gpu else 'CPU'}" in said, said
    assert f"at step {FIRST}" in said
    for name, wanted in losses(on_a_cpu).items():
        assert losses(tmp_path)[name] == pytest.approx(wanted, rel=1e-4 if name != "grad_norm" else 1e-3), name
    lines = metrics(tmp_path / "run")
    on_gpus = lines[:FIRST] if gpu_first else lines[FIRST:]
    assert [line["mfu"] is not None for line in lines] == [line in on_gpus for line in lines]


def test_a_profile(on_a_cpu, tmp_path) -> None:
    status, said = run(on_a_cpu, "--steps", "1", "--out", str(tmp_path), verb=("profile",), gpu=True)
    assert status == 0, said
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["device"].startswith("NVIDIA H100") and profile["mfu"] > 0


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=NEEDS_TRANSFORMER_ENGINE)])
def test_low_precision(tmp_path, precision) -> None:
    """Sizes in the multiples of 16 that FP8 takes."""
    write_corpora(tmp_path)
    model = yaml.safe_load((tmp_path / "model.yaml").read_text())
    model["hidden_size"], model["attention"]["head_dim"], model["mlp"]["ffn_hidden_size"] = 32, 16, 32
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    status, said = run(tmp_path, f"training.precision={precision}", gpu=True)
    assert status == 0, said
    assert ("FP8, tensorwise: 60 of 60 matrix products" in said) == (precision == "fp8")
    on_the_cpu = tmp_path / "cpu"
    on_the_cpu.mkdir()
    write_corpora(on_the_cpu)
    (on_the_cpu / "model.yaml").write_text(yaml.safe_dump(model))
    status, said = run(on_the_cpu, "training.precision=bf16")
    assert status == 0, said
    assert losses(tmp_path)["loss"] == pytest.approx(losses(on_the_cpu)["loss"], rel=0.05)

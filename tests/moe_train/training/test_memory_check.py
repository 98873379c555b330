"""What a run holds at all times, against the memory of where it starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_train.config import load_run
from moe_train.errors import UserError
from moe_train.training import memory_check
from tests.integration.runs import run, write_corpora


@pytest.fixture
def small_run(tmp_path):
    write_corpora(tmp_path)
    return load_run(tmp_path / "run.yaml", ["parallel.expert=1", "training.precision=fp32"])


def test_each_process_holds_weights_and_gradients_and_all_of_them_one_state(small_run, monkeypatch) -> None:
    """fp32: 8 bytes a parameter in each process, and two moments of 4 bytes shared by them."""
    parameters = small_run.model.num_parameters()
    for ranks in (1, 2):
        held = parameters * (8 * ranks + 8)
        # A little more: rows of padding in the vocabulary, and of the shares of the state.
        monkeypatch.setattr(memory_check, "host_memory", lambda held=held: int(1.1 * held))
        memory_check.check_host_memory(small_run, ranks)
        monkeypatch.setattr(memory_check, "host_memory", lambda held=held: held // 2)
        with pytest.raises(UserError, match="this machine has .*take a smaller model"):
            memory_check.check_host_memory(small_run, ranks)


def test_a_gpu_is_asked_for_what_one_rank_holds(small_run) -> None:
    held = 16 * small_run.model.num_parameters()
    memory_check.check_gpu_memory(small_run, small_run.layout(1), 0, int(1.1 * held))
    with pytest.raises(UserError, match="held by a rank, and its GPU has"):
        memory_check.check_gpu_memory(small_run, small_run.layout(1), 0, held // 2)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch) -> None:
    import psutil

    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory_check, "CGROUP_LIMIT", limit)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**9))
    assert memory_check.host_memory() == 10**9
    for text, memory in (("max\n", 10**9), ("5000\n", 5000), (f"{10**12}\n", 10**9)):
        limit.write_text(text)
        assert memory_check.host_memory() == memory


def test_a_model_too_large_for_this_machine_is_refused_before_a_process_is_started(tmp_path) -> None:
    write_corpora(tmp_path)
    status, said = run(tmp_path, "model.hidden_size=65536", "model.mlp.ffn_hidden_size=262144")
    assert status == 2 and said.count("\n") == 1, said
    assert said.startswith("error: weights, gradients and optimizer state take ") and "held by 2 processes" in said
    assert not (tmp_path / "run/checkpoints").exists()

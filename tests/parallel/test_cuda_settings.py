"""Settings for GPUs: by layout, and never over the user's own."""

from __future__ import annotations

from pathlib import Path

from parallel.cuda_settings import export, settings
from parallel.layout import Layout


def names(tensor: int) -> set[str]:
    return {setting.name for setting in settings(Layout(tensor, tensor, 1, None, 1, 1))}


def test_one_queue_only_where_tensor_parallelism_wants_it():
    assert names(2) - names(1) == {"CUDA_DEVICE_MAX_CONNECTIONS"}


def test_the_users_own_stay():
    environment = {"NCCL_NVLS_ENABLE": "1"}
    export(Layout(2, 2, 1, None, 1, 1), environment)
    assert environment == {
        "NCCL_NVLS_ENABLE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


def test_the_page_for_people_has_each():
    rows = (Path(__file__).parents[2] / "docs/gpu.md").read_text().splitlines()
    for setting in settings(Layout(2, 2, 1, None, 1, 1)):
        assert any(row.startswith(f"| `{setting.name}` | `{setting.value}`") for row in rows), setting.name

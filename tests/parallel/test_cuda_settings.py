"""Settings for GPUs: by layout, and never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_nor_is_one_of_another_name_overruled():
    environment = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}
    export(Layout(1, 1, 1, None, 1, 1), environment)
    assert environment.keys() == {"PYTORCH_ALLOC_CONF", "NCCL_NVLS_ENABLE"}


def test_a_run_exports_them_before_torch_is_there():
    """Parts of it ask CUDA for its devices as they are imported, and CUDA reads its variables once."""
    program = """
import os, sys
from types import SimpleNamespace
from moe_train.training import run
from parallel.layout import Layout
sys.modules["parallel.engine"] = None
try:
    config = SimpleNamespace(layout=lambda ranks: Layout(ranks, ranks, 1, None, 1, 1))
    run._start_and_train(config, 2, "never", None, "")
except ImportError:
    print(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], "torch" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout == "1 False\n", done.stderr


def test_the_page_for_people_has_each():
    rows = (Path(__file__).parents[2] / "docs/gpu.md").read_text().splitlines()
    for setting in settings(Layout(2, 2, 1, None, 1, 1)):
        assert any(row.startswith(f"| `{setting.name}` | `{setting.value}`") for row in rows), setting.name

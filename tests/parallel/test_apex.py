"""NVIDIA's Apex by what it contains; another package of that name is refused before megatron-core sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
START = """
from parallel import engine
from parallel.layout import Layout
try:
    engine.start(Layout(1, 1, 1, None, 1, 1), seed=1)
except Exception as error:
    print(type(error).__name__, error.exit_code, error)
"""


def python(code: str, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package(folder: Path, *parts: str) -> Path:
    for part in ("", *parts):
        (folder / "apex" / part).mkdir(parents=True, exist_ok=True)
        (folder / "apex" / part / "__init__.py").write_text("raise ImportError('imported')\n")
    return folder


def test_a_namesake_is_refused_with_what_to_do(tmp_path):
    said = python(START, package(tmp_path, "models", "views"))
    assert said.startswith("EngineError 2 ") and said.count("\n") == 1
    assert str(tmp_path / "apex") in said and "pip uninstall apex" in said


def test_nvidias_is_found_and_none_is_fine(tmp_path):
    find = "from parallel.apex import find_apex; print(find_apex())"
    assert (
        python(find, package(tmp_path, "multi_tensor_apply", "optimizers", "normalization")) == f"{tmp_path / 'apex'}\n"
    )
    assert python(find, tmp_path / "empty") == "None\n"

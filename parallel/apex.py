"""NVIDIA's Apex and its namesake.

megatron-core takes any importable ``apex`` for NVIDIA's, whose fused Adam and norm statistics it then uses. The package
of that name on PyPI has nothing to do with it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from parallel.errors import EngineError

MARKS = ("multi_tensor_apply", "optimizers", "normalization")
"""Subpackages that NVIDIA's has."""


def find_apex() -> Path | None:
    """The folder of NVIDIA's Apex, or None where no ``apex`` is installed. Imports nothing of it.

    Raises:
        EngineError: something else is installed under that name.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if all((folder / mark).is_dir() for mark in MARKS):
            return folder
    where = folders[0] if folders else spec.origin
    raise EngineError(
        f"the package `apex` in {where} is not NVIDIA's Apex, but megatron-core would take it for that: pip uninstall "
        "apex (NVIDIA's is built from source, github.com/NVIDIA/apex; it is optional)"
    )

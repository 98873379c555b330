"""The state of the random generators, for a checkpoint. No operation of the model draws from them: they are
kept for what users add."""

from __future__ import annotations

import base64
import random
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Python's and torch's generators, as JSON can hold them."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: dict[str, Any] | None) -> None:
    """Undo :func:`random_state`; nothing where there is none."""
    if not state:
        return
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

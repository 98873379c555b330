"""A fitted law as a file: `plan fit` writes it, `plan compute-optimal --law` reads it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.errors import UserError
from moe_train.plan.scaling import ParametricLaw
from moe_train.plan.sparsity import SparsityLaw

CONSTANTS = ("E", "A", "B", "alpha", "beta")


def save_law(path: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Write the report of a fit; `report["parametric"]["constants"]` is what `load_law` reads."""
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Laws:
    """What a file holds: the parametric law, the sparsity law if there is one, and the range of the runs."""

    parametric: ParametricLaw
    sparsity: SparsityLaw | None = None
    range: dict[str, tuple[float, float]] = field(default_factory=dict)


def load_law(path: str | os.PathLike[str]) -> Laws:
    """The laws in a file. Raises UserError, one line, for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        constants = data.get("parametric", data).get("constants", data)
        parametric = ParametricLaw(**{name: float(constants[name]) for name in CONSTANTS})
        sparse = data.get("sparsity", {}).get("constants")
        limits = {name: (float(low), float(high)) for name, (low, high) in data.get("range", {}).items()}
        return Laws(parametric, SparsityLaw(**sparse) if sparse else None, limits)
    except OSError as error:
        reason = f"{error.strerror}; name a file that `moe-train plan fit --out` wrote"
        raise UserError(f"--law {path}: {reason}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        names = ", ".join(CONSTANTS)
        raise UserError(
            f"--law {path}: holds no parametric law; it needs the numbers {names}, as `plan fit --out` writes"
        ) from None

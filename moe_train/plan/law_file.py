"""A fitted law as a file: `plan fit` writes it, `plan compute-optimal --law` reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moe_train.errors import UserError
from moe_train.plan.scaling import ParametricLaw

CONSTANTS = ("E", "A", "B", "alpha", "beta")


def save_law(path: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Write the report of a fit; `report["parametric"]["constants"]` is what `load_law` reads."""
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def load_law(path: str | os.PathLike[str]) -> ParametricLaw:
    """The parametric law in a file. Raises UserError, one line, for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        constants = data.get("parametric", data).get("constants", data)
        return ParametricLaw(**{name: float(constants[name]) for name in CONSTANTS})
    except OSError as error:
        raise UserError(
            f"--law {path}: {error.strerror}; name a file that `moe-train plan fit --out` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--law {path}: holds no parametric law; it needs the numbers {', '.join(CONSTANTS)}, as `plan fit --out` writes"
        ) from None

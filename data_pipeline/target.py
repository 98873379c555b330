"""A file or folder that a command is about to write: looked at before hours of work go into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from data_pipeline.errors import DataError


def check_target(path: str | os.PathLike[str], name: str, *, folder: bool = False) -> Path:
    """`path` as a Path; the folder that it lies in is made where there is none.

    Args:
        name: what the user calls it, such as ``--out``.
        folder: a folder is to be written, else a file.

    Raises DataError: nothing can be written there, or a folder lies where a file is to be, or the other way round.
    """
    target = Path(path)
    if target.is_dir() != folder and target.exists():
        raise DataError(f"{name} {path} is a {'file' if folder else 'folder'}; choose another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target if folder and target.is_dir() else target.parent):
            pass
    except OSError as error:
        raise DataError(
            f"{name} {path} cannot be written ({error.strerror}); make room or choose another place"
        ) from None
    return target

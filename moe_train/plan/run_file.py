"""A run file as a planner reads it: its data need not be there yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from moe_train.config import RunConfig, load_run


def load_plan(run: str, overrides: list[str]) -> RunConfig:
    """The run file with overrides. ``${DATA}``, where it is not set, stands for a folder that need not exist.

    Raises an error with ``exit_code`` 2, one line, for any other mistake in it.
    """
    with _data_folder():
        config = load_run(run, overrides)
        config.mixture  # noqa: B018  (loaded here, while the variable is set)
    return config


@contextmanager
def _data_folder() -> Iterator[None]:
    absent = "DATA" not in os.environ
    if absent:
        os.environ["DATA"] = "/data"
    try:
        yield
    finally:
        if absent:
            del os.environ["DATA"]

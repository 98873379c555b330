"""One Slurm for all tests that need one."""

from __future__ import annotations

import subprocess
import warnings
from contextlib import ExitStack

import pytest

from tests.launch.slurm_cluster import SlurmCluster, Unavailable, install

NODES = 16
"""Twelve for the paper's run; the others for nodes that tests break."""


@pytest.fixture(scope="session")
def slurm():
    """A real Slurm of virtual nodes; where there can be none the tests are skipped, with the reason in capitals."""
    with ExitStack() as stack:
        try:
            install()
            cluster = stack.enter_context(SlurmCluster(NODES))
        except (Unavailable, AssertionError, OSError, subprocess.SubprocessError) as reason:
            warnings.warn(f"NOTHING IS TESTED ON SLURM: {reason}", stacklevel=1)
            pytest.skip(f"NOTHING IS TESTED ON SLURM: {reason}")
        yield cluster

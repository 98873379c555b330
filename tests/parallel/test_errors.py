"""What is said of an error of a file, and with which status a rank ends for it."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest

from parallel.errors import file_mistake
from parallel.rank import exit_status


@pytest.fixture
def small_files():
    """Files grow to one byte."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_finds_no_room_is_no_bug_though_its_error_names_no_file(tmp_path, small_files) -> None:
    with pytest.raises(OSError) as raised, open(tmp_path / "x", "wb", buffering=0) as file:
        while True:
            file.write(b"words")
    assert raised.value.filename is None
    assert file_mistake(raised.value) == (
        "a file cannot be written: File too large; raise the limit on the size of a file (ulimit -f), or choose "
        "another disk"
    )
    assert exit_status(raised.value) == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_with_and_without_the_file(number: int) -> None:
    reason = os.strerror(number)
    assert file_mistake(OSError(number, reason)).startswith(f"a file cannot be written: {reason}; make room")
    assert file_mistake(OSError(number, reason, "a/b")).startswith(f"a/b: {reason}; make room")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL])
def test_other_errors_without_a_file_stay_bugs(number: int) -> None:
    """Sockets and devices raise them too."""
    assert file_mistake(OSError(number, os.strerror(number))) is None

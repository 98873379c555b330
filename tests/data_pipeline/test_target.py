"""What is to be written is looked at first: every way that it cannot be is one line."""

from __future__ import annotations

import pytest

from data_pipeline.errors import DataError
from data_pipeline.target import check_target


def test_a_file_or_a_folder_that_can_be_written(tmp_path):
    target = check_target(tmp_path / "a" / "b" / "law.json", "--out")
    assert target.parent.is_dir() and not target.exists() and not any(target.parent.iterdir())
    assert check_target(target.parent, "--out", folder=True) == target.parent
    target.write_text("old")
    assert check_target(str(target), "--out").read_text() == "old"


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(
        DataError, match=r"^--plot .*file/x.png cannot be written \(.+\); make room or choose another place$"
    ):
        check_target(tmp_path / "file" / "x.png", "--plot")
    with pytest.raises(DataError, match=r"^--out /proc/nothing cannot be written"):
        check_target("/proc/nothing", "--out", folder=True)
    with pytest.raises(DataError, match=r"^--out .* is a folder; choose another name$"):
        check_target(tmp_path, "--out")
    with pytest.raises(DataError, match=r"^--out .*file is a file; choose another name$"):
        check_target(tmp_path / "file", "--out", folder=True)

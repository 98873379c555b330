"""Which files the inputs of a corpus stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.documents import find_inputs


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"text": "{path.name}"}}\n')


def test_folders_are_read_through_links_and_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/real/a.jsonl", "in/z.jsonl", "other/b.jsonl", "other/deep/c.jsonl"):
        write(tmp_path / name)
    raw = tmp_path / "in"
    (raw / "link").symlink_to("../other")
    (raw / "same").symlink_to("../other")
    (raw / "copy.jsonl").symlink_to("z.jsonl")
    (raw / "gone.jsonl").symlink_to("nowhere.jsonl")
    monkeypatch.chdir(tmp_path)
    expected = ["in/copy.jsonl", "in/link/b.jsonl", "in/link/deep/c.jsonl", "in/real/a.jsonl"]
    assert find_inputs("in/**/*.jsonl") == expected
    (tmp_path / "other" / "up").symlink_to("../in")  # a circle
    assert find_inputs("in") == find_inputs("./in/") == expected
    assert find_inputs(["in/z.jsonl", raw, "other"]) == ["in/z.jsonl", *(str(tmp_path / name) for name in expected[1:])]

"""The demo's report, from a metrics.jsonl as a run writes it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.demo import report


def rows_of(steps: int = 40) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "tokens": step * 1000,
            "phase": "stable" if step <= 30 else "decay",
            "loss": 8 - step / 10,
        }
        row |= {"lr": 5e-4, "tokens_per_second": 9000.0 if step % 20 else 10.0}
        if step % 20 == 0:
            row |= {"validation/code": 7 - step / 10, "validation/math": 5 - step / 10}
        rows.append(row)
    return rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of()) + '{"step": 41, "tok')
    return tmp_path


def printed(table: object) -> list[list[str]]:
    """The cells of a table's rows as they are printed."""
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in lines if "│" in line]


def test_reads_whole_lines_only(run: Path, tmp_path: Path) -> None:
    assert report.read_metrics(run) == rows_of()
    assert report.read_metrics(tmp_path / "none") == []


def test_last_validation_is_the_last_step_that_has_one() -> None:
    assert report.last_validation(rows_of()) == (40, {"code": 3.0, "math": 1.0})
    assert report.last_validation(rows_of(39)) == (20, {"code": 5.0, "math": 3.0})
    assert report.last_validation(rows_of(5)) == (0, {})


def test_phases_with_their_own_tokens_and_losses() -> None:
    assert printed(report.phase_table(rows_of())) == [
        ["stable", "30,000", "7.800", "5.100", "9,000"],
        ["decay", "10,000", "4.900", "4.000", "9,000"],
    ]


def test_sources_beside_their_unigram_entropy() -> None:
    cells = printed(report.source_table(rows_of(), {"code": 5.5, "math": 0.5}))
    assert [row[:4] for row in cells] == [
        ["code", "3.000", "5.500", "+2.500"],
        ["math", "1.000", "0.500", "-0.500"],
    ]


def test_the_report_writes_the_curve_and_names_the_files(run: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    report.print_report(console, run, Path("build/demo"), {"code": 5.5, "math": 4.5})
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = console.file.getvalue()
    assert all(str(part) in text for part in ("stable", "math", run / "loss.png", run / "checkpoints"))

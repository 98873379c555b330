"""`launch status`, `logs` and `cancel` from a run's folder alone, where no Slurm knows the job any more."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.journal import Journal
from launch.status import collect
from moe_train.cli import main
from moe_train.config import load_run
from moe_train.training.fence import Fence
from moe_train.training.run_folder import RunFolder, append_line
from tests.launch.runs import write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 40 steps that is at step 10 in its second start, at 20 dollars an hour."""
    config = load_run(write_run(tmp_path))
    folder, journal = RunFolder(config.output_dir), Journal(config.output_dir)
    journal.folder.mkdir(parents=True)
    journal.submitted({"time": "t", "job": "7", "nodes": 2, "total_tokens": 2560, "dollars_per_hour": 20.0})
    notes = journal.folder / "starts.jsonl"
    start = {"kind": "start", "job": "7", "nodes": "node[1-2]"}
    append_line(notes, {**start, "time": "2026-01-01T00:00:00.000+00:00", "restart": 0, "saved": 0})
    append_line(
        notes,
        {"kind": "end", "time": "2026-01-01T01:00:00.000+00:00", "code": 5, "reason": "a rank was lost", "saved": 8},
    )
    append_line(notes, {**start, "time": "2026-01-01T01:30:00.000+00:00", "restart": 1, "saved": 8})
    folder.start(config.to_yaml())
    for step in range(1, 11):
        line = {
            "step": step,
            "tokens": 64 * step,
            "phase": "stable",
            "loss": 4.5,
            "tokens_per_second": 16.0,
            "mfu": 0.4,
        }
        append_line(folder.metrics_path, line)
    (folder.logs / "slurm-7.out").write_text("one\ntwo\nthree\n")
    (folder.logs / "rank_00000.log").write_text("zero\n")
    return folder.path


def test_everything_is_told(folder: Path, capsys) -> None:
    assert main(["launch", "status", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "running" and found["nodes"] == "node[1-2]" and found["job"] == "7"
    assert (found["step"], found["tokens"], found["total_tokens"], found["phase"]) == (10, 640, 2560, "stable")
    assert (found["loss"], found["tokens_per_second"], found["mfu"]) == (4.5, 16.0, 0.4)
    assert [(each["code"], each["reason"], each["saved"]) for each in found["restarts"]] == [(5, "a rank was lost", 8)]
    assert (
        found["seconds_to_go"] == 120
        and found["expected_end"]
        and found["dollars_to_go"] == pytest.approx(20 * 120 / 3600)
    )
    assert found["dollars_so_far"] > 20.0
    assert main(["launch", "status", str(folder)]) == 0
    text = capsys.readouterr().out
    for words in (
        "step 10, 640 of 2.56K (25.0%), phase stable",
        "16 tokens/s, MFU 40.0%",
        "at step 8: a rank was lost",
        "in 2m",
    ):
        assert words in text, text


def test_a_run_with_max_steps_ends_there(folder: Path) -> None:
    config = RunFolder(folder).config_path
    config.write_text(config.read_text().replace("max_steps: null", "max_steps: 20"))
    found = collect(str(folder))
    assert found["total_tokens"] == 20 * 64 and found["seconds_to_go"] == 10 * 64 / 16


def test_a_start_after_the_end_is_no_restart(tmp_path: Path) -> None:
    """Of a run whose mixture was lengthened, or that somebody started again for nothing."""
    journal = Journal(tmp_path)
    for code in (5, 0, None):
        journal.note("start", saved=8)
        if code is not None:
            journal.note("end", code=code, reason="said", saved=8)
    assert [each["code"] for each in collect(str(tmp_path))["restarts"]] == [5]


def test_watch_ends_with_the_run(folder: Path, capsys) -> None:
    Journal(folder).finish(6, "crash loop: 4 failures at step 8")
    assert main(["launch", "status", str(folder), "--watch"]) == 0
    assert "failed: crash loop: 4 failures at step 8" in capsys.readouterr().out


def test_a_run_that_writes_no_more_is_lost(folder: Path) -> None:
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert collect(str(folder))["state"] == "lost"


@pytest.mark.parametrize(
    ("said", "by_hand", "state", "reason", "over"),
    [
        ("FAILED|x", False, "lost", "Slurm says that job 7 is FAILED; it left no outcome", True),
        ("FAILED|x", True, "running", "as far as its folder tells", False),
        ("CANCELLED|x", False, "stopped", "signal SIGTERM; Slurm says that job 7 is CANCELLED", True),
        ("SUSPENDED|node[1-2]", False, "suspended", None, False),
        ("SIGNALING|node[1-2]", False, "running", None, False),
        ("RESV_DEL_HOLD|(Reservation)", False, "queued", "(Reservation)", False),
        ("PENDING|(Resources)", False, "queued", "(Resources)", False),
    ],
)
def test_what_slurm_knows_is_believed(
    folder: Path, tmp_path: Path, monkeypatch, said: str, by_hand: bool, state: str, reason: str | None, over: bool
) -> None:
    """Of the job that has the folder; somebody may have started the run by hand since."""
    for name in ("sbatch", "squeue"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '7|{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Fence.take(folder, {} if by_hand else {"SLURM_JOB_ID": "7"})
    if state == "stopped":
        RunFolder(folder).finish(3, "signal SIGTERM")
    found = collect(str(folder))
    assert (found["state"], found["reason"], found["over"]) == (state, reason, over)


def test_the_launchers_reason_counts_where_it_judged_the_end(folder: Path) -> None:
    """Which made the file `stop` itself, as the time was nearly up."""
    RunFolder(folder).finish(3, "file stop")
    assert collect(str(folder))["reason"] == "file stop"
    Journal(folder).note("end", code=3, reason="saved: the time was nearly up", next="chain")
    found = collect(str(folder))
    assert (found["state"], found["reason"], found["over"]) == ("stopped", "saved: the time was nearly up", False)


def test_logs(folder: Path, capsys) -> None:
    Journal(folder).finish(0, "complete")
    for arguments, shown in (
        (["--tail", "1"], "three\n"),
        (["--follow"], "one\ntwo\nthree\n"),
        (["--rank", "0"], "zero\n"),
    ):
        assert main(["launch", "logs", str(folder), *arguments]) == 0
        assert capsys.readouterr().out == shown
    assert main(["launch", "logs", str(folder), "--rank", "5"]) == 2
    assert "has no log of rank 5; it has ranks 0 to 0" in capsys.readouterr().err


def test_logs_of_a_run_that_no_job_started(folder: Path, capsys, tmp_path: Path) -> None:
    (folder / "launch" / "jobs.jsonl").unlink()
    (folder / "logs" / "slurm-7.out").unlink()
    assert main(["launch", "logs", str(folder)]) == 0
    assert capsys.readouterr().out == "zero\n"
    assert main(["launch", "logs", str(tmp_path / "none")]) == 2
    assert "has no log yet; see moe-train launch status" in capsys.readouterr().err


def test_half_a_line_is_passed_over(folder: Path, capsys) -> None:
    for name in ("launch/jobs.jsonl", "launch/starts.jsonl", "metrics.jsonl"):
        whole = (folder / name).read_text()
        (folder / name).write_text('{"kind": "sta\n7\n' + whole)
    assert collect(str(folder))["job"] == "7" and collect(str(folder))["step"] == 10
    for verb in ("status", "logs", "cancel"):
        assert main(["launch", verb, str(folder)]) == 0, capsys.readouterr().err


def test_what_is_no_folder_of_a_run_is_told_in_one_line(folder: Path, capsys) -> None:
    for verb in ("status", "logs", "cancel"):
        assert main(["launch", verb, str(folder / "config.yaml")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for text in ('{"code": 3}', '{"code"', "[]"):
        (folder / "launch" / "over.json").write_text(text)
        assert main(["launch", "status", str(folder)]) == 2
        said = capsys.readouterr().err
        assert "over.json does not say why the run is over" in said and said.count("\n") == 1


def test_nothing_to_cancel(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["launch", "cancel", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "no job of" in said and "at work" not in said and not (folder / "stop").exists()
    Fence.take(folder, {})  # by a process that lives, whose launcher does not
    assert main(["launch", "cancel", str(folder)]) == 0
    assert f"may still be at work; touch {folder}/stop has it save and end" in capsys.readouterr().out
    assert main(["launch", "cancel", str(tmp_path / "none")]) == 2
    assert "was not submitted by moe-train launch" in capsys.readouterr().err

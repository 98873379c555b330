"""The files of a run's folder, through restarts and damage."""

from __future__ import annotations

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_train.errors import UserError
from moe_train.training.run_folder import MetricsLog, RunFolder, append_line, last_steps, now, read_metrics


def test_starts_are_numbered_and_configs_kept(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    assert not folder.holds_run and folder.read_outcome() == {}
    assert [folder.start("a: 1\n"), folder.start("a: 2\n")] == [1, 2]
    assert folder.config_path.read_text() == "a: 2\n"
    assert (folder.path / "config.1.yaml").read_text() == "a: 1\n"
    assert folder.holds_run and folder.starts == 2
    assert [event["kind"] for event in folder.read_events()] == ["start", "start"]
    assert not [name for name in os.listdir(folder.path) if name.endswith(".tmp")]


def test_the_outcome_is_open_while_the_run_is_on(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start("")
    folder.finish(0, "complete", 7)
    outcome = json.loads(folder.outcome_path.read_text())
    assert {k: outcome[k] for k in ("code", "reason", "step")} == {"code": 0, "reason": "complete", "step": 7}
    assert outcome["started"] <= outcome["ended"]
    folder.start("")
    outcome = folder.read_outcome()
    assert outcome["code"] is None and outcome["ended"] is None  # nobody takes the last start's success for this one's


def test_settle_corrects_what_the_ranks_left(tmp_path):
    folder = RunFolder(tmp_path)
    since = now()
    folder.settle(2, "no such file", since)  # failed before the folder was started
    assert folder.read_outcome()["code"] == 2
    since = now()
    folder.start("")
    with MetricsLogClosing(folder) as log:
        log.append({"step": 1})
    folder.settle(5, "rank 1 was killed by SIGKILL", since)  # left open
    outcome = folder.read_outcome()
    assert (outcome["code"], outcome["step"]) == (5, 1) and outcome["ended"]
    since = now()
    folder.start("")
    folder.finish(5, "lost the connection", 9)
    folder.settle(2, "rank 1: a mistake", since)  # rank 0 saw the echo only
    assert (folder.read_outcome()["code"], folder.read_outcome()["step"]) == (2, 9)
    before = folder.outcome_path.read_text()
    folder.settle(2, "another wording", since)
    assert folder.outcome_path.read_text() == before


def test_of_ranks_that_end_at_once_one_writes_the_outcome(tmp_path):
    folder, many = RunFolder(tmp_path), 8
    for number in range(5):
        since, together = now(), threading.Barrier(many)
        folder.start("")

        def end(rank: int, since=since, together=together) -> None:
            together.wait()
            if rank == 0:
                RunFolder(tmp_path).finish(5, "rank 0: hung", 7)
            else:
                RunFolder(tmp_path).settle(5, f"rank {rank}: hung", since)

        with ThreadPoolExecutor(many) as pool:
            list(pool.map(end, range(many)))
        ends = [event for event in folder.read_events() if event["kind"] == "end"]
        assert len(ends) == number + 1
        assert ends[-1]["reason"] == folder.read_outcome()["reason"]


class MetricsLogClosing:
    def __init__(self, folder: RunFolder):
        self.log = folder.open_metrics(0)

    def __enter__(self) -> MetricsLog:
        return self.log

    def __exit__(self, *_):
        self.log.close()


def test_a_stop_that_comes_while_the_run_loads_counts(tmp_path):
    folder = RunFolder(tmp_path)
    folder.stop_path.touch()
    folder.clear_stop()
    assert not folder.stop_requested()
    folder.stop_path.touch()
    folder.start("")
    assert folder.stop_requested()


def test_ledger(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_ledger() is None
    folder.write_ledger({"segments": [{"first_sample": 0}]})
    assert folder.read_ledger() == {"segments": [{"first_sample": 0}]}


def test_floats_keep_every_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, 2.0**-149]
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    for step, value in enumerate(values, 1):
        log.append({"step": step, "loss": value, "grad_norm": float("nan"), "mfu": None})
    log.close()
    lines = read_metrics(tmp_path / "m.jsonl")
    assert [line["loss"] for line in lines] == values
    assert lines[0]["grad_norm"] is None and "NaN" not in (tmp_path / "m.jsonl").read_text()


def write_steps(path, last, first=1, extra=""):
    log = MetricsLog(path, first - 1)
    for step in range(first, last + 1):
        log.append({"step": step, "loss": step / 7, "text": extra})
    log.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 11, "lo', b"\0" * 5000, b"not json\n", b"\n"])
def test_a_resume_leaves_each_step_once(tmp_path, torn):
    folder = RunFolder(tmp_path)
    write_steps(folder.metrics_path, 10, extra="x" * 20_000)  # several blocks of the backward reader
    with open(folder.metrics_path, "ab") as file:
        file.write(torn)
    log = folder.open_metrics(6)
    assert log.dropped == 4 + bool(torn) and log.missing == 0
    for step in range(7, 12):
        log.append({"step": step, "loss": step / 7})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 12))
    assert folder.read_events()[0]["kind"] == "metrics_repaired"


def test_a_resume_at_the_last_step_drops_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    write_steps(folder.metrics_path, 3)
    before = folder.metrics_path.read_bytes()
    folder.open_metrics(3).close()
    assert folder.metrics_path.read_bytes() == before and folder.read_events() == []


def test_a_new_run_over_old_lines_and_lost_lines(tmp_path):
    write_steps(tmp_path / "m.jsonl", 3)
    assert MetricsLog(tmp_path / "m.jsonl", 5).missing == 2
    assert MetricsLog(tmp_path / "m.jsonl", 0).dropped == 3
    assert (tmp_path / "m.jsonl").read_bytes() == b"" and last_steps(tmp_path / "m.jsonl", 1) == []


def test_a_step_twice_or_left_out_is_a_bug(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.append({"step": 1})
    for step in (1, 3):
        with pytest.raises(ValueError, match=f"metrics of step {step} after those of step 1"):
            log.append({"step": step})


def test_readers_meet_a_line_in_the_middle_of_its_write(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert [record["step"] for record in last_steps(tmp_path / "metrics.jsonl", 1)] == [2]
    assert read_metrics(tmp_path / "nothing") == []


def test_what_a_broken_disk_leaves_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n7\n{"step": 2}\n\x00\x00\n[]\n{}\n{"st')
    assert last_steps(tmp_path / "metrics.jsonl", 9) == [{"step": 1}, {"step": 2}]
    for text in ("7", "[]", "{", ""):
        (tmp_path / "outcome.json").write_text(text)
        assert RunFolder(tmp_path).read_outcome() == {}


def test_events_go_on_after_a_torn_line(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": "start"}\n{"ki')
    append_line(tmp_path / "events.jsonl", {"kind": "save"})
    assert [event["kind"] for event in RunFolder(tmp_path).read_events()] == ["start", "save"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir .* cannot be written .* choose another"):
        RunFolder(tmp_path / "file" / "run").start("")


def test_the_page_tells_every_kind_of_event():
    root = Path(__file__).parents[3]
    kinds = {
        kind
        for path in (root / "moe_train").rglob("*.py")
        for kind in re.findall(r"\.event\(\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    page = (root / "docs/architecture.md").read_text(encoding="utf-8").partition("| kind |")[2]
    told = re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\| (`.*?) \|", page)))
    assert sorted(told) == sorted(kinds)

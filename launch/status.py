"""``moe-train launch status``: how a run is, from its folder alone; Slurm is asked only what it still knows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from statistics import median
from typing import Any

from data_pipeline.units import format_count
from launch import controller
from launch.journal import Journal
from moe_train.errors import UserError
from moe_train.training.fence import owner_of
from moe_train.training.run_folder import RunFolder, last_steps, now
from moe_train.units import format_time

_SILENT_SECONDS = 300
"""A run whose metrics were written this long ago may be alive, for all that its folder tells."""
_KILLED = "killed from outside: preempted, requeued or cancelled by hand, a node failed, or the time was up"


def status(run_dir: str, *, as_json: bool = False, watch: bool = False, every: float = 10.0) -> None:
    """Print how the run in `run_dir` is; with `watch` again and again, until it is over.

    Raises UserError: there is no run.
    """
    while True:
        found = collect(run_dir)
        print(json.dumps(found) if as_json else "\n".join(lines(found)), flush=True)
        if not watch or found["over"]:
            return
        time.sleep(every)
        print()


def collect(run_dir: str) -> dict[str, Any]:
    """Everything that `status` shows, in plain units: tokens, seconds, dollars; null where it is not known."""
    folder, journal = RunFolder(run_dir), Journal(run_dir)
    jobs, starts, outcome = journal.jobs(), journal.starts(), folder.read_outcome()
    if not jobs and not starts and not outcome:
        raise UserError(f"{run_dir} holds no run; give the output_dir of one")
    metrics = last_steps(folder.metrics_path, 50)
    last = metrics[-1] if metrics else {}
    known = controller.states(journal.job_ids())
    live = {job: state for job, state in known.items() if state[0] in controller.LIVE}
    newest = jobs[-1]["job"] if jobs else None
    ended = None  # what Slurm says of it, where nothing else is at work
    owner = owner_of(folder.path)
    if newest in known and not live and (outcome.get("ended") or owner is None or owner.job == newest):
        ended = f"Slurm says that job {newest} is {known[newest][0]}"
    over = journal.over()
    launcher = journal.launcher()
    state, reason = _state(over, live, ended, starts, outcome, folder, launcher)
    job = next((job for job, (name, _) in live.items() if name == "RUNNING"), newest)
    total = _total_tokens(folder, jobs, last)
    rates = [line["tokens_per_second"] for line in metrics if line.get("tokens_per_second")]
    rate = median(rates) if rates else None
    price = next((record.get("dollars_per_hour") for record in reversed(jobs)), None)
    left = max(0, total - last["tokens"]) / rate if total and rate and last.get("tokens") else None
    starting = [record for record in starts if record["kind"] == "start"]
    return {
        "run": str(folder.path),
        "state": state,
        "reason": reason,
        "over": over is not None or ended is not None or state == "complete",
        "job": job,
        "process": launcher,
        "queue": {name: f"{word} {where}" for name, (word, where) in live.items()},
        "nodes": starting[-1].get("nodes") if starting else None,
        "step": last.get("step"),
        "tokens": last.get("tokens"),
        "total_tokens": total,
        "phase": last.get("phase"),
        "loss": last.get("loss"),
        "tokens_per_second": rate,
        "mfu": last.get("mfu"),
        "starts": len(starting),
        "restarts": list(_restarts(starts)),
        "expected_end": _after(left) if left is not None and state == "running" else None,
        "seconds_to_go": left,
        "dollars_so_far": _dollars(starts, jobs, folder, state),
        "dollars_to_go": None if price is None or left is None else price * left / 3600,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    tokens, total = found["tokens"] or 0, found["total_tokens"]
    share = f" of {format_count(total)} ({100 * tokens / total:.1f}%)" if total else ""
    rows = [
        ("run", found["run"]),
        ("state", found["state"] + (f": {found['reason']}" if found["reason"] else "")),
        ("job", ", ".join(f"{job} {state}" for job, state in found["queue"].items()) or found["job"]),
        ("process", found["process"]),
        ("nodes", found["nodes"]),
        (
            "progress",
            f"step {found['step']}, {format_count(tokens)}{share}, phase {found['phase']}" if found["step"] else None,
        ),
        ("loss", f"{found['loss']:.4f}" if found["loss"] is not None else None),
        ("speed", _speed(found)),
        (
            "ends",
            f"{found['expected_end']} (in {format_time(round(found['seconds_to_go']))})"
            if found["expected_end"]
            else None,
        ),
        ("dollars", _cost(found)),
        ("restarts", str(len(found["restarts"]))),
    ]
    text = [f"{name:<10}{value}" for name, value in rows if value is not None]
    return text + [
        f"  {each['time'][:19]}  at step {each['saved']}: {each['reason']}" for each in found["restarts"][-10:]
    ]


def _speed(found: dict[str, Any]) -> str | None:
    if not found["tokens_per_second"]:
        return None
    mfu = f", MFU {100 * found['mfu']:.1f}%" if found["mfu"] else ""
    return f"{format_count(found['tokens_per_second'])} tokens/s{mfu}"


def _cost(found: dict[str, Any]) -> str | None:
    if found["dollars_so_far"] is None:
        return None
    to_go = f", {found['dollars_to_go']:,.2f} to go" if found["dollars_to_go"] is not None else ""
    return f"{found['dollars_so_far']:,.2f} so far{to_go}"


def _state(
    over: dict | None,
    live: dict,
    ended: str | None,
    starts: list[dict],
    outcome: dict,
    folder: RunFolder,
    launcher: int | None,
) -> tuple[str, str | None]:
    if over is not None:
        return (
            ("complete", None) if over["code"] == 0 else ("stopped" if over["code"] == 3 else "failed", over["reason"])
        )
    states = {state for state, _ in live.values()}
    if states & {"RUNNING", "RESIZING", "SIGNALING", "COMPLETING", "STAGE_OUT"}:
        return "running", None
    if launcher is not None:
        return "running", None
    if states & {"SUSPENDED", "STOPPED"}:
        return "suspended", None
    if live:
        return "queued", next(where for _, where in live.values())
    if not outcome.get("ended") and ended:
        return "lost", f"{ended}; it left no outcome"
    if outcome and outcome.get("code") is None:
        if folder.metrics_path.exists() and time.time() - folder.metrics_path.stat().st_mtime < _SILENT_SECONDS:
            return "running", "as far as its folder tells"
        return "lost", "it left no outcome and writes no metrics"
    if outcome.get("code") == 0:
        return "complete", None
    if outcome:  # the launcher knows who made the file `stop`
        last = starts[-1] if starts else {}
        if last.get("kind") == "end" and last["time"] >= outcome["ended"]:
            return "stopped", last["reason"]
        return "stopped", f"{outcome['reason']}; {ended}" if ended else outcome["reason"]
    return "submitted", None


def _restarts(starts: list[dict]) -> Iterator[dict[str, Any]]:
    """One entry for each start that goes on after an unfinished one: when, and why that one had ended."""
    ended: dict[str, Any] | None = None
    began = False
    for record in starts:
        if record["kind"] == "end":
            ended = record
            continue
        if began and not (ended and ended["code"] == 0):
            reason = ended["reason"] if ended else _KILLED
            code = ended["code"] if ended else None
            yield {"time": record["time"], "saved": record.get("saved"), "code": code, "reason": reason}
        began, ended = True, None


def _dollars(starts: list[dict], jobs: list[dict], folder: RunFolder, state: str) -> float | None:
    """Hours of every start at its job's price. A start that was killed counts until the next, or to the last
    metrics."""
    prices = {record["job"]: record.get("dollars_per_hour") for record in jobs}
    if not any(price is not None for price in prices.values()):
        return None
    written = folder.metrics_path.stat().st_mtime if folder.metrics_path.exists() else None
    last = datetime.fromtimestamp(written, timezone.utc).isoformat() if written and state != "running" else now()
    total = 0.0
    for number, record in enumerate(starts):
        if record["kind"] != "start":
            continue
        following = starts[number + 1]["time"] if number + 1 < len(starts) else max(last, record["time"])
        seconds = (datetime.fromisoformat(following) - datetime.fromisoformat(record["time"])).total_seconds()
        total += (prices.get(record.get("job")) or 0.0) * seconds / 3600
    return total


def _total_tokens(folder: RunFolder, jobs: list[dict], last: dict) -> int | None:
    """Where it is complete: by the mixture as it is now (it may have been lengthened), else as it was submitted."""
    from moe_train.config import load_resolved

    try:
        return load_resolved(folder.config_path).end(last.get("step", 0), last.get("tokens", 0))
    except Exception as error:  # its files may be gone, or of another machine
        if not isinstance(getattr(error, "exit_code", None), int):
            raise
        return next((record.get("total_tokens") for record in reversed(jobs)), None)


def _after(seconds: float) -> str:
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat(timespec="seconds")

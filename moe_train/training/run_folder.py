"""The folder of a run: what was asked for, what happened, how it ended. Needs no torch; any process may read it.

    folder = RunFolder("runs/demo")
    folder.start(config.to_yaml())          # config.yaml, config.1.yaml, outcome.json (not ended yet), an event
    metrics = folder.open_metrics(step=0)   # later lines of an earlier start are cut off
    metrics.append({"step": 1, "loss": 10.4, ...})
    folder.finish(0, "complete", step=1)

One process writes: rank 0. Files are replaced by rename, so a reader never sees half of one.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moe_train.errors import UserError, warn

OUTCOME_LOCK = ".outcome.lock"
"""Who ends a start holds it: several ranks may at once, and so may the process above them."""


def now() -> str:
    """The time as the run's files have it: UTC, ISO 8601, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class RunFolder:
    """Paths and files of one run. Making the object touches nothing."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.events_path = self.path / "events.jsonl"
        self.outcome_path = self.path / "outcome.json"
        self.ledger_path = self.path / "ledger.json"
        self.stop_path = self.path / "stop"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"

    @property
    def starts(self) -> int:
        """How often the run was started so far."""
        found = [re.fullmatch(r"config\.(\d+)\.yaml", name.name) for name in self.path.glob("config.*.yaml")]
        return max((int(match[1]) for match in found if match), default=0)

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here before."""
        return self.starts > 0 or self.metrics_path.exists() or any(self.checkpoints.glob("iter_*"))

    def require_writable(self) -> None:
        """Make the folder, before anything else is tried. Raises UserError where it cannot be written."""
        probe = self.path / f".writable.{os.getpid()}"
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            probe.unlink(missing_ok=True)
            raise UserError(
                f"output_dir {self.path} cannot be written ({error.strerror}); repair that, or choose another"
            ) from None

    def start(self, config_yaml: str, earlier: int = 0) -> int:
        """Begin a start of the run and return its number, from 1; `earlier`: starts that the folder may not know of.

        Writes the resolved config, and marks the outcome as open (code null) so that nobody believes the one of an
        earlier start.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            number = max(self.starts, earlier) + 1
            write_atomically(self.path / f"config.{number}.yaml", config_yaml)
            write_atomically(self.config_path, config_yaml)
            self._write_outcome(None, "running", None, now(), None)
            self.event("start", start=number)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written ({error.strerror}); choose another") from error
        return number

    def finish(self, code: int, reason: str, step: int | None = None) -> None:
        """End this start: outcome.json with its status, and an event. The first process that ends it has said it: later
        ones do not."""
        with locked(self.path / OUTCOME_LOCK):
            outcome = self.read_outcome()
            if not outcome.get("ended"):
                self._end(code, reason, outcome, step)

    def settle(self, code: int, reason: str, since: str) -> None:
        """What the process above the ranks does at the end: make outcome.json say what really came back.

        Args:
            since: `now()` from before the ranks were started. An outcome older than that is of an earlier start.

        A start whose ranks were killed left its outcome open; one whose first rank saw only the echo of another
        rank's error has the wrong code. An outcome that agrees on the code stays as it is, also where several ranks
        come at once.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # there is no folder to say it in
        with locked(self.path / OUTCOME_LOCK):
            outcome = self.read_outcome()
            if (outcome.get("started") or "") < since:
                outcome = {"started": since}
            if outcome.get("code") != code or not outcome.get("ended"):
                self._end(code, reason, outcome)

    def _end(self, code: int, reason: str, outcome: Mapping[str, Any], step: int | None = None) -> None:
        step = outcome.get("step") if step is None else step
        if step is None:
            step = next((record["step"] for record in last_steps(self.metrics_path, 1)), None)
        self._write_outcome(code, reason, step, outcome.get("started") or now(), now())
        self.event("end", step, code=code, reason=reason)

    def ended_since(self, since: str) -> bool:
        """Whether a start that began at ``since`` or later has left its outcome."""
        outcome = self.read_outcome()
        return bool(outcome.get("ended")) and outcome["started"] >= since

    def read_outcome(self) -> dict[str, Any]:
        """{code, reason, step, started, ended}, code and ended null while the run is on; empty before the first
        start."""
        try:
            outcome = json.loads(self.outcome_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return outcome if isinstance(outcome, dict) else {}

    def event(self, kind: str, step: int | None = None, **details: Any) -> None:
        """Append {time, step, kind, ...} to events.jsonl; on stderr where a full disk does not take it."""
        record = {"time": now(), "step": step, "kind": kind, **details}
        try:
            append_line(self.events_path, record)
        except OSError as error:
            warn(f"{self.events_path} cannot be written ({error.strerror}): {_encode(record).decode().strip()}")

    def read_events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first."""
        return read_lines(self.events_path)

    def open_metrics(self, step: int) -> MetricsLog:
        """metrics.jsonl, to go on after `step` (0 for a new run): later lines and a torn last one are cut off."""
        log = MetricsLog(self.metrics_path, step)
        if log.dropped or log.missing:
            self.event("metrics_repaired", step, dropped=log.dropped, missing=log.missing)
        return log

    def stop_requested(self) -> bool:
        """Whether somebody touched `stop`."""
        return self.stop_path.exists()

    def clear_stop(self) -> None:
        """Remove the `stop` that an earlier start obeyed: the first thing that a start, or its submission, does,
        so that one that comes while it loads or waits still counts."""
        try:
            self.stop_path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.stop_path} cannot be removed ({error.strerror}); remove it, or choose another output_dir"
            ) from error

    def write_ledger(self, ledger: Mapping[str, Any]) -> None:
        """Replace ledger.json."""
        write_atomically(self.ledger_path, json.dumps(ledger, indent=1) + "\n")

    def read_ledger(self) -> dict[str, Any] | None:
        """ledger.json, or None where there is none yet."""
        if not self.ledger_path.exists():
            return None
        return json.loads(self.ledger_path.read_text(encoding="utf-8"))

    def _write_outcome(self, code: int | None, reason: str, step: int | None, started: str, ended: str | None) -> None:
        outcome = {"code": code, "reason": reason, "step": step, "started": started, "ended": ended}
        text = json.dumps(outcome, indent=1) + "\n"
        try:
            write_atomically(self.outcome_path, text)
        except OSError:
            # A full disk still takes what goes where something was: launchers must not believe what it said before.
            try:
                self.outcome_path.write_text(text, encoding="utf-8")
            except OSError as error:
                warn(f"{self.outcome_path} cannot be written ({error.strerror}): {json.dumps(outcome)}")


class MetricsLog:
    """metrics.jsonl: one line an optimizer step, each step once, floats in full precision.

    Args:
        step: the last step that counts; lines after it belong to a part of the run that is about to be computed again.
    """

    def __init__(self, path: Path | str, step: int):
        self.path = Path(path)
        self.step = step
        self.dropped, kept = _cut_after(self.path, step)
        self.missing = step - kept
        """Steps at the end that have no line: the file was lost, or not on disk when the machine went down."""
        self.failure: str | None = None
        """Why the last lines are not in the file (a full disk); they are kept, and written as soon as it takes them."""
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = os.fstat(self._file).st_size
        self._waiting = bytearray()

    def append(self, line: Mapping[str, Any]) -> None:
        """Write the line of the next step. Figures that are not finite become null.

        Raises:
            ValueError: `line["step"]` is not the step after the last one.
        """
        if line["step"] != self.step + 1:
            raise ValueError(f"metrics of step {line['step']} after those of step {self.step}")
        self._waiting += _encode(line)
        self.step += 1
        self._write()

    def sync(self) -> None:
        """Bring all lines to the disk; before a checkpoint is committed, so that its steps are never missing."""
        self._write()
        try:
            os.fsync(self._file)
        except OSError as error:
            self.failure = error.strerror

    def close(self) -> None:
        """Sync and close."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def _write(self) -> None:
        try:
            _write_all(self._file, bytes(self._waiting))
        except OSError as error:
            os.ftruncate(self._file, self._end)  # half a line is no record
            self.failure = error.strerror
            return
        self._end += len(self._waiting)
        self._waiting.clear()
        self.failure = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process that holds it: none is ever stale. Where there can be none (some file
    systems, a full disk), without."""
    file = None
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a run's folder; a torn last line is left out."""
    path = Path(path)
    return read_lines(path / "metrics.jsonl" if path.is_dir() else path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that may be in the middle of being written; none if it is not there. What is no
    record, as half a line that a full disk left, is passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    records = []
    for line in lines[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records += [record] if isinstance(record, dict) else []
    return records


def last_steps(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` records of a metrics.jsonl, in order; reads its end only, and passes over what is no record of a
    step."""
    found = []
    for _, line in _lines_backwards(path):
        if _step_of(line) is not None:
            found.append(json.loads(line))
        if len(found) == count:
            break
    return found[::-1]


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of JSON, after a newline if the file ends in the middle of a line."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        if torn:  # half a line is no record: take it away rather than leave what no reader can parse
            whole = next((end for end, _ in _lines_backwards(path)), 0)
            os.ftruncate(file, whole)
        _write_all(file, _encode(record))
    finally:
        os.close(file)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see the old content or the new, also after a power loss."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _cut_after(path: Path, step: int) -> tuple[int, int]:
    """Truncate after the last line of a step <= `step`. Returns how many lines went, and the last step that is left (0:
    none).

    Cutting at the end of a line is atomic, and a file of a million lines is not copied at each start.
    """
    if not path.exists():
        return 0, 0
    dropped, kept, end = 0, 0, 0
    size = path.stat().st_size
    for line_end, line in _lines_backwards(path):
        found = _step_of(line)
        if found is not None and found <= step:
            kept, end = found, line_end
            break
        dropped += 1
    with open(path, "rb") as file:
        file.seek(max(size - 1, 0))
        torn = size > 0 and file.read(1) != b"\n"
    if end < size:
        os.truncate(path, end)
    return dropped + torn, kept


def _lines_backwards(path: Path, block: int = 1 << 16):
    """Whole lines from the last to the first, each with the offset after its newline."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        tail, end = b"", None  # bytes before `end`, which is the offset after a newline
        while True:
            cut = tail.rfind(b"\n", 0, -1) if end is not None else tail.rfind(b"\n")
            if cut >= 0:
                if end is None:
                    tail, end = tail[: cut + 1], position + cut + 1
                else:
                    yield end, tail[cut + 1 :]
                    tail, end = tail[: cut + 1], position + cut + 1
                continue
            if position == 0:
                break
            read = min(block, position)
            position -= read
            file.seek(position)
            tail = file.read(read) + tail
        if end is not None and tail:
            yield end, tail


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _encode(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """What JSON can hold: scalars of numpy and torch as numbers, what is not finite as null (JSON has no NaN)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

"""What the experiments share: run many small runs one after the other, and read what they left behind.

Each run is `moe-train pretrain RUN.yaml a.b=c ...` on one CPU core, in a process forked after the imports, which are
slower than a run's first steps. A run that is complete is not run again. CORPORA is a folder with the corpora and
`tok.model`:

    make demo                                        # leaves the texts in build/demo/raw
    moe-train tokenizer train build/demo/raw/*.jsonl --out $CORPORA/tok --vocab-size 1024
    for s in code prose math reference; do
        moe-train prepare build/demo/raw/$s.jsonl --out $CORPORA/$s --tokenizer $CORPORA/tok.model
    done
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path

RUNS = Path(os.environ.get("RUNS", "build/experiments"))


def command_line() -> argparse.ArgumentParser:
    """What an experiment is asked to ``do``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("do", choices=["run", "report"], help="train, into RUNS; or write data.csv and figure.png")
    return parser


def run_all(runs: dict[str, list[str]], file: Path, tokens: int, order: int = 1234) -> None:
    """Every run of ``runs``, over so many tokens in this order: its name (of its folder below RUNS) -> what it sets in
    ``file``."""
    RUNS.mkdir(parents=True, exist_ok=True)
    os.environ.update(TOKENS=str(tokens), ORDER=str(order))
    for name, overrides in runs.items():
        outcome = RUNS / name / "outcome.json"
        if outcome.exists() and json.loads(outcome.read_text())["code"] == 0:
            continue
        began = time.monotonic()
        code = fork("pretrain", str(file), f"output_dir={RUNS / name}", *overrides)
        print(f"{name}: status {code}, {time.monotonic() - began:.0f} s", flush=True)
        if code:
            sys.exit(code)


def fork(*arguments: str) -> int:
    """`moe-train` with these arguments in a child process, which is a rank of its own; its exit status."""
    import moe_train.training.loop  # noqa: F401  megatron-core, before the fork
    import parallel.engine  # noqa: F401
    from moe_train.cli import main
    from parallel.rank_env import free_port

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
        log = os.open(RUNS / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines(name: str) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text().splitlines()]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def read_csv(path: Path) -> list[dict]:
    """Rows with numbers where they are numbers."""

    def value(text: str):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]

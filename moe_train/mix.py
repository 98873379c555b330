"""`moe-train mix`: what a mixture will feed, what a run has consumed, how two differ. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.yaml_marks import read_yaml
from moe_train.config_file import find_config, shown
from moe_train.errors import UserError
from moe_train.training.run_folder import last_steps

if TYPE_CHECKING:
    from data_pipeline.ledger import Ledger


def mix(path: str, *, as_json: bool = False, history: bool = False, against: str | None = None) -> None:
    """Print tables about `path`: a mixture file, a run file (or the name of a preset), or a run's folder.

    Args:
        as_json: one JSON object instead of tables.
        history: of a run's folder (or the folder that a run file names), what it has consumed so far.
        against: another of the same kinds, to compare with.

    Raises an error with ``exit_code`` 2, one line: a missing file or corpus, a mistake in a file, no history.
    """
    from data_pipeline import report

    if history and against is not None:
        raise UserError("--history and --against are two questions: ask one at a time")
    if against is not None:
        rows = report.difference(_planned(path), _planned(against))
        if as_json:
            print(json.dumps({"from": path, "to": against, "sources": rows}))
        else:
            print(report.as_text([report.render_difference(rows, path, against)]))
        return
    if history:
        ledger, position = _history(path)
        table = report.mix_table(ledger, position)
        tables = [*report.render_mix(table), report.render_segments(table)]
    else:
        table = report.mix_table(_planned(path))
        tables = report.render_mix(table)
    print(json.dumps(table) if as_json else report.as_text(tables))


def _planned(path: str) -> Ledger:
    """The ledger of a run's folder, or the one that a new run of a file would have."""
    from data_pipeline.mixture import load_mixture
    from data_pipeline.report import plan

    if Path(path).is_dir():
        return _ledger_of(Path(path))
    file = _find(path)
    if _is_mixture(file):
        return plan(load_mixture(file))
    from moe_train.config import load_run

    config = load_run(file)
    return plan(config.mixture, config.model.vocab_size)


def _is_mixture(file: str) -> bool:
    data = read_yaml(file).data
    return isinstance(data, dict) and ("phases" in data or "sources" in data)


def _find(path: str) -> str:
    try:
        return shown(find_config(path, "run", Path.cwd()))
    except UserError:
        return shown(find_config(path, "data", Path.cwd()))


def _history(path: str) -> tuple[Ledger, int]:
    """The ledger of a run and the samples that its steps have consumed."""
    folder = Path(path)
    if not folder.is_dir():
        from moe_train.config import load_run

        if _is_mixture(_find(path)):
            raise UserError(f"{path} is a mixture, and --history is a run's: name its folder or its run file")
        folder = Path(load_run(path, with_mixture=False).output_dir)
    ledger = _ledger_of(folder)
    tokens = next((record["tokens"] for record in last_steps(folder / "metrics.jsonl", 1)), 0)
    return ledger, tokens // ledger.sequence_length


def _ledger_of(folder: Path) -> Ledger:
    from data_pipeline.ledger import Ledger

    file = folder / "ledger.json"
    if not file.is_file():
        raise UserError(f"{shown(folder)} has no ledger.json: no run was started there; name a run's folder")
    return Ledger.from_json(file.read_bytes())

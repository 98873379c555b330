"""The runs that a law is fitted to: a CSV, or run folders with their metrics.jsonl."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from moe_train.errors import UserError

COLUMNS = {
    "params": ("params", "active_params", "model size", "n"),
    "tokens": ("tokens", "d"),
    "flops": ("flops", "training flop", "c"),
    "loss": ("loss", "l"),
    "sparsity": ("sparsity", "s"),
    "total_params": ("total_params",),
}
"""What a CSV's columns may be called, in any case. Of tokens and flops one is enough: C = 6 N D."""

TAIL = 0.02
"""Part of a run's last steps whose mean loss is its final loss."""


@dataclass(frozen=True)
class Run:
    """One trained model. `params` are the parameters that a token uses, `total_params` all of them."""

    name: str
    params: float
    tokens: float
    loss: float
    total_params: float
    sparsity: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    """(tokens, smoothed loss) along the run, where it is known."""

    @property
    def flops(self) -> float:
        return 6 * self.params * self.tokens


def load_runs(paths: list[str], drop_highest: int = 0) -> list[Run]:
    """All runs of CSV files and run folders, without the `drop_highest` of highest loss.

    Raises UserError, one line that names the file (and its line), for anything that is not a run.
    """
    runs: list[Run] = []
    for path in map(Path, paths):
        if path.is_dir():
            runs.append(_from_folder(path))
        elif path.suffix == ".csv" and path.is_file():
            runs += _from_csv(path)
        else:
            raise UserError(f"{path} is neither a run's folder nor a .csv file with params, tokens and loss")
    runs.sort(key=lambda run: run.loss)
    return runs[: len(runs) - drop_highest] if drop_highest else runs


def _from_csv(path: Path) -> list[Run]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a spreadsheet puts a mark in front
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV in UTF-8 ({error}); save it as one") from None
    if not rows:
        raise UserError(f"{path} holds no runs")
    names = {(name or "").strip().lower(): name for name in rows[0]}
    found = {key: next((names[other] for other in others if other in names), None) for key, others in COLUMNS.items()}
    if not found["params"] or not found["loss"] or not (found["tokens"] or found["flops"]):
        raise UserError(
            f"{path}:1: needs the columns params, loss and one of tokens and flops; it has {', '.join(names)}"
        )
    runs = []
    for line, row in enumerate(rows, start=2):
        value = {key: _number(row[name], path, line, name) for key, name in found.items() if name}
        sparsity = value.pop("sparsity", 0.0)
        if min(value.values()) <= 0 or not 0 <= sparsity < 1:
            raise UserError(
                f"{path}:{line}: {', '.join(value)} must be more than 0, and sparsity from 0 to less than 1"
            )
        if sparsity and "total_params" not in value:
            raise UserError(
                f"{path}:{line}: sparsity {sparsity:g} needs a column total_params: params are those that a token uses"
            )
        tokens = value["tokens"] if "tokens" in value else value["flops"] / (6 * value["params"])
        total = value.get("total_params", value["params"])
        runs.append(Run(f"{path.name}:{line}", value["params"], tokens, value["loss"], total, sparsity))
    return runs


def _number(text: str | None, path: Path, line: int, column: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}:{line}: {column} is not a number: {text!r}")
    return value


def _from_folder(folder: Path) -> Run:
    from data_pipeline.yaml_marks import Document, read_yaml, validate
    from moe_train.model.config import ModelConfig
    from moe_train.training.run_folder import RunFolder

    config, metrics, outcome = (folder / name for name in ("config.yaml", "metrics.jsonl", "outcome.json"))
    if not (config.is_file() and metrics.is_file() and outcome.is_file()):
        raise UserError(f"{folder} is not a run's folder: it needs config.yaml, metrics.jsonl and outcome.json")
    ended = RunFolder(folder).read_outcome()
    if ended.get("code") != 0:
        reason = " ".join(str(ended.get("reason", "outcome.json cannot be read")).split())  # a bug's has lines
        raise UserError(f"{folder} is not a complete run: finish it, or leave it out ({reason})")
    data = read_yaml(str(config)).data
    if not isinstance(data, dict) or "model" not in data:
        raise UserError(f"{config} has no section model")
    model = validate(ModelConfig, Document(data["model"], {}))
    try:
        steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        points = [(float(step["tokens"]), float(step["loss"])) for step in steps if step["loss"] is not None]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{metrics} is not a metrics.jsonl: a line has no tokens or loss") from None
    if len(points) < 10:
        raise UserError(f"{metrics} holds {len(points)} steps; a run to fit needs at least 10")
    curve = smoothed(points)
    tail = points[-max(1, round(TAIL * len(points))) :]
    return Run(
        name=str(folder),
        params=model.num_active_parameters(),
        tokens=points[-1][0],
        loss=sum(loss for _, loss in tail) / len(tail),
        total_params=model.num_parameters(),
        sparsity=model.mlp.sparsity,
        curve=curve,
    )


def smoothed(points: list[tuple[float, float]], width: float = 0.05) -> tuple[tuple[float, float], ...]:
    """Running means of the losses over windows of `width` of the steps, at the tokens of their middles."""
    window = max(1, round(width * len(points)))
    result, total = [], 0.0
    for index, (_, loss) in enumerate(points):
        total += loss
        if index >= window:
            total -= points[index - window][1]
        if index + 1 >= window:
            result.append((points[index - window // 2][0], total / window))
    return tuple(result)


def with_curves(runs: list[Run]) -> list[Run]:
    """The runs that have a curve; rows of one size in a CSV are taken as points of one curve."""
    result = [run for run in runs if run.curve]
    by_size: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        if not run.curve:
            by_size.setdefault((round(math.log(run.params), 2), run.sparsity), []).append(run)
    for group in by_size.values():
        if len(group) >= 3:
            points = tuple(sorted((run.tokens, run.loss) for run in group))
            result.append(replace(group[0], curve=points))
    return result

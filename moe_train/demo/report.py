"""What the demo shows when its run has ended: tables, a loss curve, where the files are. Reads files only: no
torch."""

from __future__ import annotations

import json
import math
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

VALIDATION = "validation/"  # the prefix of the keys of metrics.jsonl that hold a source's held-out loss

Row = dict[str, Any]


def read_metrics(run: Path) -> list[Row]:
    """The lines of the run's `metrics.jsonl`, one a step; an unfinished last line is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def last_validation(rows: list[Row]) -> tuple[int, dict[str, float]]:
    """(step, held-out loss by source in nats per token) of the last step that was validated; (0, {}) when
    none was."""
    for row in reversed(rows):
        losses = {key.removeprefix(VALIDATION): row[key] for key in row if key.startswith(VALIDATION)}
        if losses:
            return row["step"], losses
    return 0, {}


def phase_table(rows: list[Row]) -> Table:
    """Training loss by phase: the mean of its first and of its last tenth of steps."""
    table = Table("phase", title="Training loss, nats per token", title_justify="left")
    for heading in ("tokens", "at its start", "at its end", "tokens/s"):
        table.add_column(heading, justify="right")
    before = 0
    for phase, group in groupby(rows, key=lambda row: row["phase"]):
        steps = list(group)
        tenth = max(1, len(steps) // 10)
        first, last = (fmean(row["loss"] for row in part) for part in (steps[:tenth], steps[-tenth:]))
        tokens, before = steps[-1]["tokens"] - before, steps[-1]["tokens"]
        speed = median(row["tokens_per_second"] for row in steps)  # the mean would count saves and validations
        table.add_row(str(phase), f"{tokens:,}", f"{first:.3f}", f"{last:.3f}", f"{speed:,.0f}")
    return table


def source_table(rows: list[Row], entropies: dict[str, float]) -> Table:
    """Held-out loss by source beside what guessing by frequency alone would cost.

    Args:
        entropies: the entropy of each source's unigram distribution, nats per token.
    """
    step, losses = last_validation(rows)
    table = Table("source", title=f"Held-out text after step {step}, nats per token", title_justify="left")
    for heading in ("loss", "unigram entropy", "below it by", "perplexity"):
        table.add_column(heading, justify="right")
    for source, loss in losses.items():
        entropy = entropies.get(source, math.nan)
        below = f"{entropy - loss:+.3f}"
        table.add_row(source, f"{loss:.3f}", f"{entropy:.3f}", below, f"{math.exp(loss):,.1f}")
    return table


def plot_losses(rows: list[Row], path: Path) -> None:
    """A PNG of the losses over tokens: training, held-out points by source, phases, and the learning rate on
    the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [row["tokens"] / 1e6 for row in rows]
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    axis.plot(tokens, [row["loss"] for row in rows], color="C0", linewidth=0.9, label="training")
    _plot_validation(axis, rows)
    for previous, row in pairwise(rows):
        if row["phase"] != previous["phase"]:
            axis.axvline(previous["tokens"] / 1e6, color="0.4", linestyle="--", linewidth=0.8)
            axis.annotate(
                f" {row['phase']}",
                (previous["tokens"] / 1e6, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=8,
            )
    axis.set(
        xlabel="tokens, millions",
        ylabel="loss, nats per token",
        title="Demo: loss over tokens",
        xlim=(0, None),
    )
    axis.grid(alpha=0.25)

    rate = axis.twinx()
    rate.plot(tokens, [row["lr"] for row in rows], color="0.6", linewidth=0.9, label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles = [handle for each in (axis, rate) for handle in each.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_validation(axis: Any, rows: list[Row]) -> None:
    sources = sorted({key for row in rows for key in row if key.startswith(VALIDATION)})
    for number, source in enumerate(sources, start=1):
        points = [row for row in rows if source in row]
        name = source.removeprefix(VALIDATION)
        axis.plot(
            [row["tokens"] / 1e6 for row in points],
            [row[source] for row in points],
            color=f"C{number}",  # C0 is the training loss
            marker="o",
            markersize=3,
            linewidth=0.7,
            label=f"held-out {name}",
        )


def print_report(console: Console, run: Path, build: Path, entropies: dict[str, float]) -> None:
    """Print the tables of a run that has trained at least one step, write its `loss.png` and say where all
    is."""
    rows = read_metrics(run)
    plot_losses(rows, run / "loss.png")
    console.print()
    console.print(phase_table(rows))
    console.print()
    console.print(source_table(rows, entropies))
    console.print()
    files = Table.grid(padding=(0, 2))
    for what, path in (
        ("text", build / "raw"),
        ("tokens", build / "*.bin"),
        ("checkpoints", run / "checkpoints"),
        ("metrics", run / "metrics.jsonl"),
        ("loss curve", run / "loss.png"),
    ):
        files.add_row(what, str(path))
    console.print(files)

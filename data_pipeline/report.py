"""Tables about a mixture: what will be fed, what was fed, how two differ. Data for JSON first, then rich."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from data_pipeline.ledger import Consumption, Ledger
from data_pipeline.mixture import MixtureConfig
from data_pipeline.sources import open_sources
from data_pipeline.units import format_count

if TYPE_CHECKING:
    from rich.table import Table


def plan(mixture: MixtureConfig, vocab_size: int | None = None) -> Ledger:
    """The ledger that a new run with `mixture` would have; every error of the data comes up here."""
    return Ledger.start(mixture, open_sources(mixture, vocab_size))


def mix_table(ledger: Ledger, position: int | None = None) -> dict[str, Any]:
    """What a run is fed, by phase and source.

    Args:
        position: the number of samples fed so far; with it every row has ``consumed_tokens`` and
            ``consumed_epochs`` as well.

    Returns:
        ``{sequence_length, samples, tokens, seed, phases: [{name, samples, tokens, sources: [row]}], sources:
        [row]}`` where a row is ``{source, weight, samples, tokens, share, epochs}``: `weight` is the
        normalised weight asked for (in a phase), `share` the part of the tokens. An edited phase has the
        weights of its latest segment.
    """
    rows, fed = ledger.consumed(), None if position is None else ledger.consumed(position)
    weights = {segment.phase: segment.config.normalised() for segment in ledger.segments}
    phases = []
    for name in dict.fromkeys(row.phase for row in rows):
        part = _rows(
            ledger,
            (row for row in rows if row.phase == name),
            fed and [row for row in fed if row.phase == name],
        )
        for row in part:
            row["weight"] = weights[name].get(row["source"], 0.0)
        phases.append({"name": name, "samples": _sum(part, "samples"), "tokens": _sum(part, "tokens"), "sources": part})
    table = {
        "sequence_length": ledger.sequence_length,
        "seed": ledger.mixture.seed,
        "samples": ledger.num_samples,
        "tokens": ledger.num_samples * ledger.sequence_length,
        "phases": phases,
        "sources": _rows(ledger, rows, fed),
    }
    if position is not None:
        table["position"] = {
            "samples": position,
            "tokens": position * ledger.sequence_length,
            "phase": _phase(ledger, position),
        }
        table["segments"] = [_segment(ledger, number) for number in range(len(ledger.segments))]
    return table


def _phase(ledger: Ledger, position: int) -> str:
    return ledger.segments[ledger.segment_at(min(position, ledger.num_samples - 1))].phase


def _segment(ledger: Ledger, number: int) -> dict[str, Any]:
    segment = ledger.segments[number]
    skipped = sum(last - first for first, last in segment.skipped)
    weights = segment.config.normalised()
    return {
        "first_sample": segment.first_sample,
        "phase": segment.phase,
        "weights": weights,
        "skipped_samples": skipped,
    }


def _rows(ledger: Ledger, rows: Iterable[Consumption], fed: Iterable[Consumption] | None) -> list[dict[str, Any]]:
    samples, done = _by_source(rows), None if fed is None else _by_source(fed)
    names = [*ledger.mixture.sources, *sorted(set(samples) - set(ledger.mixture.sources))]
    total = sum(samples.values())
    table = []
    for name in names:
        if name not in samples:
            continue
        row = {
            "source": name,
            **_amounts(ledger, name, samples[name]),
            "share": samples[name] / total if total else 0.0,
        }
        if done is not None:
            row |= {f"consumed_{key}": value for key, value in _amounts(ledger, name, done.get(name, 0)).items()}
        table.append(row)
    return table


def _amounts(ledger: Ledger, name: str, samples: int) -> dict[str, Any]:
    return {
        "samples": samples,
        "tokens": samples * ledger.sequence_length,
        "epochs": samples / ledger.windows[name],
    }


def _by_source(rows: Iterable[Consumption]) -> dict[str, int]:
    total: dict[str, int] = {}
    for row in rows:
        total[row.source] = total.get(row.source, 0) + row.samples
    return total


def _sum(rows: list[dict[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows)


def difference(ledger: Ledger, other: Ledger) -> list[dict[str, Any]]:
    """Rows ``{source, tokens, other_tokens, difference}``, largest change first."""
    here = {row["source"]: row["tokens"] for row in mix_table(ledger)["sources"]}
    there = {row["source"]: row["tokens"] for row in mix_table(other)["sources"]}
    rows = [
        {
            "source": name,
            "tokens": here.get(name, 0),
            "other_tokens": there.get(name, 0),
            "difference": there.get(name, 0) - here.get(name, 0),
        }
        for name in dict.fromkeys([*here, *there])
    ]
    return sorted(rows, key=lambda row: -abs(row["difference"]))


def render_mix(table: dict[str, Any]) -> list[Table]:
    """rich tables of `mix_table`: one a phase, and one of the whole run if there are several."""
    history = "position" in table
    tables = []
    for phase in table["phases"]:
        title = f"{phase['name']}: {format_count(phase['tokens'])} tokens, {phase['samples']:,} samples"
        tables.append(_rendered(title, phase["sources"], history))
    if len(tables) > 1:
        title = f"whole run: {format_count(table['tokens'])} tokens, {table['samples']:,} samples"
        tables.append(_rendered(title, table["sources"], history))
    return tables


def _rendered(title: str, rows: list[dict[str, Any]], history: bool) -> Table:
    weighted = any("weight" in row for row in rows)
    columns = ["weight"] * weighted + ["tokens", "share", "epochs"] + ["consumed", "epochs so far", "to come"] * history
    result = _table(title, "source", *columns)
    for row in rows:
        cells = [f"{row['weight']:.4f}"] if weighted else []
        cells += [format_count(row["tokens"]), f"{row['share']:.2%}", f"{row['epochs']:.3f}"]
        if history:
            cells += [format_count(row["consumed_tokens"]), f"{row['consumed_epochs']:.3f}"]
            cells += [format_count(row["tokens"] - row["consumed_tokens"])]
        result.add_row(row["source"], *cells)
    return result


def render_segments(table: dict[str, Any]) -> Table:
    """rich table of the ledger's segments, of a `mix_table` with a position."""
    result = _table("segments", "phase", "from sample", "from token", "skipped samples", "weights")
    for segment in table["segments"]:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in segment["weights"].items())
        first = segment["first_sample"]
        tokens = format_count(first * table["sequence_length"])
        result.add_row(segment["phase"], f"{first:,}", tokens, f"{segment['skipped_samples']:,}", weights)
    return result


def render_difference(rows: list[dict[str, Any]], name: str, other: str) -> Table:
    """rich table of `difference`."""
    result = _table("tokens by source", "source", name, other, "difference")
    for row in rows:
        sign = "+" if row["difference"] > 0 else ""
        amounts = [
            format_count(row["tokens"]),
            format_count(row["other_tokens"]),
            sign + format_count(row["difference"]),
        ]
        result.add_row(row["source"], *amounts)
    return result


def planned(ledger: Ledger) -> str:
    """The tables of `render_mix` as text, for a terminal or a log."""
    return as_text(render_mix(mix_table(ledger)))


def as_text(tables: Iterable[Table], width: int | None = None) -> str:
    """rich tables as plain text, as wide as they need to be (or `width`)."""
    from rich.console import Console

    tables = list(tables)
    console = Console(width=width or 200, color_system=None)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table(title: str, first: str, *columns: str) -> Table:
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column(first)
    for column in columns:
        result.add_column(column, justify="left" if column == "weights" else "right")
    return result

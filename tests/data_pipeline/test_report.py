"""Tables about a mixture: the figures are the ledger's, and add up."""

from __future__ import annotations

import json

import pytest

from data_pipeline.ledger import Ledger
from data_pipeline.report import (
    as_text,
    difference,
    mix_table,
    plan,
    planned,
    render_difference,
    render_mix,
    render_segments,
)
from data_pipeline.sources import open_sources

PHASES = [
    {"name": "one", "tokens": 16 * 300, "weights": {"a": 3, "b": 1}},
    {"name": "two", "tokens": 16 * 100, "weights": {"a": 1, "b": 1}},
]


def test_figures_of_a_mixture(make_mixture) -> None:
    table = json.loads(json.dumps(mix_table(plan(make_mixture(PHASES, a=2000, b=700)))))
    assert (table["samples"], table["tokens"]) == (400, 6400)
    one, two = table["phases"]
    assert [(row["source"], row["weight"], row["samples"]) for row in one["sources"]] == [
        ("a", 0.75, 225),
        ("b", 0.25, 75),
    ]
    assert sum(row["tokens"] for row in two["sources"]) == two["tokens"] == 1600
    total = {row["source"]: row for row in table["sources"]}
    assert total["a"]["samples"] == 275 and total["b"]["share"] == pytest.approx(125 / 400)
    assert total["b"]["epochs"] == pytest.approx(125 / (699 // 16))
    assert "position" not in table


def test_history(make_mixture) -> None:
    mixture = make_mixture(PHASES, a=2000, b=700)
    edited = make_mixture([PHASES[0], PHASES[1] | {"weights": {"b": 1}}], a=2000, b=700)
    sources = open_sources(mixture)
    ledger = Ledger.start(mixture, sources).resume(edited, sources, 320).skip(10, 20)
    table = json.loads(json.dumps(mix_table(ledger, position=320)))
    assert table["position"] == {"samples": 320, "tokens": 5120, "phase": "two"}
    assert [segment["first_sample"] for segment in table["segments"]] == [0, 300, 320]
    assert table["segments"][0]["skipped_samples"] == 10
    assert sum(row["consumed_samples"] for row in table["sources"]) == 320
    two = table["phases"][1]["sources"]
    assert [(row["source"], row["consumed_samples"], row["samples"]) for row in two] == [
        ("a", 10, 10),
        ("b", 10, 90),
    ]
    text = as_text([*render_mix(table), render_segments(table)])
    for part in ("one: 4.8K tokens, 300 samples", "epochs so far", "to come", "whole run", "b 1"):
        assert part in text


def test_text_and_difference(make_mixture) -> None:
    here = plan(make_mixture(PHASES, a=2000, b=700))
    there = plan(make_mixture([PHASES[0] | {"weights": {"a": 1, "c": 3}}], a=2000, c=900))
    assert "75.00%" in planned(here) and "0.7500" in planned(here)
    rows = difference(here, there)
    assert rows == [
        {"source": "c", "tokens": 0, "other_tokens": 3600, "difference": 3600},
        {"source": "a", "tokens": 4400, "other_tokens": 1200, "difference": -3200},
        {"source": "b", "tokens": 2000, "other_tokens": 0, "difference": -2000},
    ]
    assert "+3.6K" in as_text([render_difference(rows, "here.yaml", "there.yaml")])

"""config.yaml of a run's folder: what is written there is what comes back, whatever became of the files it names."""

from __future__ import annotations

from pathlib import Path

import yaml

from moe_train.config import load_resolved, load_run
from moe_train.training.config import LoggingConfig, WandbConfig
from tests.integration.runs import write_corpora

WORDS = ["5e-4", "1E5", ".5e3", "08", "1_000", "-0", "007", "12:30", "yes", "on", "null", "~", "=", ".nan", "0x1f"]
WORDS += ["a: b", "# a", " a ", "a\nb", "- a", "2026-01-01", "<<", "'", '"', "é", "a" * 200 + " b", "jetmoe_8b"]


def test_text_comes_back_as_text(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    plain = load_run(tmp_path / "run.yaml")
    for word in WORDS:
        config = plain.model_copy(update={"logging": LoggingConfig(wandb=WandbConfig(name=word))})
        (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        assert load_resolved(tmp_path / "config.yaml") == config, word
        # Nor do other programs take it for something else.
        assert yaml.safe_load(config.to_yaml())["logging"]["wandb"]["name"] == word


def test_no_file_that_it_names_is_opened(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    (tmp_path / "cluster.yaml").write_text("name: ours\n")
    config = load_run(tmp_path / "run.yaml", [f"launch.cluster={tmp_path / 'cluster.yaml'}"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for name in ("cluster.yaml", "mixture.yaml", "model.yaml"):
        (tmp_path / name).unlink()
    assert load_resolved(tmp_path / "config.yaml") == config

"""The demo's build: whole, reproducible, skipped when complete, confined to its folder."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.mixture import load_mixture
from data_pipeline.sources import open_sources
from moe_train.config import load_run
from moe_train.config_file import presets_folder
from moe_train.demo import build as demo_build
from moe_train.demo import corpora

SMALL = {"code": 400_000, "prose": 400_000, "reference": 200_000, "math": 200_000}


def run_build(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    demo_build.build(folder, console)
    return console.file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SMALL.items():
        monkeypatch.setitem(corpora.MAX_BYTES, name, size)
    monkeypatch.setattr(demo_build, "VOCAB_SIZE", 1024)


def test_built_twice_skipped_when_complete_and_mended_when_not(small: None, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    said = run_build(first)
    run_build(second)
    built = contents(first)
    differing = {name for name, data in contents(second).items() if built.get(name) != data}
    assert {name for name in differing if not name.endswith(".json")} == set()  # manifests say what was typed

    assert "tokens" in said and "already" in run_build(first)
    (first / "code.bin").write_bytes(b"cut short")
    (first / "mine.txt").write_text("kept")
    assert "already" not in run_build(first)
    mended = contents(first)
    assert mended.pop("mine.txt") == b"kept"
    assert mended == built
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_change_of_what_is_read_builds_again(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_build(tmp_path)
    monkeypatch.setattr(corpora, "PROSE_PACKAGES", ("numpy",))
    assert "already" not in run_build(tmp_path)


def test_the_preset_mixture_reads_what_is_built(small: None, tmp_path: Path) -> None:
    run_build(tmp_path / "build" / "demo")
    (tmp_path / "configs" / "data").mkdir(parents=True)
    mixture_file = tmp_path / "configs" / "data" / "demo.yaml"
    mixture_file.write_bytes((presets_folder() / "data" / "demo.yaml").read_bytes())
    sources = open_sources(load_mixture(mixture_file))
    assert set(sources) == set(corpora.MAX_BYTES)
    for name, entropy in demo_build.unigram_entropies(tmp_path / "build" / "demo").items():
        assert sources[name].num_windows > 50
        assert 3 < entropy < 7


def test_the_preset_model_has_the_tokenizers_vocabulary() -> None:
    assert load_run("configs/run/demo.yaml").model.vocab_size == demo_build.VOCAB_SIZE

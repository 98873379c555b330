"""How far the demo trains, and on which mixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.mixture import load_mixture
from moe_train.config import RunConfig, load_run
from moe_train.demo import run as demo
from moe_train.errors import UserError

STEP = 16 * 256
TOTAL = load_run(demo.RUN_FILE).total_tokens


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The preset as an installed package sees it: far from the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build" / "demo").mkdir(parents=True)
    return load_run(demo.RUN_FILE)


def seen(config: RunConfig, steps: int) -> None:
    """Let the run have trained so many steps."""
    Path(config.output_dir).mkdir(parents=True)
    lines = [json.dumps({"step": step, "tokens": step * STEP}) + "\n" for step in range(1, steps + 1)]
    (Path(config.output_dir) / "metrics.jsonl").write_text("".join(lines))


def test_a_new_run_goes_to_the_end_of_the_phases(config: RunConfig) -> None:
    goal = demo.goal_of(config, None, None)
    assert (goal.done, goal.total, goal.target, goal.reached) == (0, TOTAL, TOTAL, False)


def test_a_run_is_complete_at_its_last_whole_batch(config: RunConfig) -> None:
    seen(config, TOTAL // STEP)
    assert demo.goal_of(config, None, None).reached
    assert not demo.goal_of(config, None, 500_000).reached
    assert not demo.goal_of(config, TOTAL + 100_000, None).reached


def test_an_interrupted_run_is_not_complete(config: RunConfig) -> None:
    seen(config, TOTAL // STEP - 1)
    assert not demo.goal_of(config, None, None).reached


def test_both_options_or_less_than_a_step_are_refused(config: RunConfig) -> None:
    with pytest.raises(UserError, match="--more"):
        demo.goal_of(config, 1, 1)
    for tokens in (0, 4000):
        with pytest.raises(UserError, match="4096"):
            demo.goal_of(config, tokens, None)


def test_fewer_tokens_only_stop_earlier(config: RunConfig) -> None:
    changed = demo.overrides(config, demo.goal_of(config, 10 * STEP + 5, None))
    assert "training.max_steps=10" in changed
    assert load_run(demo.RUN_FILE, changed).total_tokens == TOTAL


def test_more_tokens_lengthen_the_last_phase_alone(config: RunConfig) -> None:
    seen(config, TOTAL // STEP)
    done = TOTAL // STEP * STEP
    changed = demo.overrides(config, demo.goal_of(config, None, 500_000))
    longer = load_run(demo.RUN_FILE, changed)
    assert longer.total_tokens == done + 500_000
    assert longer.mixture.phases[:-1] == config.mixture.phases[:-1]
    assert longer.mixture.phases[-1].weights == config.mixture.phases[-1].weights
    assert Path(longer.mixture.tokenizer) == Path("build/demo/tokenizer.model").resolve()
    assert [source.paths for source in longer.mixture.sources.values()] == [
        [str(Path(f"build/demo/{name}.bin").resolve())] for name in config.mixture.sources
    ]


def test_beside_a_checkout_the_preset_is_used_as_it_is(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BUILD", Path(config.mixture.tokenizer).parent)
    assert demo.overrides(config, demo.goal_of(config, None, None)) == []


def test_elsewhere_the_same_phases_read_the_working_folder(config: RunConfig) -> None:
    (changed,) = demo.overrides(config, demo.goal_of(config, None, None))
    mixture = load_mixture(changed.partition("=")[2])
    assert mixture.phases == config.mixture.phases
    assert mixture.tokenizer == str(Path("build/demo/tokenizer.model").resolve())


@pytest.mark.parametrize(("arguments", "code"), [(["--tokens", "many"], 2), (["--tokens", "1", "--more", "1"], 2)])
def test_bad_options_end_with_status_2(arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_train.demo.__main__ import main

    monkeypatch.setattr("sys.argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code

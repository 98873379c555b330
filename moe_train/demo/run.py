"""The demo from one end to the other: build the data, train, report. What it runs is what a user would type.

The run file and the mixture are the presets `run/demo` and `data/demo`: edit them, and the demo follows. Two
things need a mixture of its own, `build/demo/mixture.yaml`: more tokens than the preset's phases have (its
last phase is lengthened), and an installed package, whose presets do not lie beside the `build/demo` of the
working folder.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from data_pipeline.units import format_count
from moe_train.demo import report
from moe_train.demo.build import build, unigram_entropies
from moe_train.errors import UserError
from parallel.spawn import local_gpus

if TYPE_CHECKING:
    from moe_train.config import RunConfig

RUN_FILE = "configs/run/demo.yaml"
BUILD = Path("build/demo")
PROCESSES = 2
PROMPT = "def main("


@dataclass(frozen=True)
class Goal:
    """How far to train: `done` and `total` tokens, of the run so far and of the preset's phases; `target`,
    the end wanted."""

    done: int
    total: int
    target: int
    tokens_per_step: int

    @property
    def reached(self) -> bool:
        """A run ends at its last whole batch."""
        return self.target - self.done < self.tokens_per_step


def run_demo(tokens: int | None = None, more: int | None = None) -> int:
    """Build what is missing, train up to the goal, report. Returns the exit status.

    Args:
        tokens: how long the whole run is to be; None: as long as the phases of the preset.
        more: how many tokens to train in addition to those that the run has seen.
    """
    console = Console()
    build(BUILD, console)
    from moe_train.config import load_run

    config = load_run(RUN_FILE)
    goal = goal_of(config, tokens, more)
    if not goal.reached:
        status = _moe_train(console, "pretrain", RUN_FILE, "--nproc", str(PROCESSES), *overrides(config, goal))
        if status:
            return status
    run = Path(os.path.relpath(config.output_dir))
    report.print_report(console, run, BUILD, unigram_entropies(BUILD))
    if goal.reached:
        console.print(f"\nThe run is complete: it has seen {format_count(goal.done)} tokens.")
    else:
        console.print()
        _moe_train(console, "generate", str(run), "--prompt", PROMPT, "--max-tokens", "120", "--temperature", "0.7")
    console.print(
        "\nGo on with it:  make demo MORE=500K  (or: python -m moe_train.demo --more 500K)"
        f"\nWhat it feeds:  moe-train mix {run}\nStart again:    remove {run}",
        highlight=False,
    )
    return 0


def goal_of(config: RunConfig, tokens: int | None, more: int | None) -> Goal:
    """The goal that the options ask for, given what the run in `config.output_dir` has seen. Raises UserError
    for both."""
    if tokens is not None and more is not None:
        raise UserError("--tokens and --more are two ways to say how far to train; give one of them")
    rows = report.read_metrics(Path(config.output_dir))
    done = rows[-1]["tokens"] if rows else 0
    target = done + more if more is not None else config.total_tokens if tokens is None else tokens
    if not done and target < config.tokens_per_step:
        raise UserError(f"{target} tokens are less than one step of {config.tokens_per_step}; ask for more")
    return Goal(done, config.total_tokens, target, config.tokens_per_step)


def overrides(config: RunConfig, goal: Goal) -> list[str]:
    """What the run file's keys must be for this goal; writes the mixture that they name, if any."""
    mixture = config.mixture
    beside = mixture.tokenizer is not None and Path(mixture.tokenizer).parent == BUILD.resolve()
    changed = []
    if goal.target < goal.total:
        changed.append(f"training.max_steps={goal.target // goal.tokens_per_step}")
    if goal.target > goal.total or not beside:
        changed.append(f"data.mixture={_write_mixture(config, max(0, goal.target - goal.total))}")
    return changed


def _write_mixture(config: RunConfig, extra: int) -> Path:
    """The preset's mixture with paths into the build folder and its last phase `extra` tokens longer; returns
    its path."""
    import yaml

    data = config.mixture.model_dump(mode="json", exclude_none=True, exclude={"total_tokens"})
    data["phases"][-1]["tokens"] += extra
    data["tokenizer"] = Path(data["tokenizer"]).name
    for source in data["sources"].values():
        source["paths"] = [Path(path).name for path in source["paths"]]
    path = BUILD / "mixture.yaml"
    origin = os.path.relpath(config.data.mixture)
    header = f"# Written by the demo from {origin}, whose last phase is {extra} tokens shorter.\n"
    path.write_text(header + yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def _moe_train(console: Console, *arguments: str) -> int:
    """Run the command `moe-train` as a user would, in a process of its own; returns its exit status."""
    console.print(f"\n$ moe-train {shlex.join(arguments)}", style="bold", highlight=False, soft_wrap=True)
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if local_gpus() < PROCESSES:  # two ranks cannot share a GPU
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, "-m", "moe_train", *arguments], env=environment).returncode

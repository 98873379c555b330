"""Whole runs of a tiny model on corpora of random tokens, started as a user starts them."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from data_pipeline.indexed import IndexedWriter
from tests.integration.warm import ROOT, WarmServer, WarmStart

VOCABULARY, SEQUENCE, STEPS = 67, 16, 40


def write_corpora(folder: Path) -> None:
    """Two sources, one with held-out text, and a mixture of two phases; one run file."""
    random = np.random.default_rng(0)
    for name, tokens in (("web", 3000), ("web.heldout", 300), ("code", 2000)):
        with IndexedWriter(folder / name, np.uint16) as writer:
            while writer.num_tokens < tokens:
                writer.add(random.integers(0, VOCABULARY, min(50, tokens - writer.num_tokens)))
    mixture = {
        "sequence_length": SEQUENCE,
        "seed": 3,
        "tokenizer": None,
        "sources": {"web": {"paths": ["web.bin"]}, "code": {"paths": ["code.bin"], "max_epochs": 3}},
        "phases": [
            {"name": "stable", "tokens": 2 * STEPS * SEQUENCE, "weights": {"web": 3, "code": 1}},
            {"name": "decay", "tokens": 2 * STEPS * SEQUENCE, "weights": {"web": 1, "code": 1}},
        ],
    }
    del mixture["tokenizer"]
    model = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_layers": 2,
        "attention": {"num_kv_heads": 2, "head_dim": 8, "num_experts": 4, "top_k": 2},
        "mlp": {"ffn_hidden_size": 12, "num_experts": 4, "top_k": 2},
        "max_sequence_length": 64,
        "init_std": 0.1,
    }
    run = {
        "output_dir": str(folder / "run"),
        "model": "model.yaml",
        "data": {"mixture": "mixture.yaml", "validation": {"interval": "8 steps", "samples": 4}},
        "parallel": {"expert": 2},
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
        "checkpoint": {"interval": "8 steps", "keep_last": 9},
        "schedule": {"warmup": 256, "decay": 1280},
        "logging": {"interval": "2 steps"},
    }
    for name, content in (("mixture", mixture), ("model", model), ("run", run)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


_warm: dict[bool, WarmServer] = {}


def start(
    folder: Path,
    *arguments: str,
    nproc: int | None = 2,
    verb: tuple[str, ...] = ("pretrain",),
    fresh: bool = False,
    gpu: bool = False,
) -> subprocess.Popen | WarmStart:
    """`moe-train pretrain run.yaml --nproc N ...`, running; `nproc=None`: as one of the ranks that the environment
    tells of; `fresh`: in new interpreters, as on a cluster; `gpu`: on what looks like GPUs."""
    ranks = [] if nproc is None else ["--nproc", str(nproc)]
    command = [*verb, str(folder / "run.yaml"), *ranks, *arguments]
    if not fresh:
        if gpu not in _warm:
            _warm[gpu] = WarmServer(gpu)
            atexit.register(_warm[gpu].close)
        return _warm[gpu].start(command, folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "moe_train", *command],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *arguments: str, **options) -> tuple[int, str]:
    """The same, to its end: (status, everything it said)."""
    process = start(folder, *arguments, **options)
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def arithmetic(lines: list[dict]) -> list[tuple]:
    """What does not depend on the clock."""
    names = ("step", "tokens", "phase", "loss", "load_balancing_loss", "z_loss", "grad_norm", "lr", "validation/web")
    return [tuple(line.get(name) for name in names) for line in lines]

"""A run file of a tiny model, its mixture and a cluster file, for the launcher's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from data_pipeline.indexed import IndexedWriter


def write_run(folder: Path, cluster: dict | None = None, steps: int = 40, **sections: dict) -> Path:
    """run.yaml in `folder` with everything that it names: `steps` steps of 4 sequences of 16 random tokens."""
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "web", np.uint16) as writer:
        for _ in range(40):
            writer.add(random.integers(0, 67, 50))
    files = {
        "mixture": {
            "sequence_length": 16,
            "seed": 3,
            "sources": {"web": {"paths": ["web.bin"]}},
            "phases": [{"name": "stable", "tokens": steps * 4 * 16, "weights": {"web": 1}}],
        },
        "cluster": {"name": "test", "exclusive": False, **(cluster or {})},
        "run": {
            "output_dir": str(folder / "run"),
            "model": {
                "vocab_size": 67,
                "hidden_size": 16,
                "num_layers": 2,
                "attention": {"num_kv_heads": 2, "head_dim": 8, "num_experts": 4, "top_k": 2},
                "mlp": {"ffn_hidden_size": 12, "num_experts": 4, "top_k": 2},
                "max_sequence_length": 64,
            },
            "data": {"mixture": "mixture.yaml", "validation": None},
            "training": {"micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
            "checkpoint": {"interval": "8 steps"},
            "schedule": {"warmup": 256, "decay": 1280},
            "launch": {"cluster": "cluster.yaml", "nodes": 2, "time": "10m"},
            **sections,
        },
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "run.yaml"

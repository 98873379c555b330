"""From this machine's text to what training reads: corpora, tokenizer, token files. What is complete is not
built again.

build/demo/raw/SOURCE.jsonl  ->  tokenizer.model  ->  SOURCE.bin/.idx, SOURCE.heldout.bin/.idx,
SOURCE.manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

from rich.console import Console

from moe_train.demo import corpora

VOCAB_SIZE = 4096  # of configs/model/demo.yaml

# The part of a source's documents that is never trained on: each gives validation its 64 windows of 256
# tokens and some.
HOLDOUT = {"code": 0.03, "prose": 0.03, "reference": 0.2, "math": 0.03}

STAMP = "complete.json"


def build(folder: Path, console: Console) -> None:
    """Make `folder` hold the demo's corpora and tokenizer; returns at once when it holds them already.

    Raises UserError or DataError, one line.
    """
    inputs = _inputs()
    if _is_complete(folder, inputs):
        console.print(f"corpora and tokenizer are in {folder} already")
        return
    console.print(f"building corpora and tokenizer from this machine's own text in {folder}")
    _remove(folder)

    begun = time.monotonic()
    texts: dict[str, int] = {}
    raw = corpora.build_corpora(folder / "raw", done=texts.__setitem__)
    begun = _tell(console, "text", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in texts.items()), begun)

    from data_pipeline.prepare import prepare
    from data_pipeline.tokenizer import train_tokenizer

    model = folder / "tokenizer.model"
    train_tokenizer(raw.values(), model, VOCAB_SIZE)
    begun = _tell(console, "tokenizer", f"{VOCAB_SIZE} entries", begun)
    counts = []
    for name, path in raw.items():
        workers = min(4, os.cpu_count() or 1)
        report = prepare([path], folder / name, model, workers, holdout=HOLDOUT[name], progress=False)
        counts.append(f"{name} {report.train.tokens / 1e6:.2f}M")
    _tell(console, "tokens", ", ".join(counts), begun)

    sizes = {name: (folder / name).stat().st_size for name in _files()}
    (folder / STAMP).write_text(json.dumps({"inputs": inputs, "files": sizes}, indent=1) + "\n")


def unigram_entropies(folder: Path) -> dict[str, float]:
    """Nats per token of each source's held-out token frequencies: no model that knows only frequencies can
    lose less there."""
    entropies = {}
    for name in HOLDOUT:
        manifest = json.loads((folder / f"{name}.manifest.json").read_text(encoding="utf-8"))
        entropies[name] = manifest["splits"]["heldout"]["unigram_entropy"]
    return entropies


def _inputs() -> str:
    """A hash of all that the built files depend on: Python, the files that are read, the tokenizer's library,
    this code."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(sys.version.encode() + metadata.version("sentencepiece").encode())
    for name, path in corpora.package_files({*corpora.CODE_PACKAGES, *corpora.PROSE_PACKAGES}):
        digest.update(f"{name} {path.stat().st_size}\n".encode())
    for module in ("build.py", "corpora.py", "exercises.py"):
        digest.update(Path(__file__).with_name(module).read_bytes())
    return digest.hexdigest()


def _is_complete(folder: Path, inputs: str) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text())
        sizes = {name: (folder / name).stat().st_size for name in stamp["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return stamp["inputs"] == inputs and sizes == stamp["files"]


def _remove(folder: Path) -> None:
    """Remove what an earlier build left, and nothing else: the stamp first, so that half a removal is not
    complete."""
    for name in (STAMP, *_files()):
        (folder / name).unlink(missing_ok=True)


def _files() -> list[str]:
    """Every file of a build but the stamp, relative to its folder."""
    ends = (".manifest.json", ".bin", ".idx", ".heldout.bin", ".heldout.idx")
    return [
        "tokenizer.model",
        *(f"raw/{name}.jsonl" for name in HOLDOUT),
        *(name + end for name in HOLDOUT for end in ends),
    ]


def _tell(console: Console, what: str, result: str, begun: float) -> float:
    """A line about a finished part and how long it took; returns the time now."""
    now = time.monotonic()
    console.print(f"  {what:<10} {result} ({now - begun:.1f} s)", highlight=False)
    return now

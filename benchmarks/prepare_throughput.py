"""What `prepare` costs over its tokenizer: tokens/s of the whole of it (read, parse, encode, shuffle, hash, write)
against sentencepiece alone on the same text with the same number of processes.

    python benchmarks/prepare_throughput.py                 2 processes, 24 MB of this machine's Python files
    python benchmarks/prepare_throughput.py --workers 8 --megabytes 200

sentencepiece alone: the documents lie parsed in the memory of each process, an equal share of bytes in each, and are
encoded in lists; starting processes counts on neither side. The two take turns. Prints one JSON line; `ratio` is the
median over rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from arguments import positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
VOCABULARY = 8000
_mine: dict = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()

    from data_pipeline.prepare import prepare
    from data_pipeline.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = collect(arguments.megabytes * 1e6)
        with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        train_tokenizer([folder / "text.jsonl"], folder / "tok.model", VOCABULARY, sample_bytes=3_000_000)
        alone, whole, tokens = [], [], 0
        with Alone(folder / "tok.model", texts, arguments.workers) as sentencepiece:
            for number in range(arguments.rounds):
                alone.append(sentencepiece.seconds())
                report = prepare(
                    [folder / "text.jsonl"],
                    folder / f"out{number}",
                    folder / "tok.model",
                    arguments.workers,
                    progress=False,
                )
                whole.append(report.seconds)
                tokens = report.train.tokens
    print(json.dumps({
        "benchmark": "prepare_throughput", "workers": arguments.workers, "megabytes": arguments.megabytes,
        "tokens": tokens,
        "tokens_per_second": round(tokens / statistics.median(whole)),
        "sentencepiece_tokens_per_second": round(tokens / statistics.median(alone)),
        "ratio": round(statistics.median(a / w for a, w in zip(alone, whole, strict=True)), 3),
    }))  # fmt: skip


def collect(size: float) -> list[str]:
    """Python files of the standard library and of what is installed, `size` bytes of them; again if there are too
    few."""
    texts, total = [], 0
    roots = [sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]]
    files = [path for root in dict.fromkeys(roots) for path in sorted(Path(root).rglob("*.py"))]
    while total < size:
        before = total
        for path in files:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip() and len(text) < 200_000:
                texts.append(text)
                total += len(text.encode())
            if total >= size:
                return texts
        if total == before:
            raise SystemExit("this machine has no Python files to take text from")
    return texts


class Alone:
    """Processes that hold a share of the texts and encode it when told to."""

    def __init__(self, model: Path, texts: list[str], workers: int) -> None:
        _mine.update(model=str(model), texts=texts)
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        for number in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, number, workers), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __enter__(self) -> Alone:
        for pipe in self.pipes:
            pipe.recv()
        return self

    def seconds(self) -> float:
        begun = time.perf_counter()
        for pipe in self.pipes:
            pipe.send("go")
        for pipe in self.pipes:
            pipe.recv()
        return time.perf_counter() - begun

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def _serve(pipe, number: int, workers: int) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=_mine["model"])
    total, half, texts = sum(map(len, _mine["texts"])), 0, []
    for text in _mine["texts"]:  # neighbours, an equal part of the characters
        if half * workers // total == number:
            texts.append(text)
        half += len(text)
    pipe.send("ready")
    while pipe.recv():
        for first in range(0, len(texts), 64):
            model.encode(texts[first : first + 64], num_threads=1)
        pipe.send("done")


if __name__ == "__main__":
    main()

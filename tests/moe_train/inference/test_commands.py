"""`moe-train score` and `moe-train generate`: what they refuse before a rank is started, and whole runs."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from data_pipeline.tokenizer import load_tokenizer
from moe_train.cli import main
from moe_train.inference import generate as generating
from moe_train.inference.config import InferenceConfig
from moe_train.inference.session import plan
from parallel.spawn import SpawnResult
from tests.small_checkpoint import VOCABULARY, random_weights, small_config, write_checkpoint


@pytest.fixture
def refused(capsys):
    """``refused(arguments)``: the one line on stderr of a command that ends with status 2 (or ``code``)."""

    def run(*arguments: str, code: int = 2) -> str:
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


@pytest.fixture
def ids(tmp_path):
    """``ids(array)``: its path."""

    def write(array: np.ndarray):
        np.save(tmp_path / "ids.npy", array)
        return tmp_path / "ids.npy"

    return write


GOOD = np.arange(12).reshape(3, 4)


@pytest.mark.parametrize(
    "array, words",
    [
        (GOOD + VOCABULARY - 9, "id 322 at [2, 3] is outside of the model's vocabulary of 321 (0 to 320)"),
        (GOOD - 1, "id -1 at [0, 0] is outside"),
        (GOOD.astype(np.float32), "holds float32, not whole numbers"),
        (GOOD[0], "has the shape [4]"),
        (GOOD[:, :1], "has the shape [3, 1]"),
        (GOOD[:0], "has the shape [0, 4]"),
        (np.array(["a"]), "not whole numbers"),
    ],
)
def test_score_refuses_ids(checkpoint, ids, tmp_path, refused, array, words):
    assert words in refused("score", checkpoint, "--ids", ids(array), "--out", tmp_path / "nll.npz")
    assert not (tmp_path / "nll.npz").exists()


def test_score_refuses_files(checkpoint, ids, tmp_path, refused):
    out = tmp_path / "nll.npz"
    assert "there is no such file" in refused("score", checkpoint, "--ids", tmp_path / "no.npy", "--out", out)
    (tmp_path / "text.npy").write_text("1 2 3")
    assert "is not a .npy file" in refused("score", checkpoint, "--ids", tmp_path / "text.npy", "--out", out)
    np.savez(tmp_path / "many.npz", ids=GOOD)
    assert "is an archive" in refused("score", checkpoint, "--ids", tmp_path / "many.npz", "--out", out)
    assert "cannot be written" in refused(
        "score", checkpoint, "--ids", ids(GOOD), "--out", tmp_path / "text.npy" / "nll.npz"
    )
    assert "holds no checkpoint" in refused("score", tmp_path, "--ids", ids(GOOD), "--out", out)


@pytest.mark.parametrize(
    "override, words",
    [
        ("parallel.tensor=3", "parallel.tensor 3 does not divide the 2 kv heads"),
        ("parallel.virtual_pipeline=2", "virtual stages serve training alone"),
        ("parallel.tensr=2", "did you mean 'tensor'"),
        ("optimizer.lr=1", "optimizer"),
        ("training.precision=fp8", "training.precision"),
        ("parallel.expert=two", "parallel.expert"),
    ],
)
def test_overrides_are_checked(checkpoint, ids, tmp_path, refused, override, words):
    assert words in refused("score", checkpoint, "--ids", ids(GOOD), "--out", tmp_path / "nll.npz", override)
    assert words in refused("generate", checkpoint, "--prompt", "a", override)


def test_processes_must_fit_the_layout(checkpoint, refused):
    words = refused("generate", checkpoint, "--prompt", "a", "--nproc", "3", "parallel.tensor=2")
    assert "does not divide the 3 processes" in words


def test_the_fewest_ranks_are_started(checkpoint, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert plan(checkpoint, None, []).world_size == 1
    assert plan(checkpoint, None, ["parallel.tensor=2", "--parallel.pipeline=2"]).world_size == 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan(checkpoint, None, []).world_size == 2, "the launcher's ranks"


def test_precision_is_the_checkpoints_unless_said_otherwise(checkpoint, tmp_path):
    import torch

    assert plan(checkpoint, 1, []).precision == "fp32"
    assert plan(checkpoint, 1, ["training.precision=bf16"]).precision == "bf16"
    half = write_checkpoint(tmp_path / "half", small_config(), random_weights(small_config(), torch.bfloat16))
    assert plan(half, 1, []).precision == "bf16"


def test_a_plan_survives_the_way_to_the_ranks(checkpoint):
    planned = plan(checkpoint, 2, ["parallel.tensor=2", "training.micro_batch_size=3"])
    assert type(planned).from_payload(planned.payload()) == planned
    assert planned.config == InferenceConfig.from_overrides(["parallel.tensor=2", "training.micro_batch_size=3"])


def test_a_checkpoint_that_lost_a_file(checkpoint, ids, tmp_path, refused):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    shard = next(damaged.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    words = refused("score", damaged, "--ids", ids(GOOD), "--out", tmp_path / "nll.npz", code=4)
    assert shard.name in words and "bytes" in words


def test_generate_refuses(checkpoint, tmp_path, refused):
    assert "--top-p" in refused("generate", checkpoint, "--prompt", "a", "--top-p", "0")
    assert "--temperature" in refused("generate", checkpoint, "--prompt", "a", "--temperature", "nan")
    assert "max_sequence_length is 64" in refused("generate", checkpoint, "--prompt", "word " * 100)
    assert "--prompt is not text" in refused("generate", checkpoint, "--prompt", os.fsdecode(b"a\xff"))
    bare = write_checkpoint(tmp_path / "bare", small_config(), random_weights(small_config()))
    assert "has no tokenizer" in refused("generate", bare, "--prompt", "a")
    small = small_config(vocab_size=50)
    other = write_checkpoint(tmp_path / "other", small, random_weights(small), checkpoint / "tokenizer.model")
    assert "it is another model's" in refused("generate", other, "--prompt", "a word")


def test_generate_prints_what_it_returns(checkpoint, capsys, monkeypatch):
    """In this process: prompt and continuation are printed, also characters of several tokens."""
    monkeypatch.setattr(generating, "call_ranks", lambda planned, target, arguments: _here(planned, arguments))
    monkeypatch.setattr(generating, "start_ranks", lambda planned, target, arguments: _here(planned, arguments).code)
    prompt, how = "def main(schöne", {"max_tokens": 30, "temperature": 1.5, "seed": 0}
    text = generating.generate_text(checkpoint, prompt, **how)
    assert capsys.readouterr().out == ""
    assert generating.generate(checkpoint, prompt, **how) == 0
    assert capsys.readouterr().out == prompt + text + "\n" and len(text) > 10


def _here(planned, arguments) -> SpawnResult:
    return SpawnResult(generating.generate_rank(planned.payload(), **arguments), "")


def test_characters_are_printed_when_they_are_whole(checkpoint, capsys):
    words = load_tokenizer(checkpoint / "tokenizer.model")
    prompt, tokens = words.encode("a"), words.encode("a☃b")[1:]
    assert len(tokens) == 4, "the snowman should take three bytes here"
    printer = generating._Printer(words, "a", prompt, echo=True)
    seen = []
    for token in tokens:
        printer.add(token)
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "", "☃", "b"] and printer.text == "☃b"


def test_the_models_length_limits_the_text(checkpoint):
    planned = plan(checkpoint, 1, [])
    arguments = generating._arguments(planned, "def main(", 1000)
    assert arguments["max_tokens"] + len(arguments["prompt_ids"]) == planned.model.max_sequence_length
    assert generating._arguments(planned, "", 3)["prompt_ids"] == [2], "an empty prompt begins a document"


def test_a_failing_rank_is_told(checkpoint, monkeypatch):
    monkeypatch.setattr(generating, "call_ranks", lambda *_: SpawnResult(5, "rank 1 was killed", 1))
    with pytest.raises(generating.RankFailure, match="rank 1 was killed") as raised:
        generating.generate_text(checkpoint, "a")
    assert raised.value.exit_code == 5


def test_score_with_ranks_of_its_own(checkpoint, ids, tmp_path, capfd):
    """As a user runs it. What the numbers are is for test_layouts to say."""
    out = tmp_path / "nll.npz"
    command = ["score", checkpoint, "--ids", ids(GOOD), "--out", out, "--nproc", 2, "parallel.tensor=2"]
    assert main([str(argument) for argument in command]) == 0
    nll = np.load(out)["nll"]
    assert nll.shape == (3, 3) and nll.dtype == np.float32 and (nll > 0).all()
    assert "3 x 3 tokens" in capfd.readouterr().out
    assert not list(tmp_path.glob("*.partial"))

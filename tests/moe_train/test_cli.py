"""The command line: verbs, exit status, and one line for each mistake."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moe_train import __version__
from moe_train.cli import main
from moe_train.errors import DamagedError, HardwareError, PolicyStop, StoppedError, UserError
from tests.integration.runs import write_corpora

ROOT = Path(__file__).parents[2]
VERBS = [
    "pretrain",
    "branch",
    "prepare",
    "tokenizer train",
    "mix",
    "checkpoint list",
    "checkpoint verify",
    "checkpoint convert",
]
VERBS += ["score", "generate"]


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    """Put a module with `functions` where a verb imports one from (a test of the command line alone)."""
    fake = types.ModuleType(module)
    fake.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, module, fake)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb.split()[0]} " in text for verb in VERBS) and "..." not in text.split("Commands:")[1]
    assert main([]) == 0 and capsys.readouterr().out == text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"\n  moe-train {verb} " in text
    assert text.count("\\b") == 0 and "Usage: moe-train " + verb in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"moe-train {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrian", "x"], "Did you mean 'pretrain'?"),
        (["checkpoint", "lst", "x"], "Did you mean 'list'?"),
        (["pretrain"], "Missing argument"),
        (["pretrain", "demo", "--nproc", "0"], "Invalid value for '--nproc'"),
        (["pretrain", "demo", "--nprocs", "2"], "there is no option --nprocs; did you mean '--nproc'?"),
        (["pretrain", "demo", "--dry-rn"], "there is no option --dry-rn; did you mean '--dry-run'?"),
        (
            ["generate", "x", "--prompt", "y", "--max-token", "5"],
            "there is no option --max-token; did you mean '--max-tokens'?",
        ),
        (["plan", "memory", "demo", "--node", "2"], "there is no option --node; did you mean '--nodes'?"),
        (["launch", "slurm", "demo", "--spare", "1"], "there is no option --spare; did you mean '--spares'?"),
        (["pretrain", "demo", "--training.seed", "2"], "write --training.seed=VALUE, without a space"),
        (["pretrain", "demo", "training.sed=2"], "training.sed: unknown key; did you mean 'seed'?"),
        (["pretrain", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["score", "x", "--out", "y"], "Missing option '--ids'"),
        (["checkpoint", "convert"], "give one of --from-hf DIR OUT, --to-hf CHECKPOINT DIR"),
        (["checkpoint", "convert", "--from-hf", "a", "b", "--to-hf", "c", "d"], "give one of"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError, 2), (StoppedError, 3), (DamagedError, 4), (HardwareError, 5), (PolicyStop, 6)],
)
def test_an_error_says_its_status(
    error: type[Exception], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error("what\nand where")

    stand_in(monkeypatch, "moe_train.training.run", pretrain=fail)
    assert main(["pretrain", "demo"]) == code
    assert capsys.readouterr().err == "error: what and where\n"


def test_a_bug_is_a_traceback_and_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, "moe_train.training.run", pretrain=lambda *_: {}["missing"])
    assert main(["pretrain", "demo"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "KeyError: 'missing'" in text and "this is a bug" in text


VERBS_ON_PATHS = [
    ["pretrain", "PATH/run.yaml"],
    ["pretrain", "run.yaml", "parallel.expert=1", "output_dir=PATH/run"],
    ["pretrain", "run.yaml", "parallel.expert=1", "output_dir=new", "--resume", "PATH/run"],
    ["mix", "PATH/run"],
    ["checkpoint", "list", "PATH/run"],
    ["generate", "PATH/run", "--prompt", "x"],
    ["branch", "PATH/run@8", "run.yaml"],
    ["launch", "status", "PATH/run"],
    ["launch", "local", "run.yaml", "output_dir=PATH/run"],
]


@pytest.mark.parametrize("verb", VERBS_ON_PATHS, ids=lambda words: " ".join(words[:2]))
def test_a_path_that_cannot_be_used_is_one_line_and_status_2(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    assert main([word.replace("PATH", "x" * 300) for word in verb]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "there is no" in said or "File name too long; give it a shorter name" in said, said


def test_a_folder_that_one_may_not_enter_is_one_line_and_status_2(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0)
    command = [sys.executable, "-m", "moe_train", "mix", str(secret / "run")]
    if os.geteuid() == 0:  # who may enter any, unless without that right
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
        if shutil.which("setpriv") is None or subprocess.run([*command[:2], "true"], capture_output=True).returncode:
            pytest.skip("needs setpriv, or another user than root")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {secret}/run: Permission denied; see who may read and write there")


def test_an_error_about_a_file_keeps_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        error.exit_code = 6  # type: ignore[attr-defined]
        raise error

    stand_in(monkeypatch, "moe_train.training.run", pretrain=fail)
    assert main(["pretrain", "demo"]) == 6
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "moe_train.training.run", pretrain=interrupt)
    assert main(["pretrain", "demo"]) == 130


def test_pretrain_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []

    def pretrain(config: object, nproc: int | None, resume: str) -> int:
        seen.append((config, nproc, resume))
        return 3

    stand_in(monkeypatch, "moe_train.training.run", pretrain=pretrain)
    arguments = [
        "pretrain",
        "demo",
        "optimizer.lr=1e-3",
        "--nproc",
        "2",
        "--training.max_steps=5",
        "--resume",
        "never",
    ]
    assert main(arguments) == 3
    (config, nproc, resume), *_ = seen
    assert (config.optimizer.lr, config.training.max_steps, nproc, resume) == (1e-3, 5, 2, "never")


def test_score_and_generate_pass_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    note = lambda *arguments, **options: seen.append((arguments, options))  # noqa: E731
    stand_in(monkeypatch, "moe_train.inference.score", score=note)
    stand_in(monkeypatch, "moe_train.inference.generate", generate=note)
    assert main(["score", "ck", "--ids", "i.npy", "parallel.tensor=2", "--out", "o.npz", "--nproc", "2"]) == 0
    assert seen[0] == (("ck", "i.npy", "o.npz", 2, ["parallel.tensor=2"]), {})
    assert main(["generate", "ck", "--prompt", "-x", "--max-tokens", "3", "--top-p", "0.5", "--seed", "7"]) == 0
    assert seen[1][0] == ("ck", "-x")
    expected = {"max_tokens": 3, "temperature": 1.0, "top_p": 0.5, "seed": 7, "nproc": None, "overrides": []}
    assert seen[1][1] == expected


def test_python_dash_m_and_a_reader_that_leaves() -> None:
    """`python -m moe_train` is the command; a closed pipe (`| head -1`) is nobody's mistake."""
    command = f"{sys.executable} -m moe_train --help | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Usage: moe-train")
    reader, writer = os.pipe()
    os.close(reader)
    for arguments, status in ((["--version"], 0), (["mx"], 2)):
        command = [sys.executable, "-m", "moe_train", *arguments]
        assert subprocess.run(command, cwd=ROOT, stdout=writer, stderr=writer, timeout=60).returncode == status
    os.close(writer)
    done = subprocess.run(
        [sys.executable, "-m", "moe_train", "mx"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: No such command 'mx'")

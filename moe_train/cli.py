"""`moe-train`: one verb for each thing a user does. No logic here: a verb imports one function and calls it.

Exit status: 0 success; 1 a bug (with a traceback); 2 a user's mistake (one line); 3 stopped after saving; 4
damaged data or checkpoint; 5 hardware, a lost rank or a hang; 6 stopped by policy. An exception says which by
its `exit_code`.
"""

from __future__ import annotations

import traceback
from typing import Annotated, Optional

import typer

from launch.commands import app as launch_app
from moe_train import __version__
from moe_train.checkpoint.commands import Checkpoint, status
from moe_train.checkpoint.commands import app as checkpoint_app
from moe_train.errors import UserError
from moe_train.overrides import OVERRIDES, Overrides
from moe_train.plan.commands import app as plan_app
from parallel.errors import file_mistake, say


def _app(text: str) -> typer.Typer:
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


app = _app(
    """Pretrain JetMoE-class mixture-of-experts models.

    \b
    moe-train pretrain configs/run/demo.yaml --nproc 2      train, or go on with an interrupted run
    moe-train launch slurm run.yaml                         the same on a cluster, until it is complete
    moe-train mix configs/data/demo.yaml                    what the mixture feeds, before paying for it
    moe-train generate runs/demo --prompt "def main("       try what came out
    """
)
tokenizer_app = _app("Make a tokenizer.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(plan_app, name="plan")
app.add_typer(launch_app, name="launch")

Nproc = Annotated[
    Optional[int],
    typer.Option("--nproc", min=1, metavar="N", help="Processes on this machine; else one a GPU, or one."),
]
NprocOfLayout = Annotated[
    Optional[int],
    typer.Option("--nproc", min=1, metavar="N", help="Processes on this machine; else the fewest the layout takes."),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        typer.echo(f"moe-train {__version__}")
        raise typer.Exit()


@app.command(context_settings=OVERRIDES)
def pretrain(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run file, or the name of a preset such as demo.")],
    overrides: Overrides = (),
    nproc: Nproc = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="Go on with the run in output_dir; refuse to; or go on from a checkpoint.",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show config, mixture and layout; start nothing.")
    ] = False,
) -> Optional[int]:
    """Train a model, or go on with a run that was interrupted.

    \b
    moe-train pretrain configs/run/demo.yaml --nproc 2
    moe-train pretrain run.yaml --nproc 2 optimizer.lr=1e-3 training.max_steps=100
    moe-train pretrain run.yaml --nproc 8 --dry-run
    """
    from moe_train.config import load_run

    config = load_run(run, overrides)
    if dry_run:
        from moe_train.dry_run import dry_run as show

        return show(config, nproc, resume)
    from moe_train.training.run import pretrain as train

    return train(config, nproc, resume)


@app.command(context_settings=OVERRIDES)
def branch(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN_DIR@STEP", help="A run's folder and the step of one of its checkpoints."),
    ],
    new: Annotated[
        str,
        typer.Argument(metavar="NEW.yaml", help="The run file of the new run, with an output_dir of its own."),
    ],
    overrides: Overrides = (),
    nproc: Nproc = None,
) -> Optional[int]:
    """Start a new run from a checkpoint of another.

    Optimizer and data position are kept: so any stable checkpoint can be decayed.

    \b
    moe-train branch runs/demo@200 decay.yaml --nproc 2
    """
    from moe_train.training.branch import branch as start

    return start(source, new, overrides=overrides, nproc=nproc)


@app.command(context_settings=OVERRIDES)
def profile(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run file, or the name of a preset such as demo.")],
    overrides: Overrides = (),
    nproc: Nproc = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps to time, and as many to profile.")] = 3,
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder for the traces and profile.json.")] = "profile",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> Optional[int]:
    """Say where the time of a training step goes.

    Takes a few steps from the run's beginning and leaves its folder alone.

    \b
    moe-train profile configs/run/demo.yaml --nproc 2 --out profile
    """
    from moe_train.config import load_run
    from moe_train.profile.run import profile as measure

    return measure(load_run(run, overrides), nproc, steps, out, as_json)


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help="Files, folders or patterns: .txt, .jsonl (.gz, .zst), .parquet, .arrow."
        ),
    ],
    out: Annotated[str, typer.Option(metavar="PREFIX", help="Write PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="A sentencepiece .model or a tokenizer.json.")],
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that tokenise.")] = 1,
    text_key: Annotated[
        str, typer.Option(metavar="KEY", help="The field that holds the text; a.b is b within a.")
    ] = "text",
    holdout: Annotated[
        float,
        typer.Option(min=0.0, max=0.5, metavar="PART", help="Part of the documents kept for validation."),
    ] = 0.0,
    filters: Annotated[
        Optional[list[str]],
        typer.Option(
            "--filter", metavar="FIELD=VALUE", help="Keep documents that meet it (=, !=, <, <=, >, >=); repeatable."
        ),
    ] = None,
    dedup: Annotated[bool, typer.Option("--dedup", help="Drop documents whose text came before.")] = False,
    shuffle_seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the order of documents.")] = 0,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="Keep the order of the input.")] = False,
    shard_tokens: Annotated[
        Optional[str],
        typer.Option(metavar="COUNT", help="Write shards PREFIX-00000.bin, ... of so many tokens, such as 2B."),
    ] = None,
    max_bad: Annotated[
        Optional[int], typer.Option(min=0, metavar="N", help="Stop when more than N documents cannot be used.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a corpus, or an unfinished one, of this name.")
    ] = False,
) -> Optional[int]:
    """Tokenise raw text into a corpus that training reads.

    Started again after it was killed, it goes on where it was.

    \b
    moe-train prepare text/*.jsonl --out corpora/web --tokenizer tokenizer.model --workers 8 --holdout 0.01
    """
    from data_pipeline.prepare import prepare as write
    from data_pipeline.units import parse_count

    return status(
        write(
            inputs,
            out,
            tokenizer,
            workers=workers,
            text_key=text_key,
            holdout=holdout,
            max_bad=max_bad,
            overwrite=overwrite,
            filters=filters or (),
            dedup=dedup,
            shuffle_seed=None if no_shuffle else shuffle_seed,
            shard_tokens=None if shard_tokens is None else parse_count(shard_tokens),
        )
    )


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Text or .jsonl files.")],
    out: Annotated[str, typer.Option(metavar="MODEL", help="The file to write, such as tokenizer.model.")],
    vocab_size: Annotated[int, typer.Option(min=1, metavar="N", help="Entries of the vocabulary.")] = 32000,
    text_key: Annotated[
        str, typer.Option(metavar="KEY", help="The field of a .jsonl line that holds the text.")
    ] = "text",
) -> None:
    """Train a sentencepiece model on text.

    \b
    moe-train tokenizer train text/*.jsonl --out tokenizer.model --vocab-size 32000
    """
    from data_pipeline.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(inputs, out, vocab_size=vocab_size, text_key=text_key)
    typer.echo(f"{tokenizer.path}: {tokenizer.vocab_size:,} entries")


@app.command()
def mix(
    path: Annotated[
        str, typer.Argument(metavar="RUN_OR_DATA.yaml", help="A run file, a mixture file, or a run's folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Also what the run has consumed so far.")] = False,
    against: Annotated[Optional[str], typer.Option(metavar="OTHER.yaml", help="Compare with another mixture.")] = None,
) -> Optional[int]:
    """Show what will be fed: tokens, shares and epochs.

    \b
    moe-train mix configs/data/demo.yaml
    moe-train mix runs/demo --history
    moe-train mix old.yaml --against new.yaml
    """
    from moe_train.mix import mix as show

    return show(path, as_json=as_json, history=history, against=against)


@app.command(context_settings=OVERRIDES)
def score(
    checkpoint: Checkpoint,
    ids: Annotated[str, typer.Option(metavar="IDS.npy", help="Token ids, whole numbers [batch, sequence].")],
    out: Annotated[str, typer.Option(metavar="NLL.npz", help="Write the array nll, float32 [batch, sequence - 1].")],
    overrides: Overrides = (),
    nproc: NprocOfLayout = None,
) -> Optional[int]:
    """Write the negative log-likelihood of each token.

    In nats, for every token after the first of each row.

    \b
    moe-train score runs/demo --ids ids.npy --out nll.npz
    moe-train score runs/demo --ids ids.npy --out nll.npz --nproc 2 parallel.tensor=2
    """
    from moe_train.inference.score import score as run

    return status(run(checkpoint, ids, out, nproc, overrides))


@app.command(context_settings=OVERRIDES)
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to go on from.")],
    overrides: Overrides = (),
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="Randomness; 0: always the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Sample from the likeliest tokens that make up this probability.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same text.")] = 0,
    nproc: NprocOfLayout = None,
) -> Optional[int]:
    """Sample a continuation of a text.

    \b
    moe-train generate runs/demo --prompt "def main(" --max-tokens 64 --temperature 0.8 --top-p 0.95
    """
    from moe_train.inference.generate import generate as run

    return status(
        run(
            checkpoint,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            nproc=nproc,
            overrides=overrides,
        )
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        return app(args=arguments, prog_name="moe-train", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # as typer ends where the reader of our output has gone (| head)
        if isinstance(end.__context__, BrokenPipeError):
            return 0
        raise
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    if type(error).__name__ == "Abort":  # Ctrl-C, as typer tells it
        return 130
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())  # type: ignore[attr-defined]
        return 0
    if mistake := file_mistake(error):
        error = UserError(mistake)
    code = getattr(error, "exit_code", None)
    if not isinstance(code, int):
        say(traceback.format_exc().rstrip("\n"))
        say("error: this is a bug in moe-train, not in what you asked for; please report the lines above")
        return 1
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    say(f"error: {' '.join(message.splitlines())}{hint}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())

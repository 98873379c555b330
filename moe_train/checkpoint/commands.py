"""The verbs of `moe-train checkpoint`. No logic here: a verb imports one function and calls it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from moe_train.errors import UserError

app = typer.Typer(
    help="List, verify, convert and upcycle checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="An iter_* folder, a run's folder (its latest), RUN_DIR@STEP, or what convert wrote."
    ),
]


def status(result: object) -> int | None:
    """A function's result as exit status: an int is one, anything else (a report, a path) is success."""
    return result if isinstance(result, int) and not isinstance(result, bool) else None


@app.command("list")
def list_(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> Optional[int]:
    """List the checkpoints of a run.

    \b
    moe-train checkpoint list runs/demo
    """
    from moe_train.checkpoint.inspect import list_checkpoints

    return status(list_checkpoints(run, as_json))


@app.command("verify")
def verify(
    checkpoint: Checkpoint,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of a run's folder.")] = False,
) -> Optional[int]:
    """Check every file of a checkpoint by its manifest.

    Also checks that the whole model is there. Ends with status 4 if anything is damaged or missing.

    \b
    moe-train checkpoint verify runs/demo/checkpoints/iter_0000100
    moe-train checkpoint verify runs/demo --all
    """
    from moe_train.checkpoint.inspect import verify as check

    return status(check(checkpoint, every))


@app.command("convert")
def convert(
    from_hf: Annotated[
        Optional[tuple[str, str]],
        typer.Option("--from-hf", metavar="DIR OUT", help="Read a Hugging Face folder."),
    ] = None,
    to_hf: Annotated[
        Optional[tuple[str, str]],
        typer.Option("--to-hf", metavar="CHECKPOINT DIR", help="Write a Hugging Face folder."),
    ] = None,
    weights: Annotated[
        Optional[tuple[str, str]],
        typer.Option("--weights", metavar="CHECKPOINT OUT", help="Keep only the weights."),
    ] = None,
    precision: Annotated[
        Optional[str], typer.Option("--precision", metavar="fp32|bf16", help="With --weights: in this precision.")
    ] = None,
) -> Optional[int]:
    """Convert from or to Hugging Face's format.

    For JetMoE, Llama, Mixtral and OLMoE. With --weights: keep only the weights of a checkpoint.

    \b
    moe-train checkpoint convert --from-hf jetmoe-8b converted
    moe-train checkpoint convert --to-hf runs/demo exported
    moe-train checkpoint convert --weights runs/demo weights --precision bf16
    """
    if sum(option is not None for option in (from_hf, to_hf, weights)) != 1:
        raise UserError("give one of --from-hf DIR OUT, --to-hf CHECKPOINT DIR and --weights CHECKPOINT OUT")
    if precision is not None and (weights is None or precision not in ("fp32", "bf16")):
        raise UserError(f"--precision {precision}: with --weights, give fp32 or bf16")
    if weights:
        from moe_train.checkpoint.weights import extract_weights

        return status(extract_weights(*weights, precision))
    from moe_train.convert import huggingface

    return status(huggingface.from_hf(*from_hf) if from_hf else huggingface.to_hf(*to_hf))  # type: ignore[misc]


@app.command("upcycle")
def upcycle(
    dense: Annotated[
        str,
        typer.Argument(
            metavar="DENSE", help="A checkpoint, a run's folder, or a Hugging Face folder of a dense model."
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new checkpoint.")],
    experts: Annotated[int, typer.Option("--experts", metavar="N", help="Copies of each MLP.")],
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Experts that a token uses.")] = 2,
    router_std: Annotated[
        float, typer.Option("--router-std", metavar="S", help="Standard deviation of the new routers' weights.")
    ] = 0.01,
    noise: Annotated[
        float,
        typer.Option("--noise", metavar="R", help="Noise on each copy, as a part of its weights' standard deviation."),
    ] = 0.0,
    reinitialize: Annotated[
        float,
        typer.Option("--reinitialize", metavar="P", help="Part of each copy's hidden channels that is drawn anew."),
    ] = 0.0,
    router: Annotated[
        Optional[list[str]],
        typer.Option("--router", metavar="KEY=VALUE", help="A key of the new `mlp.router`; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all that is drawn.")] = 1234,
    keep_optimizer: Annotated[
        bool, typer.Option("--keep-optimizer", help="Also carry over the optimizer's state and the place in the run.")
    ] = False,
) -> Optional[int]:
    """Make a mixture of experts out of a dense model.

    Each expert is a copy of the MLP, so that the mixture computes what the dense model does.

    \b
    moe-train checkpoint upcycle runs/dense upcycled --experts 8 --top-k 2
    moe-train checkpoint upcycle llama-1b upcycled --experts 16 --router normalize_logits=true
    """
    from moe_train.convert.upcycle import read_router_keys
    from moe_train.convert.upcycle import upcycle as write

    return status(
        write(
            dense,
            out,
            experts,
            top_k,
            router_std,
            noise,
            reinitialize,
            seed,
            read_router_keys(router or []),
            keep_optimizer,
        )
    )

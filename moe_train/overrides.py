"""What a verb that reads a run file takes after it: keys to set, as a.b=c or --a.b=c."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_train.errors import UserError

OVERRIDES = {"ignore_unknown_options": True}
"""Settings of such a verb: --a.b=c arrives as an argument, like a.b=c."""


def _checked(context: typer.Context, overrides: list[str] | None) -> list[str]:
    """The overrides as they came; what looks like a mistyped option of the verb is told as one."""
    for text in overrides or []:
        name, equals, _ = text.partition("=")
        if not text.startswith("-"):
            continue
        if "." not in name and (not equals or "-" in name.removeprefix("--")):
            from data_pipeline.yaml_marks import suggestion

            known = [option for each in context.command.params for option in each.opts if option.startswith("--")]
            raise UserError(f"there is no option {name}; {suggestion(name, known, 'options')}")
        if not equals:
            raise UserError(f"{text} has no value; write {text}=VALUE, without a space")
    return list(overrides or [])


Overrides = Annotated[
    list[str], typer.Argument(metavar="a.b=c", help="Keys to set, as a.b=c or --a.b=c.", callback=_checked)
]

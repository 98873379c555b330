"""docs/planning.md shows what the commands print: each block of output after a command is compared with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_train.cli import main

PAGE = Path(__file__).parents[3] / "docs" / "planning.md"
SHOWN = re.findall(
    r"```sh\nmoe-train (plan [^\n]+)\n```\n```\n(.*?)\n```\n", PAGE.read_text(encoding="utf-8"), re.DOTALL
)


def test_the_page_has_them() -> None:
    assert {command.split()[1] for command, _ in SHOWN} >= {"compute-optimal", "upcycle", "memory", "layout", "cost"}


# a fit's last digits are the machine's
@pytest.mark.parametrize(("command", "output"), [each for each in SHOWN if " fit " not in each[0]])
def test_the_page_shows_what_is_printed(command: str, output: str, capsys) -> None:
    assert main(command.split()) == 0
    assert capsys.readouterr().out.rstrip("\n") == output

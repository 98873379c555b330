"""Generated exercises: every equation in them holds."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import islice

from moe_train.demo.exercises import _KINDS, math_documents

NUMBER = r"-?\d+(?:/\d+)?"
EQUATION = re.compile(rf"({NUMBER}(?: [-+*/] {NUMBER})+) = ({NUMBER})(?![\d/]| [-+*/])")


def evaluate(expression: str) -> Fraction:
    """The value of a chain of numbers and operators, products first."""
    tokens = [text if text in "+-*/" else f"Fraction('{text}')" for text in expression.split()]
    return eval(" ".join(tokens), {"Fraction": Fraction})


def test_every_equation_holds() -> None:
    checked = 0
    for page in islice(math_documents(seed=7), 200):
        for left, right in EQUATION.findall(page):
            assert evaluate(left) == Fraction(right), f"{left} = {right}"
            checked += 1
    assert checked > 3000


def test_every_kind_appears_and_the_seed_decides() -> None:
    pages = list(islice(math_documents(seed=1), 20))
    assert pages == list(islice(math_documents(seed=1), 20))
    assert pages != list(islice(math_documents(seed=2), 20))
    text = "".join(pages)
    verbs = "Add Subtract Multiply Divide Solve Find Continue Sort percent travels system denominator".split()
    assert len(verbs) == len(_KINDS) and all(verb in text for verb in verbs)

"""Generated exercises in arithmetic with their solutions, step by step: a source without end and without a
download.

Every step that is written is computed, so a model can learn the rules from the text. The numbers come from a
seeded generator: the same seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import gcd
from random import Random

EXERCISES_PER_DOCUMENT = (8, 16)


def math_documents(seed: int) -> Iterator[str]:
    """Pages of numbered exercises of mixed kinds, without end."""
    rng = Random(seed)
    while True:
        pages = [rng.choice(_KINDS)(rng) for _ in range(rng.randint(*EXERCISES_PER_DOCUMENT))]
        yield "\n\n".join(f"Exercise {number}. {text}" for number, text in enumerate(pages, start=1)) + "\n"


def _sum(rng: Random) -> str:
    terms = [rng.randint(2, 10 ** rng.randint(1, 3)) for _ in range(rng.randint(2, 5))]
    lines, total = [f"Add {', '.join(map(str, terms[:-1]))} and {terms[-1]}."], terms[0]
    for term in terms[1:]:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return "\n".join([*lines, f"The sum is {total}."])


def _difference(rng: Random) -> str:
    a, b = rng.randint(10, 9999), rng.randint(10, 9999)
    sign = "positive" if a > b else "negative" if a < b else "zero"
    return f"Subtract {b} from {a}.\n{a} - {b} = {a - b}\nThe difference is {sign}."


def _product(rng: Random) -> str:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, units = b // 10 * 10, b % 10
    return "\n".join(
        [
            f"Multiply {a} by {b}.",
            f"{b} = {tens} + {units}",
            f"{a} * {tens} = {a * tens}",
            f"{a} * {units} = {a * units}",
            f"{a * tens} + {a * units} = {a * b}",
            f"The product is {a * b}.",
        ]
    )


def _division(rng: Random) -> str:
    a, b = rng.randint(50, 9999), rng.randint(3, 99)
    quotient, rest = divmod(a, b)
    check = f"{b} * {quotient} = {b * quotient} and {b * quotient} + {rest} = {a}"
    return f"Divide {a} by {b} with remainder.\n{check}\nThe quotient is {quotient} and the remainder is {rest}."


def _linear_equation(rng: Random) -> str:
    a, x, b = rng.randint(2, 20), rng.randint(-30, 30), rng.randint(1, 99)
    name = rng.choice("abkmnptxyz")
    return "\n".join(
        [
            f"Solve {a}{name} + {b} = {a * x + b} for {name}.",
            f"Subtract {b} from both sides: {a}{name} = {a * x}.",
            f"Divide both sides by {a}: {name} = {x}.",
            f"Check: {a} * {x} + {b} = {a * x} + {b} = {a * x + b}.",
        ]
    )


def _linear_system(rng: Random) -> str:
    x, y, c = rng.randint(-20, 20), rng.randint(-20, 20), rng.randint(2, 9)
    return "\n".join(
        [
            f"Solve the system x + y = {x + y}, x - {c}y = {x - c * y}.",
            f"Subtract the second equation from the first: {c + 1}y = {(c + 1) * y}, so y = {y}.",
            f"Then x = {x + y} - {y} = {x}." if y >= 0 else f"Then x = {x + y} + {-y} = {x}.",
        ]
    )


def _common_divisor(rng: Random) -> str:
    factor = rng.randint(1, 30)
    a, b = sorted((factor * rng.randint(2, 60), factor * rng.randint(2, 60)), reverse=True)
    lines, m, n = [f"Find the greatest common divisor of {a} and {b}."], a, b
    while n:
        lines.append(f"{m} = {m // n} * {n} + {m % n}")
        m, n = n, m % n
    return "\n".join([*lines, f"The greatest common divisor is {gcd(a, b)}."])


def _fractions(rng: Random) -> str:
    p, q = (Fraction(rng.randint(1, 15), rng.randint(2, 15)) for _ in range(2))
    common = p.denominator * q.denominator // gcd(p.denominator, q.denominator)
    left, right = p.numerator * common // p.denominator, q.numerator * common // q.denominator
    lines = [f"Add {p} and {q}.", f"The common denominator is {common}."]
    lines.append(f"{left}/{common} + {right}/{common} = {left + right}/{common}")
    return "\n".join([*lines, f"In lowest terms the sum is {p + q}."])


def _sequence(rng: Random) -> str:
    first, step, length = rng.randint(-50, 99), rng.randint(2, 25), rng.randint(4, 7)
    terms = [first + step * i for i in range(length + 1)]
    shown = ", ".join(map(str, terms[:-1]))
    rule = f"Each term is {step} more than the one before it."
    return f"Continue the sequence {shown}.\n{rule}\nNext: {terms[-1]}."


def _percentage(rng: Random) -> str:
    percent, price = 5 * rng.randint(1, 18), 20 * rng.randint(2, 90)
    part = percent * price // 100
    goods = rng.choice(("book", "chair", "coat", "lamp", "radio", "table", "ticket", "watch"))
    return "\n".join(
        [
            f"A {goods} costs {price} euros. The price falls by {percent} percent. What does it cost now?",
            f"{percent} percent of {price} is {percent} * {price} / 100 = {part}.",
            f"{price} - {part} = {price - part}",
            f"The {goods} costs {price - part} euros.",
        ]
    )


def _journey(rng: Random) -> str:
    speed, hours = 5 * rng.randint(2, 24), rng.randint(2, 12)
    who = rng.choice(("bus", "car", "cyclist", "ship", "train", "truck"))
    return "\n".join(
        [
            f"A {who} travels {speed * hours} km in {hours} hours at a constant speed."
            f" How far does it get in {hours + 3} hours?",
            f"The speed is {speed * hours} / {hours} = {speed} km an hour.",
            f"In {hours + 3} hours it travels {speed} * {hours + 3} = {speed * (hours + 3)} km.",
        ]
    )


def _order(rng: Random) -> str:
    numbers = rng.sample(range(-99, 1000), rng.randint(4, 7))
    given, ordered = (", ".join(map(str, each)) for each in (numbers, sorted(numbers)))
    return f"Sort {given}.\nIn increasing order: {ordered}.\nThe largest is {max(numbers)}."


_KINDS = (
    _sum,
    _difference,
    _product,
    _division,
    _linear_equation,
    _linear_system,
    _common_divisor,
    _fractions,
    _sequence,
    _percentage,
    _journey,
    _order,
)

"""The learning rate against values computed by hand."""

from __future__ import annotations

import math

import pytest

from moe_train.errors import UserError
from moe_train.training.config import ScheduleConfig
from moe_train.training.schedule import LearningRate, learning_rate
from moe_train.units import Duration

B = 10**9
JETMOE = ScheduleConfig(kind="wsd", warmup="10B", warmup_init_ratio=0.1, decay="250B", min_lr_ratio=0.1)


def small(**changes):
    """100 tokens of warm-up from 0, 400 of decay to 10%, in a run of 1000."""
    settings = {"warmup": 100, "decay": 400, "warmup_init_ratio": 0.0, "min_lr_ratio": 0.1, **changes}
    return LearningRate(ScheduleConfig(**settings), 1.0, 1000, 10)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.5e-4),
        (5 * B, 2.75e-4),  # half-way from 0.5e-4 to 5e-4
        (10 * B, 5e-4),
        (1000 * B, 5e-4),
        (1125 * B, 5e-4 * 0.31622776601683794),  # half of a decade
        (1250 * B, 0.5e-4),
        (1300 * B, 0.5e-4),
    ],
)
def test_jetmoe(tokens, expected):
    assert learning_rate(tokens, JETMOE, 5e-4, 1250 * B, 4 * 2**20) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("form", "quarter", "half"),
    [
        ("exponential", 10**-0.25, 10**-0.5),
        ("linear", 0.775, 0.55),
        ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)), 0.55),
        ("1-sqrt", 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5))),
    ],
)
def test_decay_forms(form, quarter, half):
    rate = small(decay_form=form)
    assert rate(599) == rate(600) == 1.0 and rate.decay_start == 600
    assert rate(700) == pytest.approx(quarter, rel=1e-12)
    assert rate(800) == pytest.approx(half, rel=1e-12)
    assert rate(1000) == rate(2000) == 0.1


def test_cosine_and_constant():
    cosine = small(kind="cosine")
    assert [cosine(0), cosine(50), cosine(100)] == [0.0, 0.5, 1.0]
    assert cosine(550) == pytest.approx(0.55) and cosine(1000) == 0.1
    constant = small(kind="constant")
    assert [constant(50), constant(100), constant(999)] == [0.5, 1.0, 1.0]


def test_durations_in_steps_equal_those_in_tokens():
    in_steps, in_tokens = small(warmup="10 steps", decay="40 steps"), small()
    assert all(in_steps(tokens) == in_tokens(tokens) for tokens in range(0, 1001, 10))


def test_no_warmup_and_no_decay():
    rate = small(warmup=0, decay=0)
    assert rate(0) == rate(1000) == 1.0


def test_null_durations_are_parts_of_the_run():
    rate = LearningRate(ScheduleConfig(), 1.0, 1000, 10)
    assert (rate.warmup, rate.decay) == (10, 200)


def test_what_does_not_fit_is_refused():
    both = r"schedule.warmup \(100 = 100 tokens\) and schedule.decay \(950 = 950 tokens\) do not fit"
    with pytest.raises(UserError, match=both):
        small(decay=950)
    with pytest.raises(UserError, match="schedule.warmup .* do not fit into a run of 1000 tokens"):
        small(kind="cosine", warmup=Duration(steps=101))


def test_the_decay_gives_way_to_the_rounding_of_the_run():
    """Phases of 1000 tokens are 992 of whole sequences of 16: what fits the one must fit the other."""
    schedule = ScheduleConfig(warmup=100, decay=900)
    assert LearningRate(schedule, 1.0, 1000, 16).decay_start == 100
    shorter = LearningRate(schedule, 1.0, 992, 16)
    assert shorter.decay_start == shorter.warmup == 100 and shorter(992) == shorter.minimum
    with pytest.raises(UserError, match="do not fit"):
        LearningRate(schedule, 1.0, 984, 16)

"""What counts as a fault, and what is done about it."""

from __future__ import annotations

import math

import pytest

from moe_train.errors import PolicyStop
from moe_train.training.config import FaultsConfig
from moe_train.training.faults import ENOUGH, SKIP_WINDOW, FaultGuard


def guard(steps: int = ENOUGH, **config) -> FaultGuard:
    """One that has seen ``steps`` losses around 3 and gradient norms around 1."""
    made = FaultGuard(FaultsConfig(**config))
    for step in range(steps):
        assert made.judge(step, 3.0 + 0.1 * (-1) ** step, 1.0 + 0.05 * (-1) ** step) is None
    return made


@pytest.mark.parametrize("action", ["skip", "rewind"])
@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_never_learnt_from(loss, norm, action) -> None:
    fault = guard(0, on_nonfinite=action).judge(1, loss, norm)
    assert fault.action == action and "is not finite" in fault.text


@pytest.mark.parametrize("loss, norm, name", [(3.7, 1.0, "loss"), (3.0, 1.4, "gradient norm")])
def test_a_spike_is_so_many_deviations_over_the_window(loss, norm, name) -> None:
    """Losses deviate by 0.1, norms by 0.05 from their means of 3 and 1."""
    fault = guard(spike_deviations=6.0).judge(99, loss, norm)
    assert fault.action == "skip" and fault.text.startswith(f"{name} {max(loss, norm) if name == 'loss' else norm}")
    assert guard(spike_deviations=9.0).judge(99, loss, norm) is None
    assert guard().judge(99, loss, norm) is None  # by default clipping is trusted with as much
    assert guard(ENOUGH - 1, spike_deviations=6.0).judge(99, loss, norm) is None  # too little to compare with
    assert guard(on_spike="ignore").judge(99, loss, norm) is None


def test_a_flat_curve_may_move_a_little() -> None:
    made = FaultGuard(FaultsConfig(spike_deviations=6.0))
    for step in range(ENOUGH):
        made.judge(step, 3.0, 1.0)
    assert made.judge(99, 3.2, 1.05) is None
    assert made.judge(99, 3.5, 1.0) is not None


def test_a_spike_does_not_raise_the_limit_of_the_next() -> None:
    made = guard(spike_deviations=6.0)
    assert [made.judge(99, 9.0, 1.0).text for _ in range(3)] == ["loss 9 is a spike (limit 3.6)"] * 3


@pytest.mark.parametrize("config, loss", [({"on_nonfinite": "stop"}, math.nan), ({"on_spike": "stop"}, 9.0)])
def test_stop_stops_at_the_first(config, loss) -> None:
    with pytest.raises(PolicyStop, match="step 33: loss .*the checkpoint before it is kept"):
        guard(**config).judge(33, loss, 1.0)


def test_other_data_are_judged_by_themselves() -> None:
    """Each phase may have another loss for good; within it a spike is one."""
    made = guard()
    assert made.judge(50, 9.0, 1.0, segment=1) is None
    for step in range(51, 51 + ENOUGH):
        assert made.judge(step, 9.0, 1.0, segment=1) is None
    assert made.judge(99, 20.0, 1.0, segment=1) is not None
    again = FaultGuard(made.config)
    again.restore(made.state())
    assert again.judge(99, 20.0, 1.0, segment=1) is not None and again.judge(99, 20.0, 1.0, segment=2) is None


def test_how_often_is_bounded_and_counted_over_restarts() -> None:
    first = guard(max_skips=2)
    assert first.judge(40, math.nan, 1.0) and first.skips == 1
    second = FaultGuard(FaultsConfig(max_skips=2))
    second.restore(first.state())
    assert second.judge(41, 9.0, 1.0) and second.skips == 2  # the window came along
    with pytest.raises(PolicyStop, match="step 42: .*max_skips 2 of the last 1000 updates were left out before"):
        second.judge(42, math.nan, 1.0)
    assert second.judge(40 + SKIP_WINDOW, math.nan, 1.0) and second.skips == 3  # the first one is long ago


def test_going_back_takes_the_window_back_but_not_the_count() -> None:
    made = guard(20)
    then = made.state()
    for step in range(20, 40):
        made.judge(step, 6.0, 1.0)
    assert made.judge(40, math.nan, 1.0)
    made.rewind(then)
    assert made.state() == {**then, "skips": 1, "recent": [40]}

"""Which rank the others wait for."""

from __future__ import annotations

from moe_train.training.slow_ranks import IN_A_ROW, SlowRanks


def test_the_slowest_is_named_with_its_host() -> None:
    ranks = SlowRanks(["a", "a", "b", "b"])
    for seconds in ([1.0, 1.1, 1.0, 3.0], [1.0, 0.9, 1.0, 1.0]):
        ranks.add(seconds)
    assert ranks.report() == {"max_over_median": 2.0, "slowest": 3, "host": "b"}
    ranks.add([2.0, 1.0, 1.0, 1.0])
    assert ranks.report() == {"max_over_median": 2.0, "slowest": 0, "host": "a"}  # each report stands alone


def test_it_is_said_once_when_it_lasts() -> None:
    ranks, said = SlowRanks(["a", "b", "c"]), []
    for _ in range(IN_A_ROW + 2):
        ranks.add([1.0, 1.0, 1.5])
        said.append(ranks.warning(ranks.report()))
    assert [text is not None for text in said] == [False] * (IN_A_ROW - 1) + [True, False, False]
    assert "rank 2 on c takes 1.50 x" in said[IN_A_ROW - 1]


def test_taking_turns_is_nobodys_fault() -> None:
    ranks = SlowRanks(["a", "b", "c"])
    for number in range(3 * IN_A_ROW):
        ranks.add([2.0 if number % 3 == rank else 1.0 for rank in range(3)])
        assert ranks.warning(ranks.report()) is None


def test_a_rank_that_is_late_is_not_counted_by_those_that_wait(ranks, tmp_path) -> None:
    seen = ranks(2).run("tests.steps_on_ranks:clock_beside_a_late_rank", {}, late=1, stopped=str(tmp_path / "stopped"))
    assert seen == [["forward", "forward", "stop"]] * 2

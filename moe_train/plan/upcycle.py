"""`moe-train plan upcycle`: start a mixture of experts from a dense checkpoint, or from scratch.

Skywork-MoE's rule (arXiv 2406.06563, section 4): it depends on the training that the mixture will get,
compared with what the dense model got. Their evidence: a dense model of 0.3B trained on 300B tokens. After
100B tokens of the mixture (2/3 of the dense cost) upcycling and training from scratch were level; after
300B (twice the dense cost) scratch was ahead.
"""

from __future__ import annotations

import json
from typing import Any

from moe_train.plan.quantities import number, part, positive

LEVEL = 2 / 3
"""Cost of the mixture over that of the dense model at which both ways were level."""

FROM_SCRATCH = 2.0
"""From this ratio on the rule is to train from scratch."""

COST_PER_TOKEN = 2.0
"""GPU-hours that a token of the mixture took per token of the dense model (8 experts, top-2)."""


def upcycle(
    *,
    dense_tokens: str,
    moe_tokens: str,
    cost_ratio: float = COST_PER_TOKEN,
    learning_rate_ratio: float | None = None,
    as_json: bool = False,
) -> None:
    """Print the advice for a dense checkpoint trained on `dense_tokens` (0: there is none) and a budget of
    `moe_tokens`; raises UserError, one line."""
    answer = advise(dense_tokens, moe_tokens, cost_ratio, learning_rate_ratio)
    if as_json:
        print(json.dumps(answer))
        return
    print(answer["advice"])
    for reason in answer["reasons"]:
        print(f"- {reason}")


def advise(
    dense_tokens: str, moe_tokens: str, cost_ratio: float = COST_PER_TOKEN, rate: float | None = None
) -> dict[str, Any]:
    """The ratio of the costs, the advice and its reasons.

    Args:
        cost_ratio: GPU-hours of one token of the mixture over those of one token of the dense model.
        rate: the learning rate at which the dense checkpoint ended, as a part of its peak.
    """
    there_is_one = number(dense_tokens, "--dense-tokens") != 0
    moe = positive(moe_tokens, "--moe-tokens")
    factor = positive(cost_ratio, "--cost-ratio")
    if rate is not None:
        part(rate, "--learning-rate-ratio")
    answer: dict[str, Any] = {"moe_tokens": moe, "cost_ratio": factor}
    if not there_is_one:
        answer |= {"dense_tokens": 0.0, "ratio": None, "choice": "scratch"}
        answer["advice"] = "train from scratch"
        answer["reasons"] = ["there is no dense checkpoint: training one first costs more than it gains the mixture"]
        return answer
    dense = positive(dense_tokens, "--dense-tokens")
    ratio = moe * factor / dense
    choice = "scratch" if ratio >= FROM_SCRATCH else "upcycle" if ratio < LEVEL else "either"
    reasons = [f"the mixture's training costs {ratio:.3g} times what the dense model's did"]
    if choice == "scratch":
        reasons.append(
            f"from {FROM_SCRATCH:g} times on, experts that start as copies stay more alike than those of a"
            " model from scratch, and its loss ends lower"
        )
    elif choice == "upcycle":
        reasons.append(f"below about {LEVEL:.2g} times there is no time to make up for the dense model's start")
    else:
        reasons.append(
            f"between about {LEVEL:.2g} and {FROM_SCRATCH:g} times the two were level or scratch was slightly"
            " ahead: try both for a few percent of the budget"
        )
    if choice != "scratch":
        reasons.append(
            "raise the learning rate again: the checkpoint that went on at its final, low rate was the worst"
        )
    if rate is not None and rate < 0.3 and choice != "scratch":
        reasons.append(f"the dense run ended at {rate:.0%} of its peak rate: an earlier checkpoint upcycles better")
    reasons.append("watch how alike the experts are: the most alike were in the worst model")
    advice = {"scratch": "train from scratch", "upcycle": "upcycle the dense checkpoint", "either": "either"}
    return answer | {
        "dense_tokens": dense,
        "ratio": ratio,
        "choice": choice,
        "advice": advice[choice],
        "reasons": reasons,
    }

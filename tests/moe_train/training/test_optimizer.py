"""What the optimizer says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from moe_train.training.optimizer import Optimizer


def test_the_updates_are_counted_where_there_is_something_to_update() -> None:
    """A rank may update no bias: Apex' Adam leaves the count of such a group as it was when a checkpoint was read."""
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([{"params": [], "step": 3}, {"params": [weight], "step": 5}])
    optimizer = Optimizer.__new__(Optimizer)
    optimizer._chain = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)])
    assert optimizer.steps_taken == 5
    for group in adam.param_groups:
        del group["step"]
    assert optimizer.steps_taken == 0
    weight.grad = torch.ones(2)
    adam.step()
    assert optimizer.steps_taken == 1

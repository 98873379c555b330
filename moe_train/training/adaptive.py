"""Load-balancing coefficients that follow the drop rate of their router (Skywork-MoE eq. 7-9)."""

from __future__ import annotations

from collections.abc import Mapping

from moe_train.model.router import Router
from moe_train.model.router_config import AdaptiveConfig
from moe_train.model.transformer import Transformer
from moe_train.training.router_monitor import routers


class AdaptiveCoefficients:
    """The coefficient of every router of the whole model whose config has ``adaptive``; empty where none has.

    Every rank keeps all of them and learns the drop rates of all of them, from sums over all ranks: so they agree, on
    any layout, without asking each other. They start at ``load_balancing_coef``; the paper leaves the start open.
    """

    def __init__(self, chunks: list[Transformer]):
        model = chunks[0].model_config
        self._routers: dict[str, Router] = routers(chunks)
        configs = {name: model.router_of(name.rpartition(".")[2]) for name in model.routers()}
        self._rules = {name: config.adaptive for name, config in configs.items() if config.adaptive is not None}
        self.values = {name: configs[name].load_balancing_coef for name in self._rules}

    def update(self, drop_rates: Mapping[str, float]) -> None:
        """After a step in which this fraction of the pairs of each router was beyond its experts' capacity."""
        self.restore({name: _next(rule, self.values[name], drop_rates[name]) for name, rule in self._rules.items()})

    def restore(self, values: Mapping[str, float]) -> None:
        """Take over those of ``values`` (of a checkpoint) whose router is still adaptive."""
        self.values = {name: values.get(name, value) for name, value in self.values.items()}
        for name, router in self._routers.items():
            if name in self.values:
                router.load_balancing_coef = self.values[name]


def _next(rule: AdaptiveConfig, coefficient: float, drop_rate: float) -> float:
    return rule.beta * coefficient + (1 - rule.beta) * min(rule.xi * drop_rate, rule.max_coef)

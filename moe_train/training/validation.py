"""Loss on held-out text, by source."""

from __future__ import annotations

import numpy as np
import torch

from data_pipeline.heldout import HeldOut
from moe_train.training.step import Stepper
from parallel.topology import Topology


class Validation:
    """Fixed held-out windows of every source, scored with the model as it is.

    Windows are shared out over the data-parallel ranks micro-batch by micro-batch. The last micro-batch of a rank is
    filled up with repetitions that do not count, so that all ranks take the same number of steps.
    """

    def __init__(self, heldout: dict[str, HeldOut], samples: int, stepper: Stepper, topology: Topology):
        self.stepper, self.topology = stepper, topology
        self.windows = {name: source.windows(samples) for name, source in heldout.items() if source.num_windows}

    def run(self) -> dict[str, float]:
        """``{"validation/<source>": nats per token}``, the same on every rank."""
        layout = self.topology.layout
        sums = torch.zeros(len(self.windows), dtype=torch.float64, device=self.topology.device)
        for number, windows in enumerate(self.windows.values()):
            micro_batches, mine = self._share(windows)
            losses = self.stepper.evaluate(micro_batches)
            sums[number] = losses[: len(mine)].sum()  # of the last stage; zero elsewhere
        self.topology.sum_over_world(sums).div_(layout.tensor)
        return {
            f"validation/{name}": float(total) / len(windows)
            for (name, windows), total in zip(self.windows.items(), sums)
        }

    def _share(self, windows: np.ndarray) -> tuple[list[torch.Tensor], np.ndarray]:
        """This data rank's windows as micro-batches, and which windows those are."""
        size, data = self.stepper.micro_batch_size, self.topology.layout.data
        mine = np.arange(len(windows))[self.topology.data_rank :: data]
        longest = -(-len(windows) // data)
        rounds = -(-longest // size)
        # The interleaved schedule wants as many micro-batches as there are pipeline stages, or a multiple.
        unit = self.topology.layout.pipeline if self.topology.virtual_stages > 1 else 1
        rounds = -(-rounds // unit) * unit
        filled = np.resize(mine if len(mine) else np.zeros(1, int), rounds * size)
        ids = torch.from_numpy(windows[filled]).to(self.topology.device)
        return list(ids.split(size)), mine

"""Which GPU a rank exchanges with. The exchange itself is tried by the tests of the preflight."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.fabric import measure


@pytest.mark.parametrize(
    ("seen", "local", "taken"), [(8, 0, 0), (8, 5, 5), (1, 5, 0), (4, 5, 1)], ids=lambda number: str(number)
)
def test_a_rank_that_sees_only_its_own_gpu_takes_it(monkeypatch, seen, local, taken) -> None:
    """As in `parallel.engine.start`. Here is no GPU: it ends where the ranks would join."""
    devices = []

    def join(backend, **_):
        raise InterruptedError(backend)

    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(InterruptedError, match="nccl"):
        measure(cuda=True)
    assert devices == [torch.device("cuda", taken)]


def test_a_node_where_torch_sees_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="sees no GPU"):
        measure(cuda=True)

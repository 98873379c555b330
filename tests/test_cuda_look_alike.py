"""What looks like a GPU is one where a program would notice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from parallel import engine
from parallel.layout import Layout
from tests.cuda_look_alike.host_waits import host_waits

HERE = "tests.test_cuda_look_alike"


def refusals() -> dict[str, str]:
    """What is wrong on a GPU, and the error that it is here."""
    gpu, host = torch.randn(5, 4, device="cuda", requires_grad=True), torch.ones(4)
    wrong = {
        "sum": lambda: gpu + host,
        "cat": lambda: torch.cat([host[None], gpu]),
        "index": lambda: host[torch.tensor([1], device="cuda")],
        "out": lambda: torch.mul(host, host, out=gpu.detach()[0]),
        "numpy": lambda: gpu.detach().numpy(),
        "pin": lambda: gpu.pin_memory(),
        "generator": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    }
    found = {}
    for name, call in wrong.items():
        try:
            call()
        except (RuntimeError, TypeError) as error:
            found[name] = str(error)
    return found


def exchanges() -> dict[str, str]:
    """What becomes of collectives of the GPU's tensors and of others."""
    engine.start(Layout(1, 1, 1, None, 1, 1), seed=1)
    tensors = {
        "gpu": torch.ones(4, device="cuda"),
        "host": torch.ones(4),
        "strided": torch.ones(4, 2, device="cuda")[:, 0],
    }
    found = {}
    for name, tensor in tensors.items():
        try:
            dist.all_reduce(tensor)
            found[name] = f"{dist.get_backend()} {tensor.device}"
        except RuntimeError as error:
            found[name] = str(error)
    dist.all_gather_object([None], "object")
    return found


def places() -> dict[str, bool]:
    """Whether the results of operations are on the GPU."""
    gpu, host = torch.ones(3, 4, device="cuda"), torch.ones(4)
    weight = torch.nn.Parameter(gpu)
    x = torch.randn(5, 4, device="cuda", requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    (y * 2.0).sum().backward()
    with torch.device("cuda"):
        module = torch.nn.Linear(3, 3)
    return {
        "view": gpu.view(-1)[3:5].is_cuda,
        "like": torch.zeros_like(gpu).is_cuda,
        "dtype": gpu.to(torch.bfloat16).is_cuda,
        "moved": host.to("cuda").is_cuda,
        "product": y.is_cuda,
        "gradients": x.grad.is_cuda and weight.grad.is_cuda,
        "context": module.weight.is_cuda,
        "index": torch.zeros(2, device=torch.cuda.current_device()).is_cuda,
        "host": host.is_cuda,
        "home": gpu.cpu().is_cuda,
        "as a gpu's": host.to(gpu).cpu().is_cuda,
        "meta": host.to("meta").is_cuda or not host.to("meta").is_meta,
        "pinned": torch.empty(3, pin_memory=True).is_cuda,
    }


def waits() -> list[str]:
    """Of a program that waits in every way once."""
    x = torch.ones(2, device="cuda", requires_grad=True)
    y = x.detach()
    with host_waits() as found:
        (
            float(x[0]),
            x.tolist(),
            y[y > 1],
            y.nonzero(),
            torch.tensor([1.0], device="cuda"),
            y.cpu(),
            y[torch.tensor([1])],
        )
        torch.zeros(2, device="cuda").copy_(torch.ones(2)), torch.cuda.synchronize()
        torch.zeros(2, device="cuda").copy_(torch.ones(2).pin_memory(), non_blocking=True), y + 1.0
        y[y > 1] = 0.0
        (x * 2).sum().backward()
    return found


@pytest.fixture(scope="module")
def gpu(gpu_ranks):
    return lambda function: gpu_ranks(1).run(f"{HERE}:{function}")[0]


def test_what_a_gpu_refuses_is_refused(gpu) -> None:
    found = gpu("refusals")
    assert found.keys() == {"sum", "cat", "index", "out", "numpy", "pin", "generator"}
    assert "same device, but found (5, 4) on the GPU, (4,) on the host" in found["sum"]


def test_nccl_takes_the_gpus_tensors(gpu) -> None:
    found = gpu("exchanges")
    assert found["gpu"] == "nccl cuda:0"
    assert found["host"] == "allreduce_ over nccl: a tensor (4,) of cpu"
    assert "NCCL wants contiguous tensors" in found["strided"]


def test_results_are_where_operands_are(gpu) -> None:
    found = gpu("places")
    on_the_host = {"host", "home", "as a gpu's", "meta", "pinned"}
    assert {name for name, there in found.items() if not there} == on_the_host


def test_waits_are_found(gpu) -> None:
    kinds = Counter(each.partition(" ")[0] for each in gpu("waits"))
    ways = ("_local_scalar_dense", "tolist", "nonzero", "tensor", "to", "copy_", "synchronize")
    assert kinds == {**dict.fromkeys(ways, 1), "index": 2}

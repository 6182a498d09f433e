"""Several processes train the same adapter, or are told by name why they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lorainject as li

from processes import run_in_processes


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def spread(model: nn.Module) -> float:
    """Return the largest difference of A and B between the processes."""
    worst = 0.0
    for p in li.parameters(model):
        copies = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, p.detach().contiguous())
        worst = max(worst, *((c - copies[0]).abs().max().item() for c in copies))
    return worst


def inject_with_a_seed_per_rank(rank: int, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    model = small()
    torch.manual_seed(rank)
    li.inject(model, ["0", "2"], r=2, dtype=dtype)
    return spread(model), next(li.parameters(model)).detach()


def inject_another_part_per_rank(rank: int) -> tuple[int, ...]:
    model = small()
    return tuple(next(li.parameters(li.inject(model, [("0", "2")[rank]], r=2))).shape)


def change_a_wrapped_model(rank: int, folder: str) -> list[str]:
    adapted = li.inject(small(), ["0"], r=2)
    li.save(adapted, f"{folder}/{rank}.safetensors")
    model = small()
    ddp = DistributedDataParallel(nn.ModuleDict({"inner": model}))
    messages = []
    for change, target, argument in (
        (li.inject, ddp.module, ["inner.0"]),
        (li.inject, model, ["0"]),
        (li.load, model, f"{folder}/{rank}.safetensors"),
    ):
        try:
            change(target, argument)
        except li.LoraError as error:
            messages.append(str(error))
    del ddp, target
    li.inject(model, ["0"])
    return messages


def everything(rank: int, folder: str) -> dict[str, Any]:
    return {
        "float32": inject_with_a_seed_per_rank(rank, torch.float32),
        "bfloat16": inject_with_a_seed_per_rank(rank, torch.bfloat16),
        "parts": inject_another_part_per_rank(rank),
        "wrapped": change_a_wrapped_model(rank, folder),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found. Starting processes takes most of the time, so that they are started once."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_in_processes(everything, folder, str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_process_gets_the_factors_of_rank_0(dtype, ranks):
    """Whatever seed a process has, inject gives it the A that rank 0 drew, which is that of one process."""
    apart, A = ranks[0][dtype]
    torch_dtype, alone = getattr(torch, dtype), small()
    torch.manual_seed(0)
    assert apart == 0
    assert torch.equal(next(li.parameters(li.inject(alone, ["0", "2"], r=2, dtype=torch_dtype))), A)


def test_processes_with_different_parts_draw_their_own_factors(ranks):
    """Processes that inject different weights, as the stages of a pipeline do, are not brought into line."""
    assert [rank["parts"] for rank in ranks] == [(2, 6), (2, 8)]


def test_a_model_inside_a_live_ddp_is_refused(ranks):
    """inject and load refuse the module inside a DDP, or a part of it: the reducer would not know A and B. Without the
    wrapper the model can be injected."""
    for messages in (rank["wrapped"] for rank in ranks):
        assert len(messages) == 3
        assert all("is already wrapped by DDP, which does not synchronize parameters" in m for m in messages)
        assert all("inject or load first, then wrap" in m for m in messages)

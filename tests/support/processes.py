"""Run a function in several processes that form a gloo process group."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_in_processes(function: Callable[..., Any], folder: Path, *args: Any, world: int = 2) -> list[Any]:
    """Return what function(rank, *args) returned in each process; raise AssertionError with the traceback of one that
    failed.

    Args:
        function: A function at the top of its module, so that a fresh process can import it.
        folder: An empty folder, by which the processes find each other.
        args: Further arguments, which can be pickled, as the results can.
        world: The number of processes.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=_run, args=(results, rank, world, f"file://{folder}/store", function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    by_rank = dict(pickle.loads(results.get(timeout=120)) for _ in processes)  # a queue would share a tensor's memory
    for process in processes:
        process.join()
    for rank, (result, error) in by_rank.items():
        assert error is None, f"rank {rank}:\n{error}"
        by_rank[rank] = result
    return [by_rank[rank] for rank in range(world)]


def _run(results: Any, rank: int, world: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=datetime.timedelta(0, 60))
    try:
        results.put(pickle.dumps((rank, (function(rank, *args), None))))
    except BaseException:
        results.put(pickle.dumps((rank, (None, traceback.format_exc()))))
        raise
    finally:
        dist.destroy_process_group()

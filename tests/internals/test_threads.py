"""Threads: the same bits with one and with several, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject.numerics import tiled_matmul
from lorainject.numerics.threads import defer_interrupt, thread_pool

from models import bits, randomise


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number(threads, dtype, monkeypatch):
    """Merged weights, what is measured, and W0 again; on weights of many tiles."""
    monkeypatch.setattr(tiled_matmul, "TILE", 1 << 10)
    seen = []
    for n in (1, 2, 4):
        threads(n)
        torch.manual_seed(0)
        model = li.inject(nn.Sequential(nn.Linear(96, 200, dtype=dtype)), ["0"], r=4)
        randomise(model, std=0.2)
        before = bits(model[0].weight)
        report = li.merge(model)
        seen.append((bits(model[0].weight), report))
        li.unmerge(model)
        assert bits(model[0].weight) == before
    assert seen[0] == seen[1] == seen[2]


def test_an_error_ends_all(threads):
    """It is raised when no call is under way any more; threads and torch's settings are as before."""
    threads(3)
    running, most = set(), threading.active_count()

    def work(i: int) -> None:
        running.add(i)
        try:
            if i == 5:
                raise ValueError("five")
        finally:
            running.discard(i)

    with pytest.raises(ValueError, match="five"), thread_pool() as each:
        each(work, ((i,) for i in range(100)))
    assert not running
    assert threading.active_count() == most
    assert torch.get_num_threads() == 3
    new = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [3]


def test_an_interrupt_waits():
    """Ctrl-C within `uninterrupted` comes when it ends, and the handler is the old one again; in another thread it is not touched."""
    before, reached = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), defer_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is before
    inside = []

    def elsewhere() -> None:
        with defer_interrupt():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert inside == [before]

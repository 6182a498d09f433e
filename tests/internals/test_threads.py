"""Threads change neither a bit of a merge nor the settings of torch; an interrupt can be deferred."""

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

from models import bits, randomize


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(set_threads, dtype, monkeypatch):
    """Merged weights, reports and restored weights are equal, for weights of many tiles."""
    monkeypatch.setattr(tiled_matmul, "TILE", 1 << 10)
    results = []
    for n in (1, 2, 4):
        set_threads(n)
        torch.manual_seed(0)
        model = li.inject(nn.Sequential(nn.Linear(96, 200, dtype=dtype)), ["0"], r=4)
        randomize(model, std=0.2)
        before = bits(model[0].weight)
        report = li.merge(model)
        results.append((bits(model[0].weight), report))
        li.unmerge(model)
        assert bits(model[0].weight) == before
    assert results[0] == results[1] == results[2]


def test_an_error_ends_all_calls(set_threads):
    """It is raised when no call is running any more; the threads are gone, and torch's settings are as before."""
    set_threads(3)
    running, threads = set(), threading.active_count()

    def work(i: int) -> None:
        running.add(i)
        try:
            if i == 5:
                raise ValueError("five")
        finally:
            running.discard(i)

    with pytest.raises(ValueError, match="five"), thread_pool() as for_each:
        for_each(work, ((i,) for i in range(100)))
    assert not running
    assert threading.active_count() == threads
    assert torch.get_num_threads() == 3
    in_new_thread = []
    thread = threading.Thread(target=lambda: in_new_thread.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert in_new_thread == [3]


@pytest.fixture
def default_handler():
    """A shell lets commands in the background ignore Ctrl-C; the tests need Python's handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_an_interrupt_is_deferred():
    """Ctrl-C arrives at the end of the block, and the old handler is back; other threads do not touch the handler."""
    before, reached = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), defer_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is before
    inside = []

    def in_thread() -> None:
        with defer_interrupt():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert inside == [before]

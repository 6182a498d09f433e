"""Threads for work that is cut into tiles: one for each of torch's, in which torch itself uses one.

(Several threads inside an operator on a small tile wait for each other longer than they work.)
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

ForEach = Callable[[Callable[..., object], Iterable[Any]], None]
"""Call a function with each of these tuples of arguments. The first error is raised when no call is under way any more."""


@contextmanager
def thread_pool(device: torch.device | str = "cpu") -> Iterator[ForEach]:
    """As many as torch has threads; on a GPU, or where torch has one, the calling thread."""
    before = torch.get_num_threads()
    threads = min(before, 8)  # more would wait for Python
    if threads == 1 or torch.device(device).type != "cpu":
        yield _each_here
        return
    with ThreadPoolExecutor(threads, initializer=_start) as pool:

        def each(function: Callable[..., object], items: Iterable[Any]) -> None:
            """Each of them in whichever thread is free."""
            calls = [pool.submit(function, *item) for item in items]
            try:
                for call in calls:
                    call.result()
            except BaseException:
                for call in calls:
                    call.cancel()
                for call in calls:
                    if not call.cancelled():
                        call.exception()  # waits
                raise

        torch.set_num_threads(
            1
        )  # here too: a thread that shares an operator with this one stays busy for a while, in wait for the next
        try:
            yield each
        finally:
            pool.shutdown()
            torch.set_num_threads(before)  # what the last thread has set, new threads would begin with


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """An interrupt (SIGINT) within it comes at its end. Other threads than the main one get none anyway."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])


def _each_here(function: Callable[..., object], items: Iterable[Any]) -> None:
    for item in items:
        function(*item)


def _start() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # this is each thread's own

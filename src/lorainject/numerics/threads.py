"""A pool of threads for work that is cut into tiles, and a context that defers an interrupt.

The pool has as many threads as torch would use, and torch uses one thread inside each of them: several threads inside
one operator on a small tile would wait for each other longer than they work.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

MAX_THREADS = 8  # more threads would wait for Python's global lock

ForEach = Callable[[Callable[..., object], Iterable[Any]], None]
"""Call a function with each tuple of arguments. The first error is raised after all running calls have ended."""


@contextmanager
def thread_pool(device: torch.device | str = "cpu") -> Iterator[ForEach]:
    """Yield a function that calls another with each tuple of arguments, in as many threads as torch is set to use.

    On a GPU, or where torch is set to one thread, the calls run in the calling thread, in order.
    """
    threads = torch.get_num_threads()
    if threads == 1 or torch.device(device).type != "cpu":
        yield _in_this_thread
        return
    with ThreadPoolExecutor(min(threads, MAX_THREADS), initializer=_start_thread) as pool:

        def in_any_thread(function: Callable[..., object], arguments: Iterable[Any]) -> None:
            calls = [pool.submit(function, *args) for args in arguments]
            try:
                for call in calls:
                    call.result()
            except BaseException:
                for call in calls:
                    call.cancel()
                for call in calls:
                    if not call.cancelled():
                        call.exception()  # waits for the call's end
                raise

        # In the calling thread too: a thread of torch's that shared an operator with it would spin afterwards.
        torch.set_num_threads(1)
        try:
            yield in_any_thread
        finally:
            pool.shutdown()
            torch.set_num_threads(threads)  # new threads begin with the number that was set last, in whichever thread


def _in_this_thread(function: Callable[..., object], arguments: Iterable[Any]) -> None:
    for args in arguments:
        function(*args)


def _start_thread() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # grad mode is a setting of each thread


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Defer an interrupt (SIGINT) to the end of the block. Threads other than the main thread never receive one."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    interrupts: list[tuple[int, Any]] = []
    handler = signal.signal(signal.SIGINT, lambda *args: interrupts.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if interrupts and callable(handler):
            handler(*interrupts[0])

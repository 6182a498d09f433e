"""Callers that live side by side: threads, tasks of asyncio and generators that wait for the next thing to run."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Function = Callable[[], Any]


class Caller:
    """The main thread, outside of tasks and generators. The other callers are subclasses.

    Args:
        starter: The caller that starts this one, from which it may inherit contexts.
    """

    generator: object | None = None
    """What tells the contexts that a generator opens from those of its consumer. None for other callers."""

    def __init__(self, starter: Caller | None = None) -> None:
        self.contexts: list[Any] = []
        """What is in the caller's context variables, the newest last. A generator shares them with its consumer."""

    def run(self, function: Function) -> Any:
        """Return what the function returns when this caller calls it."""
        return function()

    def close(self) -> None:
        """End the caller."""


class Thread(Caller):
    """A thread of its own, with no contexts, or with a copy of those of its starter."""

    def __init__(self, starter: Caller, inherits: bool = False) -> None:
        super().__init__()
        self.executor = ThreadPoolExecutor(1)
        self.variables = contextvars.copy_context() if inherits else contextvars.Context()
        self.contexts = list(starter.contexts) if inherits else []

    def run(self, function: Function) -> Any:
        return self.executor.submit(self.variables.run, function).result()

    def close(self) -> None:
        self.executor.shutdown()


class Task(Caller):
    """A task of asyncio, which inherits the contexts that are open when it is created."""

    def __init__(self, starter: Caller, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.contexts, self.loop, self.jobs = list(starter.contexts), loop, asyncio.Queue[Any]()
        self.task = loop.create_task(self._serve())

    async def _serve(self) -> None:
        while (job := await self.jobs.get()) is not None:
            function, result = job
            try:
                result.set_result(function())
            except BaseException as e:
                result.set_exception(e)

    def run(self, function: Function) -> Any:
        result = self.loop.create_future()
        self.jobs.put_nowait((function, result))
        return self.loop.run_until_complete(result)

    def close(self) -> None:
        self.jobs.put_nowait(None)
        self.loop.run_until_complete(self.task)


class Generator(Caller):
    """A generator that its starter advances. It is suspended whenever it does not run a function."""

    def __init__(self, starter: Caller) -> None:
        super().__init__()
        self.starter, self.contexts, self.generator = starter, starter.contexts, self
        self.frame = self._serve()
        starter.run(lambda: next(self.frame))

    @staticmethod
    def _serve() -> Iterator[Any]:
        result: Any = None
        while True:
            function = yield result  # type: ignore[misc]
            try:
                result = True, function()
            except BaseException as e:
                result = False, e

    def run(self, function: Function) -> Any:
        succeeded, result = self.starter.run(lambda: self.frame.send(function))  # type: ignore[attr-defined]
        if not succeeded:
            raise result
        return result

    def close(self) -> None:
        self.starter.run(self.frame.close)  # type: ignore[attr-defined]

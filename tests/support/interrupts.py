"""An interrupt (Ctrl-C) at a chosen point of a verb: what the tests of "all or nothing" break verbs with."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def interrupted(function: str, calls: int) -> Iterator[None]:
    """Raise KeyboardInterrupt, once, when a function of lorainject is called after so many earlier calls.

    The interrupt comes once, so the clean-up that follows it runs undisturbed.

    Args:
        function: Where its caller looks the function up, as in "merging.merge.set_grafted".
        calls: The number of calls that go through before.
    """
    module_name, _, name = function.rpartition(".")
    module = importlib.import_module(f"lorainject.{module_name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, _with_interrupt(getattr(module, name), calls))
        yield


def _with_interrupt(function: Callable[..., object], calls: int) -> Callable[..., object]:
    countdown = itertools.count(calls, -1)

    def interruptible(*args: object) -> object:
        if next(countdown) == 0:
            raise KeyboardInterrupt
        return function(*args)

    return interruptible

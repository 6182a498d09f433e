"""An interrupt (Ctrl-C) at a chosen point of a verb: what the tests of "all or nothing" break verbs with."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import lorainject as li

CALLS = {
    li.inject: ["surgery.mount_all", "surgery._freeze", "surgery._new_adapter"],
    li.eject: ["surgery._restore_untouched", "surgery.unmount", "lora.mounting.change_class"],
    li.merge: [
        "merging.merge.set_grafted",
        "merging.strategies.as_matrix",
        "numerics.journal.checksum",
        "lora.mounting.change_class",
    ],
    li.unmerge: [
        "merging.merge.set_grafted",
        "merging.revert.as_matrix",
        "numerics.tile_merge.checksum",
        "numerics.journal.checksum",
        "lora.mounting.change_class",
    ],
}
"""Functions that each verb calls, and in which the tests interrupt it."""


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

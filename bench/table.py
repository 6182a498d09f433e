"""All rows, in the order in which they are printed, and how they are run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

from . import disk, experts, layer, merging, model, verbs
from .measure import Setup
from .row import Result, Row, failed, result

TABLE: tuple[Row, ...] = (*verbs.ROWS, *layer.ROWS, *model.ROWS, *merging.ROWS, *disk.ROWS, *experts.ROWS)


def run(rows: Iterable[Row], on: Setup, tell: Callable[[Result], None]) -> list[Result]:
    """Each row in turn; one that fails is a result too, and does not stop the others."""
    found: list[Result] = []
    for row in rows:
        try:
            for figure in row.measure(on):
                found.append(result(row, figure))
                tell(found[-1])
        except Exception as e:
            found.append(failed(row, e))
            tell(found[-1])
        gc.collect()
    return found

"""All rows, in the order in which they are printed, and how they are run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

from . import disk, experts, layer, merging, model, verbs
from .measure import Setup
from .row import Result, Row, failure, result

TABLE: tuple[Row, ...] = (*verbs.ROWS, *layer.ROWS, *model.ROWS, *merging.ROWS, *disk.ROWS, *experts.ROWS)


def run(rows: Iterable[Row], setup: Setup, report_result: Callable[[Result], None]) -> list[Result]:
    """Run every row in turn. A row that fails is a result too, and does not stop the others."""
    results: list[Result] = []
    for row in rows:
        try:
            for figure in row.measure(setup):
                results.append(result(row, figure))
                report_result(results[-1])
        except Exception as e:
            results.append(failure(row, e))
            report_result(results[-1])
        gc.collect()
    return results

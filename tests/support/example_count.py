"""How many examples a Hypothesis test draws: all of them in the whole suite, a quarter of them by default."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> int:
    """Return the number of examples to draw where the whole suite draws `count`."""
    return max(1, count * settings.default.max_examples // 100)

"""Strengths: what the delta of an adapter is multiplied with where it is used, W0 + t s B A.

The scale s belongs to the adapter and its file. The strength t belongs to whoever uses the adapter: it is part of the
model's default, of a context, or of a merge. It may be any finite number. 0 is the base, 1 the adapter as it was
trained, and a negative strength takes away what training has added.

An adapter that is more than s B A is interpolated, W0 + t (W - W0) with the adapted weight W: magnitudes (DoRA), the
update of a bias, and replacement tensors. At 0 and at 1 the result is then W0 and W to the bit. A larger scale would be
something else for DoRA, whose gain is never 1 at s = 0 (PEFT's `set_scale` does that).

torch.compile compiles again whenever a Python float changes, so compiled code reads 0-d tensors. It reads them for a
strength of 1 as well, to which the product is exact, so that no change of a strength compiles anything. All other code
uses floats, and nothing at all for a strength of 1.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from ..errors import SpecError
from ..numerics.delta import Strength


class Strengths:
    """The strengths of several adapters, in their order.

    Args:
        values: One finite number per adapter.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        ts = tuple(values)
        self.values = None if all(t == 1.0 for t in ts) else ts
        with torch.inference_mode(False):  # a backward saves them
            self.tensors = tuple(torch.tensor(t, dtype=torch.float64, device="cpu") for t in ts)

    values: tuple[float, ...] | None
    """The strengths; None if each is 1."""
    tensors: tuple[Tensor, ...]
    """The same as 0-d tensors, each in memory that no other tensor has: torch.compile guards what shares memory."""

    def __iter__(self) -> Iterator[float]:
        return iter(self.values or (1.0,) * len(self.tensors))

    def __getitem__(self, i: int) -> Strength:
        if is_compiling() and not is_exporting():
            return self.tensors[i]
        return None if self.values is None else self.values[i]

    def __reduce__(self) -> Any:
        return Strengths, (tuple(self),)


def mixed(base: Tensor, adapted: Tensor, strength: Strength) -> Tensor:
    """Return base + t (adapted - base) in the dtype of `adapted`; at 0 and 1 it is exactly one of the two."""
    return adapted if strength is None else adapted * strength + base.to(adapted.dtype) * (1 - strength)


def read_strengths(verb: str, names: Sequence[Any]) -> dict[str, float]:
    """Return the strength of each adapter that a verb was ts: as names, as one list of them, or as one mapping.

    Raises:
        SpecError: A strength is not a finite number; all such strengths are listed.
    """
    listed = names[0] if len(names) == 1 and isinstance(names[0], Iterable) and not isinstance(names[0], str) else names
    strengths = dict(listed) if isinstance(listed, Mapping) else dict.fromkeys(listed, 1.0)
    require_strengths(verb, strengths.items())
    return {name: float(t) for name, t in strengths.items()}


def require_strengths(verb: str, strengths: Iterable[tuple[object, object]]) -> None:
    """Raise SpecError unless the strengths of all these adapters are finite numbers that float32 holds."""
    wrong = [f"{name!r}: {t!r}" for name, t in strengths if not _is_strength(t)]
    if wrong:
        raise SpecError(
            f"{verb}: a strength must be a finite number:",
            wrong,
            "give each adapter a number such as 0.7, where 0 is the base and 1 the adapter as it was trained",
        )


def _is_strength(value: object) -> bool:
    """True if the value is a number whose products with a scale float32 can hold."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and bool(abs(value) <= 1e30)  # type: ignore[operator]

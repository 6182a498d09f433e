"""One batch of several runs: how their batches are put together, and how the outputs are taken apart.

    inputs      {"input_ids": (3, 8)}, {"input_ids": (2, 9)}  ->  {"input_ids": (5, 9)}      rows a a a b b
    outputs     logits (5, 9, V)  ->  (3, 9, V), (2, 9, V)

What has no row for each example belongs to no run: a loss of the whole batch, a cache. The runs get None in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import StateError
from ..lora.active import Choice, choosing
from ..lora.adapter import Term
from ..lora.kernels.per_row import Adapters, RowAssignment
from ..lora.model_index import states_to_switch

Batch = Mapping[str, Any]
"""The inputs of a model by name. Tensors have the batch on axis 0."""


class JointBatch:
    """The batches of several runs as one.

    Args:
        batches: A batch for each run.
        pad: The value by which each entry with a sequence on axis 1 is continued.

    Raises:
        StateError: The batches do not fit together. The error lists every entry that does not.
    """

    def __init__(self, batches: Mapping[str, Batch], pad: Mapping[str, float]) -> None:
        problems: list[str] = []
        self.sizes = [_row_count(name, batch, problems) for name, batch in batches.items()]
        self.rows = [name for name, size in zip(batches, self.sizes, strict=True) for _ in range(size)]
        columns: dict[str, list[Any]] = {}
        for key in dict.fromkeys(key for batch in batches.values() for key in batch):
            if absent := [name for name, batch in batches.items() if key not in batch]:
                problems.append(f"{key}: the batch of {', '.join(map(repr, absent))} has none")
            else:
                columns[key] = self._aligned(key, [batch[key] for batch in batches.values()], pad, problems)
        if problems:
            raise StateError(
                "the batches of the runs cannot be put together:",
                problems,
                'make the shapes equal, pass pad={"input_ids": 0, ...} for sequences, or pass mode="alternate"',
            )
        self.parts = {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(batches)}
        self.inputs = {k: torch.cat(c) if isinstance(c[0], Tensor) else c[0] for k, c in columns.items()}

    rows: list[str]
    """The run of each row."""
    parts: dict[str, dict[str, Any]]
    """The batch of each run, padded."""
    inputs: dict[str, Any]
    """All batches as one."""

    def split(self, outputs: Any) -> dict[str, Any]:
        """Return the part of the outputs that belongs to each run.

        Raises:
            StateError: No tensor in the outputs has a row for each example.
        """
        leaves, structure = tree_flatten(outputs)
        has_rows = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(self.rows) for leaf in leaves]
        if not any(has_rows):
            raise StateError(
                f"the forward returned a {type(outputs).__name__} without a tensor whose first axis is the batch of"
                f" {len(self.rows)} rows, so that it cannot be divided among the runs",
                way_out='return such tensors from forward=, or pass mode="alternate"',
            )
        nothing = [None] * len(self.sizes)
        columns = [leaf.split(self.sizes) if ok else nothing for leaf, ok in zip(leaves, has_rows, strict=True)]
        parts = zip(*columns, strict=True)
        return {name: tree_unflatten(list(part), structure) for name, part in zip(self.parts, parts, strict=True)}

    def _aligned(self, key: str, values: list[Any], pad: Mapping[str, float], problems: list[str]) -> list[Any]:
        """Return one entry of all batches, padded to one length."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not tensors:
            if any(value is not values[0] and value != values[0] for value in values):
                problems.append(f"{key}: is no tensor, and differs between the runs: {values}")
            return values
        if len(tensors) < len(values) or any(t.ndim == 0 for t in tensors):
            problems.append(f"{key}: must be a tensor with the batch on axis 0 for every run")
            return values
        if key in pad and all(t.ndim > 1 for t in tensors):
            length = max(t.shape[1] for t in tensors)
            length += length == len(self.rows)  # `rows` refuses a batch as long as it has rows: it may be transposed
            tensors = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, length - t.shape[1]), value=pad[key]) for t in tensors]
        if len({(t.shape[1:], t.dtype, t.device) for t in tensors}) > 1:
            problems.append(f"{key}: {', '.join(f'{tuple(t.shape)} {t.dtype} on {t.device}' for t in tensors)}")
        return tensors


def require_rows(model: nn.Module, joint: JointBatch, forward: Callable[[nn.Module, Batch], Any]) -> None:
    """Run a forward without gradients, and raise StateError with every adapter that does not see which row of a batch
    is whose. Random generators are afterwards as before."""
    trial = _TrialRows(joint.rows)
    states = states_to_switch(model, "sweep", *joint.parts, nested=True)
    devices = range(torch.cuda.device_count())
    try:
        with choosing(states, Choice(rows=trial), "rows"), torch.no_grad(), torch.random.fork_rng(devices):
            joint.split(forward(model, joint.inputs))
    except StateError as e:
        trial.problems.append(_problem(e))
    if trial.problems:
        raise StateError(
            "these adapters cannot be trained in one batch:",
            dict.fromkeys(trial.problems),
            'pass mode="alternate", or leave these layers out: exclude=[...]',
        )


class _TrialRows(RowAssignment):
    """Collects what `rows` would refuse, instead of raising it at the first layer."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.problems: list[str] = []

    def add_terms(self, adapters: Adapters, term: Term, y: Tensor, x: Tensor, y_is_ours: bool) -> Tensor:
        try:
            return super().add_terms(adapters, term, y, x, y_is_ours)
        except StateError as e:
            self.problems.append(_problem(e))
            return y


def _row_count(name: str, batch: Batch, problems: list[str]) -> int:
    """Return the number of rows of a batch."""
    if not isinstance(batch, Mapping):
        problems.append(f"the batch of {name!r} is no mapping, but {type(batch).__name__}")
        return 0
    sizes = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if len({*sizes.values()}) != 1:
        problems.append(f"the batch of {name!r} must have one number of rows, not {sizes}")
    return next(iter(sizes.values()), 0)


def _problem(error: StateError) -> str:
    return str(error).partition("\n=>")[0]

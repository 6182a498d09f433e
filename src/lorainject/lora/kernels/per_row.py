"""One adapter per row of a batch: the plan of `rows(...)`, and a kernel for rows of a few tokens.

`RowAssignment` is made once for a batch, and all layers share it. It adds the term of each adapter to the rows of that
adapter, one adapter after the other. Consecutive rows are a view; other rows are gathered and written back.

**Few tokens per adapter.** `PerRowTerms` computes all rows in two batched products, however many adapters there are:

    y_NTO += (x_NTI A_NRI^T) (t s B^T)_NRO

Each row has its own copy of A and B, made once per layer and context. Adapters of a lower rank are filled up with
zeros, and so are the rows of the base. It takes 0.5 of the overhead of one adapter after the other for 32 rows with 8
or 32 adapters, and 0.9 for 8 rows with 8 adapters, in a context with 8 forwards of one token (112 linears, d 512, r 8,
float32, Zen 3). Making the copies costs as much as five such forwards of 8 rows save; they take memory, at most as much
as the weight.

Suffixes name axes: N rows of the batch, T tokens per row, I input features, O output features, R the highest rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import StateError
from ...numerics.delta import Strength
from ..adapter import LoraAdapter, Term
from ..strength import Strengths
from .gemm import compute_dtype
from .lora_linear import active_dropout, add_linear_term, has_plain_factors, needs_plain_operators

MIN_ADAPTERS = 3
"""From so many adapters on, ..."""
MAX_TOKENS = 24
"""... and up to so many tokens per adapter, batched products are faster than two products for each adapter."""

Adapters = Mapping[str | None, LoraAdapter]
"""The adapters of one layer, by name."""


class RowAssignment:
    """A batch whose row i (axis 0) uses the adapter names[i], or the base model where that is None.

    Args:
        names: One entry per row.
        strengths: The strength of each row's adapter. None: 1 each.
    """

    def __init__(self, names: Sequence[str | None], strengths: Sequence[float] | None = None) -> None:
        self.names = tuple(names)
        self.strengths = (1.0,) * len(names) if strengths is None else tuple(strengths)
        self.used = tuple(dict.fromkeys(name for name in names if name is not None))
        rows = list(zip(self.names, self.strengths, strict=True))
        self.runs: list[tuple[str | None, slice]] = []
        for (name, _), group in groupby(range(len(names)), key=rows.__getitem__):
            run = list(group)
            self.runs.append((name, slice(run[0], run[-1] + 1)))
        self.run_strengths = Strengths(self.strengths[run.start] for _, run in self.runs)
        self.groups: list[tuple[str, Strength, slice | Tensor]] = []
        for name, strength in dict.fromkeys(rows):
            if name is not None:
                numbers = [i for i, row in enumerate(rows) if row == (name, strength)]
                is_run = numbers[-1] - numbers[0] == len(numbers) - 1
                index = slice(numbers[0], numbers[-1] + 1) if is_run else torch.tensor(numbers)
                self.groups.append((name, None if strength == 1 else strength, index))
        self.kernels: dict[int, PerRowTerms] = {}

    names: tuple[str | None, ...]
    used: tuple[str, ...]
    """The adapters in `names`, each once."""
    strengths: tuple[float, ...]
    """The strength of each row's adapter."""
    runs: list[tuple[str | None, slice]]
    """Consecutive rows with the same adapter and strength, or with none, in the order of the batch."""
    run_strengths: Strengths
    """The strength of each run."""
    groups: list[tuple[str, Strength, slice | Tensor]]
    """Each adapter with each of its strengths, and all rows that use it so: a run, or a tensor of their numbers."""
    kernels: dict[int, PerRowTerms]
    """The batched factors of each layer, by the id of its adapters. They are freed with the context."""

    def add_terms(self, adapters: Adapters, term: Term, y: Tensor, x: Tensor, y_is_ours: bool) -> Tensor:
        """Return y with the term of each adapter added to the rows of that adapter.

        Args:
            adapters: The adapters of the layer.
            term: The function that adds a term (kernels/terms.py).
            y: The output of the base layer, shape (batch, tokens, ..., out).
            x: The input of the layer, shape (batch, tokens, ..., in), or token ids for an embedding.
            y_is_ours: True if terms may be added in place.

        Raises:
            StateError: Axis 0 of the input is not certain to be the batch.
        """
        used = [name for name in self.used if name in adapters]
        if not used:
            return y
        self._require_batch(adapters, y, x)
        if len(self.runs) == 1:
            return adapters[self.names[0]](term, y, x, y_is_ours, self.run_strengths[0])
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._cat_runs(adapters, term, y, x)
        if not (y_is_ours and y.is_contiguous()):
            y = y.clone(memory_format=torch.contiguous_format)
        if term is add_linear_term and (kernel := self._kernel(adapters, used, y, x)) is not None:
            kernel.add_terms(y, x)
            return y
        for name, strength, rows in self.groups:
            if name not in adapters:
                continue
            y_rows = y[rows]  # a view of a run, else a copy
            result = adapters[name](term, y_rows, x[rows], True, strength)
            if isinstance(rows, Tensor) or result.data_ptr() != y_rows.data_ptr():
                y[rows] = result
        return y

    def _cat_runs(self, adapters: Adapters, term: Term, y: Tensor, x: Tensor) -> Tensor:
        """Return the runs of rows with their terms, put together again: autograd would not follow writes into y."""
        sizes = [run.stop - run.start for _, run in self.runs]
        outputs = []
        for i, (y_run, x_run) in enumerate(zip(y.split(sizes), x.split(sizes), strict=True)):
            name, strength = self.runs[i][0], self.run_strengths[i]
            outputs.append(adapters[name](term, y_run, x_run, False, strength) if name in adapters else y_run)
        return torch.cat(outputs)

    def _kernel(self, adapters: Adapters, names: Sequence[str], y: Tensor, x: Tensor) -> PerRowTerms | None:
        """Return the batched factors of a layer; None if they cannot be batched, or are as fast one by one."""
        is_short = len(names) >= MIN_ADAPTERS and y.shape[:-1].numel() <= MAX_TOKENS * len(names)
        if not is_short or needs_plain_operators(y):
            return None
        used = [adapters[name] for name in names]
        kernel = self.kernels.get(id(adapters))
        if kernel is None or not kernel.is_current(used):
            if not PerRowTerms.can_batch(used, len(self.names), y, x):
                return None
            numbers = [names.index(name) if name in names else None for name in self.names]
            kernel = self.kernels[id(adapters)] = PerRowTerms(used, numbers, self.strengths, y)
        return kernel

    def _require_batch(self, adapters: Adapters, y: Tensor, x: Tensor) -> None:
        """Raise StateError unless axis 0 is certain to be the batch.

        An input without a sequence axis may be tokens in any order (experts), and one whose axis 1 is as long as the
        batch may be transposed.
        """
        batch, axes = len(self.names), y.shape[:-1]
        if len(axes) < 2 or axes[0] != batch or axes[1] == batch > 1:
            way_out = (
                "give one name per row of the batch; pad a batch whose sequences are as long as it has rows; exclude"
                " modules that see the batch in another layout (pooled, flattened, transposed); with beam search repeat"
                " each name num_beams times"
            )
            if axes == (batch,):
                way_out = (
                    "its rows may be tokens of several examples (mixtures of experts flatten them): if each row is one"
                    " example, give the model a batch with a further axis, as in model(x[:, None])[:, 0]; else exclude"
                    " this module"
                )
            raise StateError(
                f"rows(...) names {batch} rows, but {next(iter(adapters.values())).site or 'a module'} got an"
                f" input of shape {tuple(x.shape)}, whose first axis is not certain to be these rows",
                way_out=way_out,
            )


class PerRowTerms:
    """The factors of the adapters of one layer, copied for every row of a batch.

    Args:
        adapters: The adapters that the batch uses.
        numbers: For each row, the number of its adapter in `adapters`, or None for the base.
        strengths: The strength of each row's adapter.
        y: An output of the layer, for its dtype and device.
    """

    def __init__(
        self, adapters: Sequence[LoraAdapter], numbers: Sequence[int | None], strengths: Sequence[float], y: Tensor
    ) -> None:
        self.copied = [(adapter.A, adapter.B, adapter.scale, _versions(adapter)) for adapter in adapters]
        self.device = y.device
        dtype, r = compute_dtype(y, 1), max(adapter.r for adapter in adapters)
        A: list[Tensor] = [A for A, *_ in self.copied]
        B: list[Tensor] = [B.t() for _, B, *_ in self.copied]
        if any(adapter.r < r for adapter in adapters):
            A, B = ([pad(t, (0, 0, 0, r - len(t))) for t in factors] for factors in (A, B))
        # Few calls for all rows, since a batch may be used once: with one per adapter this takes twice the time.
        rows = zip(numbers, strengths, strict=True)
        scales = [0.0 if i is None else adapters[i].scale * strength for i, strength in rows]
        s = torch.tensor(scales, dtype=torch.promote_types(dtype, torch.float32), device=y.device)
        self.A_NRI = torch.stack([A[i or 0] for i in numbers]).to(dtype)
        self.B_NRO = (torch.stack([B[i or 0] for i in numbers]) * s.view(-1, 1, 1)).to(dtype)
        self.parts = adapters[0].parts or ((slice(None), slice(None)),)

    @staticmethod
    def can_batch(adapters: Sequence[LoraAdapter], rows: int, y: Tensor, x: Tensor) -> bool:
        """True if A and B may be read without calling the adapters, which all stand for the same outputs, and their
        copies take no more memory than the weight."""
        in_features, out_features = x.shape[-1], y.shape[-1]
        size = rows * max(adapter.r for adapter in adapters) * (in_features + out_features)
        return size <= in_features * out_features and all(
            has_plain_factors(adapter, y.device) and not active_dropout(adapter) and adapter.parts == adapters[0].parts
            for adapter in adapters
        )

    def is_current(self, adapters: Sequence[LoraAdapter]) -> bool:
        """True if the copies are still those of these adapters: no A or B was replaced, moved or written to, no
        scale was changed, and no adapter has got a hook, or dropout."""
        return len(adapters) == len(self.copied) and all(
            adapter.A is A
            and adapter.B is B
            and adapter.scale == scale
            and _versions(adapter) == versions
            and has_plain_factors(adapter, self.device)
            and not active_dropout(adapter)
            for adapter, (A, B, scale, versions) in zip(adapters, self.copied, strict=True)
        )

    def add_terms(self, y: Tensor, x: Tensor) -> None:
        """Add the term of each row of x (batch, ..., in) to y (batch, ..., out), contiguous, in place."""
        rows = len(y)
        h_NTR = torch.bmm(x.reshape(rows, -1, x.shape[-1]).to(self.A_NRI.dtype), self.A_NRI.mT)
        for columns, rows_of_B in self.parts:
            y_NTO, B_NRO = y.view(rows, -1, y.shape[-1])[..., columns], self.B_NRO[..., rows_of_B]
            if y.dtype == h_NTR.dtype:
                y_NTO.baddbmm_(h_NTR, B_NRO)
            else:
                y_NTO.add_(torch.bmm(h_NTR, B_NRO))


def _versions(adapter: LoraAdapter) -> tuple[int, int, int, int]:
    """Return numbers that change when A or B is written to, or gets other memory."""
    return adapter.A._version, adapter.A.data_ptr(), adapter.B._version, adapter.B.data_ptr()

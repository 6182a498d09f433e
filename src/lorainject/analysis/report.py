"""A report on adapters as one page of HTML: what they adapt, how much of their rank they use, and what is unusual.

The page needs no network and no script, follows the reader's light or dark setting, and prints. Every figure has a
table of its numbers, and `as_json` has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoraError, SpecError, system_errors
from ..files.io.open_adapter import Hints
from ..files.record import AdapterFile
from ..numerics.modes import in_default_modes
from .measures import LayerSimilarity, Similarity, SiteMeasures, between_adapters, between_layers, measure, oddities
from .spectra import Spectrum
from .updates import AdapterUpdates, Source, adapter_updates, load_base


@dataclass(frozen=True, kw_only=True)
class Report:
    """The measures of one or several adapters. It prints as a summary."""

    adapters: tuple[str, ...]
    sites: tuple[SiteMeasures, ...]
    """One row per adapter and weight."""
    similarities: tuple[Similarity, ...] = ()
    """How similar the adapters are to one another at each weight."""
    layers: Mapping[str, tuple[LayerSimilarity, ...]] = field(default_factory=dict)
    """How similar the layers of one adapter are to one another, by adapter."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What is unusual, by adapter."""

    def rows(self, adapter: str) -> list[SiteMeasures]:
        """Return the rows of one adapter."""
        return [row for row in self.sites if row.adapter == adapter]

    def as_json(self) -> dict[str, Any]:
        """Return everything as values of JSON."""
        return asdict(self)

    def html(self) -> str:
        """Return the page.

        Raises:
            LoraError: matplotlib or jinja2 is not installed.
        """
        try:
            from .page import render
        except ModuleNotFoundError as e:
            way_out = 'pip install "lorainject[analysis]"; as_json() and print(report) need neither'
            raise LoraError(f"a page needs the package {e.name}", way_out=way_out) from e
        return render(self)

    def write(self, path: str | Path) -> Path:
        """Write the page to a file, and return the path.

        Raises:
            LoraError: matplotlib or jinja2 is not installed.
            FileError: The file cannot be written.
        """
        page = self.html()
        with system_errors(f"{path} cannot be written"):
            Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def __str__(self) -> str:
        lines = []
        for name in self.adapters:
            rows = self.rows(name)
            norm = math.hypot(*(row.norm for row in rows))
            share = sum(row.rank_95 for row in rows) / max(1, sum(row.r for row in rows))
            lines.append(
                f"{name}: {len(rows)} weights, |dW| = {norm:.4g}, 95 % of the energy in {share:.0%} of the rank"
            )
            if sizes := [row.relative_size for row in rows if row.relative_size is not None]:
                lines[-1] += f", |dW| / |W0| from {min(sizes):.2%} to {max(sizes):.2%}"
            lines += [f"  note: {note}" for note in self.notes.get(name, ())]
        return "\n".join(lines)


@in_default_modes
@torch.no_grad()
def report(
    *adapters: Source, base: nn.Module | str | Path | None = None, check_base: bool = True, allow_pickle: bool = False,
    hints: Hints | None = None,
) -> Report:  # fmt: skip
    """Measure one or several adapters, and compare them with one another.

    Args:
        adapters: Models that carry adapters, records, or paths of adapter files of any format.
        base: The base model of records and files, or the directory of its checkpoint. Without it, there is nothing
            about W0: no relative size, amplification, survival or intruder dimensions.
        check_base: Refuse a base other than the one that a file was made for, as far as the file tells.
        allow_pickle, hints: As in `read`.

    Returns:
        The report, which writes a page, gives JSON, and prints as a summary. Weights that cannot be read (quantized, on
        the meta device, sharded) are named with the reason.

    Raises:
        SpecError: No adapter was passed.
        StateError: A model carries no adapter, or its adapters are merged.
        FileError: A file cannot be read, or does not fit the base.
    """
    if not adapters or not all(isinstance(a, nn.Module | AdapterFile | str | Path) for a in adapters):
        shown = ", ".join(type(a).__name__ for a in adapters) or "nothing"
        way_out = "report('adapter', base='model'), or report(model) for a model that carries adapters"
        raise SpecError(f"a report needs adapters as paths, records or models, not {shown}", way_out=way_out)
    model = load_base(Path(base)) if isinstance(base, str | Path) else base
    found: dict[str, AdapterUpdates] = {}
    for source in adapters:
        options: dict[str, Any] = {"check_base": check_base, "allow_pickle": allow_pickle, "hints": hints}
        for adapter in adapter_updates(source, model, **options):
            found[_free_name(adapter.name, source, found)] = adapter
    sites: list[SiteMeasures] = []
    spectra: dict[str, dict[str, Spectrum]] = {}
    notes = {}
    for name, adapter in found.items():
        measured = [measure(name, update) for update in adapter.updates]
        sites += [row for row, _ in measured]
        spectra[name] = {row.name: parts for row, parts in measured}
        notes[name] = (*oddities([row for row, _ in measured]), *adapter.notes)
    return Report(
        adapters=tuple(found), sites=tuple(sites), similarities=tuple(between_adapters(spectra)),
        layers={name: tuple(between_layers(parts)) for name, parts in spectra.items()}, notes=notes,
    )  # fmt: skip


def _free_name(name: str, source: Source, taken: Mapping[str, object]) -> str:
    """Return the adapter's name, or the name of its file where that is taken, or a number in addition."""
    path = source.path if isinstance(source, AdapterFile) else None if isinstance(source, nn.Module) else Path(source)
    names = [name, *([path.name] if path is not None else []), *(f"{name} {n}" for n in range(2, len(taken) + 3))]
    return next(candidate for candidate in names if candidate not in taken)

"""What a serving engine would ignore or misread in an adapter file: `check`.

The rows of `li.ENGINES` say what each engine applies (files/engines.py). What an exact conversion rewrites is told
apart from what has no form in the engine at all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files.convert import read
from ..files.engines import Engine, engine
from ..files.fit import fit_record
from ..files.io.open_adapter import CONFIG, Hints
from ..files.record import AdapterFile, StoredSite
from ..numerics.modes import in_default_modes
from .terms import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preflight:
    """What `check` found. Prints as a list."""

    engine: str
    """The engine, with the version whose code the facts come from."""
    refused: tuple[str, ...]
    """What the engine ignores or misreads, and no conversion can express for it; one line per tensor."""
    rewritten: tuple[str, ...]
    """What the engine ignores or misreads in this file, and `convert` for the engine rewrites exactly."""
    asks: str | None
    """What the engine must be told when it is started."""

    @property
    def ok(self) -> bool:
        """True if the engine serves the file as it is."""
        return not self.refused and not self.rewritten

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return dataclasses.asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        if self.ok:
            return f"{self.engine} serves this file as it is" + f"; {self.asks}" * bool(self.asks)
        lines = [f"{self.engine} would not serve this file as it was trained:"]
        lines += [f"  - {line} (convert rewrites it)" for line in self.rewritten]
        lines += [f"  - {line} (no form in this engine)" for line in self.refused]
        step = "merge the adapter into the model, or leave these out with convert and lossy=True" if self.refused else \
            "convert the file for this engine: convert(..., engine=...)"  # fmt: skip
        return "\n".join([*lines, f"=> {step}"])


@in_default_modes
def check(adapter: Adapter, engine_name: str, *, hints: Hints | None = None) -> Preflight:
    """Name every tensor of an adapter that a serving engine would ignore or misread.

    Args:
        adapter: A path of any format, or a record.
        engine_name: A name in `li.ENGINES`.
        hints: What the file does not say; with `hints.model` more can be checked.

    Returns:
        What cannot be served, what a conversion rewrites, and how to start the engine.

    Raises:
        SpecError: There is no such engine.
        FileError: The file cannot be read.
    """
    row, hints = engine(engine_name), hints or Hints()
    file = adapter if isinstance(adapter, AdapterFile) else read(adapter, hints=hints)
    problems = list[str]()
    try:
        fit, lost = fit_record(file, row.form, lossy=True)
    except FileError as e:
        whole = (str(e).split("\n")[0], *e.problems)
        return Preflight(engine=row.form.library, refused=whole, rewritten=_container(file, row), asks=None)
    refused = [line for line in lost if not line.startswith("left out altogether")]
    kept = {s.name for s in fit.sites}
    for rule in row.checks:
        fit = rule(fit, hints, problems)
    rewritten = [*_container(file, row)]
    by_name = {s.name: s for s in fit.sites}
    for s in file.sites:
        if not any(line.startswith(f"{s.name}: ") for line in refused):
            rewritten += [f"{s.name}: {why}" for why in _misread(s, by_name.get(s.name))]
    known = {s.name for s in file.sites}
    rewritten += [f"{s.name}: needs an adapter of zeros" for s in fit.sites if s.name not in kept | known]
    asks = row.asks(fit) if fit.sites and not problems else None
    return Preflight(engine=row.form.library, refused=(*refused, *problems), rewritten=tuple(rewritten), asks=asks)


def _container(file: AdapterFile, row: Engine) -> tuple[str, ...]:
    """Return a line if the engine does not read files of this format at all."""
    has_config = file.format == "lorainject" and row.reads == "peft" and (Path(file.path) / CONFIG).is_file()
    if file.format == row.reads or has_config:
        return ()
    return (f"{file.path}: is of the format {file.format}, and the engine reads {row.reads}",)


def _misread(s: StoredSite, fitted: StoredSite | None) -> list[str]:
    """Return what the engine would misread of a site that has an exact form in the engine."""
    if fitted is None:
        what = "a slice" if s.rows is not None else "a stack of experts" if s.A.ndim == 3 else "a site"
        return [f"is {what}, which the engine has under other names only"]
    lines = []
    if s.r != fitted.r:
        lines.append(f"has rank {s.r}, where the engine takes one rank for all ({fitted.r})")
    if s.scale != fitted.scale:
        lines.append(f"has scale {s.scale:.6g}, where the engine takes one scale for all ({fitted.scale:.6g})")
    elif s.scaling != fitted.scaling:
        lines.append(
            f"has the rank-stabilized scale {s.scale:.6g}, which the engine would take for {s.alpha / s.r:.6g}"
        )
    return lines

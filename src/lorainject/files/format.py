"""What a format is: a row with three functions (claims, read, write), and what of a record it can hold.

A new format is a module in formats/ with a FORMAT, a line in convert.py's table, and one more test parameter. How a
record is brought into what a format can hold is in fit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .io.open_adapter import Hints, Source
from .record import AdapterFile, StoredSite

Files = Mapping[Path, Iterable[bytes | memoryview] | None]
"""Files to be written: the bytes in pieces by path; None for a file that must not exist afterwards."""

FEATURES: dict[str, Callable[[StoredSite], bool]] = {
    "slices": lambda s: s.rows is not None,
    "stacks": lambda s: s.A.ndim == 3,
    "embeddings": lambda s: s.embedding,
    "convolutions": lambda s: s.kind == "conv",
    "transposed convolutions": lambda s: s.kind == "conv^T",
    "parameters": lambda s: s.parameter != "weight" and s.A.ndim == 2,
    "magnitudes": lambda s: s.magnitude is not None and s.magnitude_axis == "out",
    "magnitudes by input": lambda s: s.magnitude is not None and s.magnitude_axis == "in",
    "bias updates": lambda s: s.bias is not None,
}
"""What a site may have beyond A and B of a linear weight, and how to see it."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of adapter files."""

    name: str
    """Its name in `li.FORMATS`."""
    library: str
    """The library that writes it, with the version that this reader and writer were tested against."""
    claims: Callable[[Source], bool]
    """True if a source is of this format, by its content."""
    read: Callable[[Source, Hints, list[str]], AdapterFile | None]
    """Returns the record, or None if nothing can be read. What is wrong with the source goes into the list."""
    write: Callable[[AdapterFile, Path, Hints], Files]
    """Returns the files for a record that fits the format. Raises FileError where names or hints do not suffice."""
    holds: frozenset[str]
    """Names in FEATURES, and "whole tensors" and "tokens"."""
    scales: str
    """"site": each site has its scale; "alpha": one alpha, divided by the rank of each site; "one": one rank and one
    alpha; "none": s = 1."""
    suffix: str = ""
    """Ending of its single file; empty for a directory."""
    names: frozenset[str] = frozenset({"hf"})
    """The namespaces of records that it can write."""
    heads: tuple[str, ...] = ()
    """Names of the modules whose whole tensors it holds, if it holds no others."""
    instead: str = "choose another format (lorainject holds everything), or lossy=True to leave these out"
    """The next step for what has no place in it."""
    asks: tuple[str, ...] = ()
    """The hints that reading such a file needs, because it does not hold them: "alpha", "heads", "groups", and "model"
    for names and kinds of layers."""

    def takes(self, name: str) -> bool:
        """True if a whole tensor of this site name has a place in the format."""
        return "whole tensors" in self.holds or name.removesuffix(".bias").rpartition(".")[2] in self.heads

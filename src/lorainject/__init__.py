"""LoRA surgery on PyTorch models: in place, exact, and taken off again without a trace.

In short:

    import lorainject as li
    li.inject(model, targets=["q_proj", "v_proj"], r=8)     # the same object; base frozen, A and B train
    li.save(model, "adapter")                               # only A and B
    li.merge(model); li.unmerge(model)                      # W0 + s B A, and back to the bit
"""

from .errors import (
    FileError,
    GraftError,
    LoraError,
    MergeError,
    SpecError,
    StateError,
    SurvivalWarning,
    TargetError,
    UnreachedAdapter,
)
from .files.adapter import load, save
from .files.checkpoint import merge_checkpoint
from .files.convert import FORMATS, Conversion, convert, read, write
from .files.engines import ENGINES
from .files.inplace import merge_in_place, unmerge_in_place
from .files.record import AdapterFile, StoredSite, TokenRows
from .files.source import Hints
from .files.swap import hotswap
from .find import find
from .merge import MergedSite, MergeReport, deltas, merge, unmerge
from .probe import Reach, probe
from .spec import LoraSpec, Override, Plan, Site
from .surgery import activate, disabled, eject, inject, parameters, rows

__version__ = "0.1.0"

__all__ = [
    "AdapterFile",
    "Conversion",
    "ENGINES",
    "FORMATS",
    "FileError",
    "GraftError",
    "Hints",
    "LoraError",
    "LoraSpec",
    "MergeError",
    "MergeReport",
    "MergedSite",
    "Override",
    "Plan",
    "Reach",
    "Site",
    "SpecError",
    "StateError",
    "StoredSite",
    "SurvivalWarning",
    "TargetError",
    "TokenRows",
    "UnreachedAdapter",
    "activate",
    "convert",
    "deltas",
    "disabled",
    "eject",
    "find",
    "hotswap",
    "inject",
    "load",
    "merge",
    "merge_checkpoint",
    "merge_in_place",
    "parameters",
    "probe",
    "read",
    "rows",
    "save",
    "unmerge",
    "unmerge_in_place",
    "write",
]

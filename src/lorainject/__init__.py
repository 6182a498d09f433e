"""LoRA surgery on PyTorch models: in place, exact, and undone without a trace.

import lorainject as li

li.inject(model, targets=["q_proj", "v_proj"], r=8)     # the same object; the base is frozen, A and B train
li.save(model, "adapter")                               # only A and B
li.merge(model)                                         # W0 + s B A
li.unmerge(model)                                       # W0 again, to the bit
"""

from .checkpoint.merge_copy import merge_checkpoint
from .checkpoint.merge_in_place import merge_in_place, unmerge_in_place
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
from .files.convert import FORMATS, Conversion, convert, read, write
from .files.engines import ENGINES
from .files.hotswap import hotswap
from .files.io.open_adapter import Hints
from .files.record import AdapterFile, StoredSite, TokenRows
from .files.save_load import load, save
from .merging.merge import deltas, merge, unmerge
from .merging.merged import merged
from .merging.report import MergedSite, MergeReport
from .plan import Plan, Site
from .probe import Reach, probe
from .spec import LoraSpec, Override
from .surgery import eject, inject
from .switching import activate, disabled, parameters, rescale, reset, rows, using
from .targets.resolve import find
from .version import __version__  # noqa: F401

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
    "merged",
    "parameters",
    "probe",
    "read",
    "rescale",
    "reset",
    "rows",
    "save",
    "unmerge",
    "unmerge_in_place",
    "using",
    "write",
]

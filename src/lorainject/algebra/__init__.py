"""Adapters as values: sums, lower ranks, comparisons, differences of checkpoints, and what a merged one holds.

    from lorainject import algebra

    algebra.combine(["fr", "legal"], weights=[0.7, 0.3])      one adapter with the weighted sum of the updates
    algebra.compress("fr", r=8)                               the best adapter of a lower rank
    algebra.compare("fr", "de")                               angles between the updates, and shared subspaces
    algebra.verify("base", "fr", "merged")                    does a merged checkpoint hold exactly base + adapter?
    algebra.extract("base", "tuned")                          the adapter that makes one checkpoint into another
    algebra.diff("base", "tuned", "difference")               the same, with an exact rest
    algebra.patch("base", "difference", "tuned")              ... from which the tuned checkpoint is rebuilt to the byte
    algebra.check("fr", "vllm")                               what a serving engine would ignore or misread

Each takes paths or records (`li.read`), needs no model in memory, and returns a record that `li.write` writes, or a
frozen report that prints as a table. `import lorainject` does not import this package.

terms                          adapters as arguments, and the update of each weight of an adapter
sums, reduce, comparison       combine, compress and compare
verification                   verify; judgement and agreement look at one tensor, pairs at two checkpoints
extraction                     extract; stored_weights reads a model's matrices, rank_search finds a low rank
difference, rebuild            diff and patch; low_rank_guess and residuals code a tensor without loss
preflight                      check
"""

from .comparison import ComparedWeight, Comparison, compare
from .difference import CodedTensor, Difference, diff
from .extraction import extract
from .judgement import VerifiedTensor
from .preflight import Preflight, check
from .rebuild import patch
from .reduce import Approximation, ReducedSite, compress
from .sums import combine
from .verification import Verification, verify

__all__ = [
    "Approximation",
    "CodedTensor",
    "ComparedWeight",
    "Comparison",
    "Difference",
    "Preflight",
    "ReducedSite",
    "Verification",
    "VerifiedTensor",
    "check",
    "combine",
    "compare",
    "compress",
    "diff",
    "extract",
    "patch",
    "verify",
]

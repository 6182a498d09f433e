"""Adapters as values: sums, lower ranks, comparisons, differences of checkpoints, and what a merged one holds.

    from lorainject import algebra

    algebra.combine(["fr", "legal"], weights=[0.7, 0.3])      one adapter with the weighted sum of the updates
    algebra.compress("fr", r=8)                               the best adapter of a lower rank
    algebra.compare("fr", "de")                               angles between the updates, and shared subspaces
    algebra.verify("base", "fr", "merged")                    does a merged checkpoint hold exactly base + adapter?

Each takes paths or records (`li.read`), needs no model in memory, and returns a record that `li.write` writes, or a
frozen report that prints as a table. `import lorainject` does not import this package.

terms                          adapters as arguments, and the update of each weight of an adapter
sums, reduce, comparison       combine, compress and compare
verification                   verify; judgement and agreement look at one tensor, pairs at two checkpoints
"""

from .comparison import ComparedWeight, Comparison, compare
from .rebuild import patch
from .reduce import Approximation, ReducedSite, compress
from .difference import CodedTensor, Difference, diff
from .extraction import extract
from .judgement import VerifiedTensor
from .sums import combine
from .verification import Verification, verify

__all__ = [
    "Approximation",
    "ComparedWeight",
    "Comparison",
    "CodedTensor",
    "Difference",
    "ReducedSite",
    "Verification",
    "VerifiedTensor",
    "combine",
    "compare",
    "compress",
    "diff",
    "extract",
    "patch",
    "verify",
]

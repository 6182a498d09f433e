"""What an adapter does to its base, as the LoRA paper studied it, and what each way of adapting would train.

    from lorainject import analysis

    analysis.spectrum(A, B, s)                  singular values of s B A, and how many directions it uses
    analysis.subspace_similarity(A1, A2)        which directions two adapters share (section 7.2)
    analysis.amplification(A, B, W0, s)         what the update amplifies in W0 (section 7.3)
    analysis.intruder_dimensions(W0, W)         new directions among the largest of a tuned weight
    analysis.gradient_norms(model, loss, ...)   gradients over rank, for both scalings
    analysis.report("adapter", base="model")    all of this for an adapter, as a page of HTML and as JSON
    analysis.parameter_budget(model)            what each baseline of the paper would train (section 5.1)

The functions of tensors are pure: shapes and equations stand in their docstrings, and a stack of experts is measured
expert by expert. `import lorainject` does not import this package.

spectra, subspaces         an update by itself, and beside another one
base_weights               an update beside the weight that it is added to
gradients                  training at several ranks
budget                     parameters of every baseline
updates, measures          the weights of an adapter, and the figures of a report
report, page               the report, and how it is drawn
"""

from .base_weights import Amplification, IntruderDimensions, amplification, intruder_dimensions, relative_size
from .budget import Budget, BudgetRow, parameter_budget
from .gradients import gradient_norms
from .measures import LayerSimilarity, Similarity, SiteMeasures
from .report import Report, report
from .spectra import Spectrum, spectrum
from .subspaces import random_similarity, subspace_similarity

__all__ = [
    "Amplification",
    "Budget",
    "BudgetRow",
    "IntruderDimensions",
    "LayerSimilarity",
    "Report",
    "Similarity",
    "SiteMeasures",
    "Spectrum",
    "amplification",
    "gradient_norms",
    "intruder_dimensions",
    "parameter_budget",
    "random_similarity",
    "relative_size",
    "report",
    "spectrum",
    "subspace_similarity",
]

"""The functions that add low-rank terms to the output of a layer, by the form of its weight's kind."""

from __future__ import annotations

from ..adapter import Term, add_embedding_term
from ..weight_kinds import Form
from .lora_linear import add_linear_term

TERMS: dict[Form, Term] = {"linear": add_linear_term, "embedding": add_embedding_term}

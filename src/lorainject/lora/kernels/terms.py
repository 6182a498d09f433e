"""Which function adds the low-rank term of a weight to the output of its layer, by the form of the weight's kind."""

from __future__ import annotations

from ..adapter import Term, add_embedding_term
from ..weight_kinds import Form
from .lora_linear import accumulate

TERMS: dict[Form, Term] = {"linear": accumulate, "embedding": add_embedding_term}

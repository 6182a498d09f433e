"""The functions that add low-rank terms to the output of a layer, by the form of its weight's kind."""

from __future__ import annotations

from torch import nn
from torch.compiler import is_compiling

from ..adapter import Term, add_embedding_term
from ..graft import Graft
from ..weight_kinds import Form, returns_fresh_output
from .lora_linear import add_linear_term

TERMS: dict[Form, Term] = {"linear": add_linear_term, "embedding": add_embedding_term}


def may_write_to_output(layer: Graft) -> bool:
    """True if no one else holds what the base layer has just returned, so that terms may be added in place.

    A quantized or sharded weight gives other outputs. torch.compile fuses the sum by itself, and cannot trace the
    cached look-up of the layer's class.
    """
    if is_compiling() or type(layer._parameters.get("weight")) is not nn.Parameter:
        return False
    return returns_fresh_output(layer._lora_base)  # type: ignore[arg-type]

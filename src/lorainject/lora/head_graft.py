"""The graft of an output head, whose weight other code reads while the model runs.

Fused losses (TRL, liger-kernel, cut-cross-entropy) multiply by the head's weight instead of calling the head. Their
code is often a forward that is stored on the model after inject, and a kernel that takes plain tensors only, so that
neither graft would serve it.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from .checkpoint_region import region_being_run_again
from .forward_graft import LoraForward
from .graft import Graft
from .lazy_weight import METADATA
from .weight_graft import LoraReader, ShadowedWeight


class ReadFromOutside(Graft):
    """Mixin of an output head's graft: what other code reads as its weight is the sum W0 + s B A.

    Fused losses (TRL, liger-kernel, cut-cross-entropy) multiply by the head's weight instead of calling the head. Their
    code is often a forward that is stored on the model after inject, and a kernel that takes plain tensors only. A read
    of the weight or bias therefore returns the dense sum if it happens while some module is called, and is not the
    head's own: in a training forward as a node of the graph, so that A and B get their gradients. It takes memory of
    the weight's size. All other reads return the parameter, as those of FSDP, accelerate and state dicts must.
    """

    def __getattr__(self, name: str) -> Any:
        """Return the parameter, or what a forward that reads it must multiply by."""
        value = super().__getattr__(name)
        if name not in ("weight", "bias") or type(value) is not nn.Parameter or value.is_meta:  # quantized, sharded
            return value
        if torch.compiler.is_compiling() or (reader := _reading_forward(self)) is None:
            return value
        shadow = ShadowedWeight(self, "weight")
        return shadow.dense(reader) if name == "weight" else shadow.updated_bias(value)


def _reading_forward(head: nn.Module) -> str | None:
    """Return the name of the function that reads a parameter of the head right now, if the sum must be read.

    That is: a module is being called, which is not the head running its base's forward, or a checkpointed region is
    being run again; the reader is none of the libraries that move parameters; and it does not just ask for the dtype or
    device.
    """
    reader = sys._getframe(2)
    if str(reader.f_globals.get("__name__")).startswith(("torch.", "accelerate.")):
        return None
    if _next_attribute(reader.f_code, reader.f_lasti) in ("dtype", "device", "shape", "ndim", *METADATA):
        return None
    frame: FrameType | None = reader
    while frame is not None:
        if frame.f_code in _GRAFTED_FORWARDS and frame.f_locals.get("self") is head:
            return None
        if frame.f_code is _MODULE_CALL:
            return reader.f_code.co_name
        frame = frame.f_back
    return None if region_being_run_again() is None else reader.f_code.co_name


@functools.cache
def _next_attribute(code: CodeType, offset: int) -> str | None:
    """Return the attribute that code looks up on the result of the instruction at this offset, as `dtype` in
    head.weight.dtype; None if it does something else with the result."""
    after = next((i for i in dis.get_instructions(code) if i.offset > offset and i.opname != "EXTENDED_ARG"), None)
    return str(after.argval) if after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD") else None


class LoraHead(ReadFromOutside, LoraForward):
    """The forward graft of an output head."""


class LoraHeadReader(ReadFromOutside, LoraReader):
    """The weight graft of an output head, for one whose weight was named as the target."""


_GRAFTED_FORWARDS = (LoraForward.forward.__code__, LoraReader.forward.__code__)
_MODULE_CALL = nn.Module._call_impl.__code__

"""The modes of torch in which every verb works, whatever modes its caller is in.

Within `torch.inference_mode` a new tensor can never be trained or changed in place. Under `torch.set_default_device` or
`with torch.device(...)` a tensor that is made without a device lands elsewhere: on the meta device it holds nothing, so
that a file is read into nothing, and a merge remembers nothing of W0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def in_default_modes(verb: Callable[P, T]) -> Callable[P, T]:
    """Let a function make tensors that can be trained, and on the CPU where it names no device."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        is_cpu = torch.get_default_device().type == "cpu"  # a mode costs time at every call of torch
        with torch.inference_mode(False), nullcontext() if is_cpu else torch.device("cpu"):
            return verb(*args, **kwargs)

    return wrapped

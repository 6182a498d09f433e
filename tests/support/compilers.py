"""What tests do without a C++ compiler: skip, or use Python in the place of what would be compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs a C++ compiler, and there is no g++")
needs_compiler_and_ninja = pytest.mark.skipif(
    not has_compiler or shutil.which("ninja") is None,
    reason="needs a C++ compiler and ninja, with which quanto builds its extension at first use",
)


def use_python_unpacking(patch: pytest.MonkeyPatch) -> None:
    """Let quanto unpack weights of 2 and 4 bits with `unpack` instead of its C++ extension.

    quanto compiles the extension at first use, which takes minutes. `test_python_unpacks_as_quanto_does` compares both.
    """
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        from optimum.quanto.library.extensions import get_extension

        patch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the values of `bits` bits in a uint8 tensor, along axis 0: the lowest bits of all elements come first."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

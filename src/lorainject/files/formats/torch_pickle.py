"""What torch.save writes: the container of those libraries whose adapters are pickles."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def dump(tensors: Mapping[str, Any]) -> bytes:
    """Return the bytes of a pickle of (nested) tables of tensors, each with memory of its own on the CPU."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu().clone().contiguous()
        return {key: copied(item) for key, item in value.items()}

    buffer = io.BytesIO()
    torch.save(copied(tensors), buffer)
    return buffer.getvalue()

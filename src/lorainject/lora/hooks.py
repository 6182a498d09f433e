"""Remember whether a module has hooks, so that a call can skip the look-up of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

HOOKED = "_lora_hooked"  # among a module's attributes once somebody has put a hook on it


def _noting(register: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(register)
    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        vars(self)[HOOKED] = True
        return register(self, *args, **kwargs)

    return noted


class HookAware(nn.Module):
    """A module that every token asks: it notes when it gets hooks, since to look through the four dictionaries of them,
    which have left the cache since the last token, takes as long as a product with one."""

    register_forward_pre_hook = _noting(nn.Module.register_forward_pre_hook)
    register_forward_hook = _noting(nn.Module.register_forward_hook)
    register_backward_hook = _noting(nn.Module.register_backward_hook)
    register_full_backward_hook = _noting(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _noting(nn.Module.register_full_backward_pre_hook)

    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) if is_hooked(self) else self.forward(*args)


def is_hooked(module: HookAware) -> bool:
    """Whether a call of the module has to go through torch, for somebody's hooks."""
    return HOOKED in module.__dict__ or bool(_has_any_global_hook())

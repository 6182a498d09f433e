"""A frozen reference model that is the policy itself, without its adapters or with another one.

Preference training (DPO, GRPO with a KL term) compares the model that is trained, the policy, with a model that is not.
With adapters both have the same base, so that a second copy of it would hold the same weights again. `Reference` is a
module without parameters, whose forward calls the policy within `li.disabled` or `li.using`, in eval mode and without
gradients.

TRL patches the forward of the policy and calls it with another argument (`fused_lm_head`). The reference calls the
policy as a whole, so that such patches hold for both, and a patch of the reference alone is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..lora.model_index import ModelIndex
from ..switching import disabled, using


def reference(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Return a frozen reference model that shares all memory with a model that carries adapters.

    Args:
        model: A model with adapters: the policy.
        adapter: The adapter that the reference uses. None means the base without adapters. Name the adapter of
            supervised fine-tuning here to train another one on top of it.

    Returns:
        A module that computes what `model` computes with this adapter alone, in eval mode and without gradients. It has
        no parameters, so that nothing is moved, sharded or counted twice; its attributes are those of the model.

    Raises:
        StateError: The model has no such adapter, or adapters are merged.
    """
    ModelIndex(model).require_adapters("make a reference", *() if adapter is None else (adapter,), nested=True)
    return Reference(model, adapter)


class Reference(nn.Module):
    """The policy with other adapters than those that are active, as a module of its own.

    Args:
        model: The policy. It is no child of the reference, whose parameters would otherwise be those of the policy.
        adapter: The adapter that is used. None means the base.
    """

    def __init__(self, model: nn.Module, adapter: str | None) -> None:
        super().__init__()
        vars(self).update(policy=model, adapter=adapter)
        self.eval()

    policy: Any
    adapter: str | None

    def __getattr__(self, name: str) -> Any:
        """Return the policy's attribute: its config, its device, its output embeddings."""
        return getattr(vars(self)["policy"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "forward":  # TRL patches the forward of a reference as it patches that of the policy
            super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the policy returns with the reference's adapter alone."""
        with self._choosing():
            return self.policy(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the policy generates with the reference's adapter alone."""
        with self._choosing():
            return self.policy.generate(*args, **kwargs)

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        choice = disabled(self.policy) if self.adapter is None else using(self.policy, self.adapter)
        with torch.no_grad(), _in_eval_mode(self.policy), choice:
            yield

    def train(self, mode: bool = True) -> Reference:
        """Stay in eval mode."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the policy without the adapters that the reference does not use.

        TRL hashes it, to know again which reference it has computed log probabilities for.
        """
        index = ModelIndex(self.policy)
        others = {
            id(t)
            for name in index.adapter_names
            if name != self.adapter
            for adapter in index.adapters_named(name)
            for t in (*adapter.parameters(), *adapter.buffers())
        }
        tensors = self.policy.state_dict(*args, **kwargs | {"keep_vars": True})
        kept = {key: t for key, t in tensors.items() if id(t) not in others}
        return kept if kwargs.get("keep_vars") else {key: t.detach() for key, t in kept.items()}


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode within the context: no dropout, no checkpointing, no running statistics."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        vars(module)["training"] = False
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True

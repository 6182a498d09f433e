"""How large the gradients of A and B are at different ranks: why the scale alpha / sqrt(r) was proposed.

With the scale alpha / r, the gradients of A and B fall as 1 / sqrt(r), so that a higher rank learns no better; with
alpha / sqrt(r) they keep their size.

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732,
theorem 3.2 and figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraError, SpecError
from ..lora.model_index import ModelIndex
from ..surgery import eject, inject
from ..switching import activate, parameters
from ..targets.resolve import find

NAME = "gradient-norms"  # of the adapter that is on the model meanwhile


def gradient_norms(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], targets: str | Sequence[str], ranks: Sequence[int], *,
    scalings: Sequence[str] = ("standard", "rslora"), alpha: float = 16.0, steps: int = 20, lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, seed: int = 0,
) -> dict[str, dict[int, list[float]]]:  # fmt: skip
    """Train one adapter for each rank and scaling, and return the norm of the gradient in every step.

    Each adapter is taken off before the next one begins, and the model is then as before.

    Args:
        model: The base model. Adapters that it carries are off meanwhile.
        loss: A function of the model and the number of the step that returns the loss.
        targets: As in `inject`.
        ranks: The ranks to compare.
        scalings: "standard", "rslora", or both.
        alpha: Numerator of the scale, the same for all ranks.
        steps: Steps of training.
        lr: Learning rate.
        optimizer: Called as optimizer(parameters, lr=lr).
        seed: Seed with which A is drawn, and which each training begins with.

    Returns:
        The norms of the gradient of all A and B together, one per step, by scaling and rank.

    Raises:
        SpecError: A setting is invalid, or a target matches nothing. Everything is checked first.
    """
    index = ModelIndex(model)
    index.require_ready("measure gradients")
    problems = [] if isinstance(steps, int) and steps >= 1 else [f"steps must be at least 1, not {steps!r}"]
    problems += [] if ranks and scalings else ["give at least one rank and one scaling"]
    for scaling in scalings:
        for r in ranks:
            try:
                find(model, targets, r, alpha=alpha, scaling=scaling, name=NAME)
            except LoraError as e:
                problems += [f"{scaling}, r={r}: {problem}" for problem in e.problems or [str(e)]]
    if problems:
        raise SpecError("gradients cannot be measured:", problems, "correct these settings and call again")
    before = index.default
    settings: dict[str, Any] = {"alpha": alpha, "name": NAME}
    norms: dict[str, dict[int, list[float]]] = {}
    for scaling in scalings:
        norms[scaling] = {}
        for r in ranks:
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                inject(model, targets, r, scaling=scaling, **settings)
                try:
                    activate(model, NAME)
                    norms[scaling][r] = _train(model, loss, steps, lr, optimizer)
                finally:
                    activate(model, *before)
                    eject(model, NAME)
    return norms


def _train(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int, lr: float,
    optimizer: Callable[..., torch.optim.Optimizer],
) -> list[float]:  # fmt: skip
    trained = list(parameters(model, NAME))
    optim, norms = optimizer(trained, lr=lr), []
    for step in range(steps):
        optim.zero_grad()
        loss(model, step).backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, math.inf)))
        optim.step()
    return norms

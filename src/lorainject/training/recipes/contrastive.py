"""A trainer for text encoders: each query has to find its positive among all positives of the batch, and back.

    embedding   the mean of the last layer over a text's tokens, scaled to unit length
    loss        InfoNCE in both directions (van den Oord et al. 2018, arXiv 1807.03748, equation 4), temperature 0.05

The other rows of the batch are the negatives, so that larger batches are harder.
Shapes: B rows, T tokens, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

TEMPERATURE = 0.05


class PairsTrainer(Trainer):
    """The Trainer of transformers with the loss on pairs. A batch is {"query": tokens, "positive": tokens}."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        """Return the loss of a batch, a scalar."""
        loss = info_nce(embed(model, inputs["query"]), embed(model, inputs["positive"]))
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
        """Return the loss of a batch of the evaluation, without outputs."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


def embed(model: nn.Module, tokens: Any) -> Tensor:
    """Return the embeddings of B texts, shape (B, D)."""
    h_BTD = model(**tokens).last_hidden_state
    mask_BT1 = tokens["attention_mask"][..., None]
    return F.normalize((h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=-1)


def info_nce(q_BD: Tensor, p_BD: Tensor) -> Tensor:
    """Return the mean cross entropy of finding positive i from query i and query i from positive i."""
    s_BB = q_BD @ p_BD.T / TEMPERATURE
    i_B = torch.arange(len(s_BB), device=s_BB.device)
    return (F.cross_entropy(s_BB, i_B) + F.cross_entropy(s_BB.T, i_B)) / 2

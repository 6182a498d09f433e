"""A text encoder that learns code search, and its score.

    embedding   the mean of the last layer over a text's tokens, scaled to unit length
    loss        InfoNCE over the batch, in both directions (van den Oord et al. 2018, arXiv 1807.03748, equation 4)
    score       recall@1 and mean reciprocal rank (MRR) among all held-out functions

This is not a good code search engine: code is cut after 64 tokens, and training sees half of the pairs, once each.

Shapes: N texts, B pairs of a batch, T tokens, D dimensions of an embedding, H of the last layer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li

from .data import Pair

QUERY, POSITIVE = 32, 64  # tokens kept of each text: nearly every query, the first lines of a function
BATCH, TEMPERATURE = 64, 0.05

Ids = list[list[int]]
"""One list of token ids per text. The lengths differ."""


class Scores(NamedTuple):
    """How well queries find their positives. 1 is perfect."""

    recall_at_1: float
    mrr: float

    def __str__(self) -> str:
        return f"recall@1 {self.recall_at_1:.3f}   MRR {self.mrr:.3f}"


def load_model(source: str | Path, device: str) -> nn.Module:
    """Return the base model in float32 and in eval mode: a few steps need no dropout."""
    return pretrained("AutoModel", source, dtype=torch.float32).to(device).eval()


def load_tokenizer(source: str | Path) -> Callable[[Sequence[Pair]], tuple[Ids, Ids]]:
    """Return a function that turns pairs into token ids of (queries, positives), cut at QUERY and POSITIVE tokens."""
    tokenizer = pretrained("AutoTokenizer", source)

    def tokenize(pairs: Sequence[Pair]) -> tuple[Ids, Ids]:
        queries = tokenizer([p.query for p in pairs], truncation=True, max_length=QUERY)
        positives = tokenizer([p.positive for p in pairs], truncation=True, max_length=POSITIVE)
        return queries["input_ids"], positives["input_ids"]

    return tokenize


def pretrained(auto: str, source: str | Path, **options: Any) -> Any:
    """Return `transformers.<auto>.from_pretrained(source)`. Raise LoraError if the source does not load."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, auto).from_pretrained(source, **options)
    except (OSError, ValueError) as e:
        way_out = "give a directory with a model and its tokenizer, or the name of a model on the Hugging Face hub"
        raise li.LoraError(f"{source} does not load with {auto}: {e}", way_out=way_out) from e


def embed(model: nn.Module, texts: Ids) -> Tensor:
    """Return the embeddings of N texts, shape (N, D)."""
    device = next(model.parameters()).device
    ids_NT = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True).to(device)
    lengths_N1 = torch.tensor([[len(t)] for t in texts], device=device)
    mask_NT = (torch.arange(ids_NT.shape[1], device=device) < lengths_N1).long()
    h_NTD = model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
    return F.normalize((h_NTD * mask_NT[..., None]).sum(1) / lengths_N1, dim=-1)


@torch.inference_mode()
def embed_all(model: nn.Module, texts: tuple[Ids, Ids]) -> Tensor:
    """Return the embeddings of N queries and N positives, shape (2, N, D).

    The texts go through the model in batches of similar length, so that there is little padding.
    """
    both = texts[0] + texts[1]
    order = sorted(range(len(both)), key=lambda i: len(both[i]))
    batches = [order[start : start + BATCH] for start in range(0, len(both), BATCH)]
    sorted_MD = torch.cat([embed(model, [both[i] for i in batch]) for batch in batches])
    return sorted_MD[torch.tensor(order).argsort().to(sorted_MD.device)].unflatten(0, (2, -1))


def retrieval_scores(q_ND: Tensor, p_ND: Tensor) -> Scores:
    """Return the scores when query i searches for positive i among all N.

    Ties count as wrong, so a model that embeds all texts alike scores nothing.
    """
    s_NN = q_ND @ p_ND.T
    rank_N = (s_NN >= s_NN.diagonal()[:, None]).sum(1)
    return Scores(float((rank_N == 1).float().mean()), float((1 / rank_N).mean()))


def info_nce(q_BD: Tensor, p_BD: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return the mean cross entropy of finding positive i from query i and query i from positive i (a scalar)."""
    s_BB = q_BD @ p_BD.T / temperature
    i_B = torch.arange(len(s_BB), device=s_BB.device)
    return (F.cross_entropy(s_BB, i_B) + F.cross_entropy(s_BB.T, i_B)) / 2


def train(model: nn.Module, trained: Sequence[nn.Parameter], texts: tuple[Ids, Ids], *, steps: int, lr: float,
          seed: int, tick: Callable[[float], None] = lambda loss: None) -> list[float]:  # fmt: skip
    """Train with Adam on random batches, and return the loss of each step.

    The learning rate rises over the first tenth of the steps, then falls linearly to zero. `tick` receives each loss.
    """
    queries, positives = texts
    size, rng, warm_up = min(BATCH, len(queries)), random.Random(seed), max(1, steps // 10)
    optimizer, remaining, losses = torch.optim.Adam(trained), list[int](), list[float]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
        if len(remaining) < size:
            remaining = rng.sample(range(len(queries)), len(queries))
        batch, remaining = remaining[:size], remaining[size:]
        loss = info_nce(embed(model, [queries[i] for i in batch]), embed(model, [positives[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        tick(losses[-1])
    return losses

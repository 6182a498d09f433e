"""Code search, the demo's task: the data, the score, and a text encoder that learns it.

    task    a docstring (query) has to find its own function (positive) among all functions held out
    data    Python's standard library, which every machine has; or a JSONL file of {"query": ..., "positive": ...}
    texts   the mean over a text's tokens, scaled to unit length
    loss    InfoNCE over the batch, both ways (van den Oord et al. 2018, arXiv 1807.03748, eq. 4)
    score   recall@1 and mean reciprocal rank (MRR), on modules that training never saw

What makes it fair. A function's name often repeats its docstring, so wherever the name stands in the code it becomes `f`; and
every docstring leaves the code, those of inner functions too. The query is the first paragraph, which is what one would
type. A query or a function that occurs again is dropped, or a right answer would count as wrong. Modules and packages are
whole on one side: neither a file nor its neighbours are in both training and test.

What it is not: a good code search engine. Code is cut at 64 tokens, and training sees half of the pairs, once each.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li

QUERY, POSITIVE = 32, 64  # tokens kept of each: nearly every first paragraph, the first lines of a function
BATCH, TEMPERATURE = 64, 0.05
PER_MODULE = 25
NOT_CODE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}

Ids = list[list[int]]  # one list of token ids for each text; lengths differ


class Pair(NamedTuple):
    """A text to look for, and the one that should be found."""

    module: str
    query: str
    positive: str


class Scores(NamedTuple):
    """How well queries find their positives; 1 is perfect."""

    recall_at_1: float
    mrr: float

    def __str__(self) -> str:
        return f"recall@1 {self.recall_at_1:.3f}   MRR {self.mrr:.3f}"


def extract_pairs(source: str, module: str) -> list[Pair]:
    """(docstring, function) for each function in a source text, inner ones too; the top of this file says what is fair."""
    documented = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]
            if not isinstance(node, ast.ClassDef) and not all(isinstance(s, ast.Pass | ast.Raise) for s in node.body):
                documented.append((node, " ".join(re.split(r"\n\s*\n", doc.strip())[0].split())))
    # Only now are the docstrings of inner functions gone as well.
    return [
        Pair(module, doc, re.sub(rf"\b{node.name}\b", "f", ast.unparse(node)))
        for node, doc in documented
        if doc.count(" ") > 1
    ]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """ast.walk in the order of the text, and not into expressions: most nodes are there, and no definition can be."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _statements(child)


def stdlib_pairs(root: Path | None = None) -> list[Pair]:
    """The pairs of the standard library; a package counts as one module."""
    root, pairs = root or Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not NOT_CODE & set(parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in those sources
                pairs += extract_pairs(path.read_text(encoding="utf-8"), parts[0].removesuffix(".py"))
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL file, each line its own module; raises FileError with every line that is no pair."""
    pairs, problems = [], []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").split("\n"), 1
    ):  # splitlines would split inside strings, at U+2028
        if line.strip():
            try:
                row = json.loads(line)
                pair = Pair(f"line {number}", row["query"].strip(), row["positive"].strip())
                if not (pair.query and pair.positive):
                    raise ValueError
                pairs.append(pair)
            except (ValueError, LookupError, TypeError, AttributeError):
                problems.append(f"line {number}: {line[:60]!r}")
    if problems:
        raise li.FileError(
            f'{path}: lines that are not {{"query": "...", "positive": "..."}}:', problems, "correct or remove them"
        )
    return pairs


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Without the pairs whose query or positive occurred before."""
    kept: list[Pair] = []
    seen: set[str] = set()
    for p in pairs:
        if not {p.query, p.positive} & seen:
            kept.append(p)
        seen |= {p.query, p.positive}
    return kept


def split_by_module(
    pairs: Iterable[Pair], size: int, seed: int, most: int = PER_MODULE
) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): modules in random order are held out until they give `size` pairs, at most `most` from each.

    What such a module has beyond that is used nowhere, so that no big module fills the pool.
    """
    by_module: dict[str, list[Pair]] = {}
    for p in pairs:
        by_module.setdefault(p.module, []).append(p)
    rng, training, held_out = random.Random(seed), list[Pair](), list[Pair]()
    for module in rng.sample(sorted(by_module), len(by_module)):
        if len(held_out) < size:
            held_out += rng.sample(by_module[module], min(most, len(by_module[module])))
        else:
            training += by_module[module]
    return training, held_out[:size]


def load_model(source: str | Path, device: str) -> nn.Module:
    """The base in float32, and in eval mode for good: a few steps need no dropout, and embeddings can be compared."""
    return pretrained("AutoModel", source, dtype=torch.float32).to(device).eval()


def load_tokenizer(source: str | Path) -> Callable[[Sequence[Pair]], tuple[Ids, Ids]]:
    """Pairs -> (queries, positives), each a list of token ids, cut at QUERY and POSITIVE tokens."""
    tokenizer = pretrained("AutoTokenizer", source)

    def tokenize(pairs: Sequence[Pair]) -> tuple[Ids, Ids]:
        queries = tokenizer([p.query for p in pairs], truncation=True, max_length=QUERY)
        return queries["input_ids"], tokenizer([p.positive for p in pairs], truncation=True, max_length=POSITIVE)[
            "input_ids"
        ]

    return tokenize


def pretrained(auto: str, source: str | Path, **options: Any) -> Any:
    """What `transformers.<auto>.from_pretrained` gives; raises LoraError if the source does not load."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, auto).from_pretrained(source, **options)
    except (OSError, ValueError) as e:
        raise li.LoraError(
            f"{source} does not load with {auto}: {e}", way_out="give a folder with model and tokenizer, or a hub name"
        ) from e


def embed(model: nn.Module, texts: Ids) -> Tensor:
    """Mean of the last layer over each text's tokens, scaled to length 1: N texts -> (N, D)."""
    device = next(model.parameters()).device
    ids_NT = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True).to(device)
    lengths_N1 = torch.tensor([[len(t)] for t in texts], device=device)
    mask_NT = (torch.arange(ids_NT.shape[1], device=device) < lengths_N1).long()
    h_NTD = model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
    return F.normalize((h_NTD * mask_NT[..., None]).sum(1) / lengths_N1, dim=-1)


@torch.inference_mode()
def embed_all(model: nn.Module, texts: tuple[Ids, Ids]) -> Tensor:
    """Queries and positives, N each -> (2, N, D); in batches of like length, so that little is padded, and back in order."""
    both = texts[0] + texts[1]
    order = sorted(range(len(both)), key=lambda i: len(both[i]))
    e_MD = torch.cat(
        [embed(model, [both[i] for i in order[start : start + BATCH]]) for start in range(0, len(both), BATCH)]
    )
    return e_MD[torch.tensor(order).argsort().to(e_MD.device)].unflatten(0, (2, -1))


def retrieval_scores(q_ND: Tensor, p_ND: Tensor) -> Scores:
    """Query i looks for positive i among all N. Ties count against it, so a model that embeds all alike scores nothing."""
    s_NN = q_ND @ p_ND.T
    rank_N = (s_NN >= s_NN.diagonal()[:, None]).sum(1)
    return Scores(float((rank_N == 1).float().mean()), float((1 / rank_N).mean()))


def info_nce(q_BD: Tensor, p_BD: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-log of the share that query i gives positive i among the batch's, and positive i query i, averaged: a scalar."""
    s_BB = q_BD @ p_BD.T / temperature
    i_B = torch.arange(len(s_BB), device=s_BB.device)
    return (F.cross_entropy(s_BB, i_B) + F.cross_entropy(s_BB.T, i_B)) / 2


def train(model: nn.Module, trained: Sequence[nn.Parameter], texts: tuple[Ids, Ids], *, steps: int, lr: float, seed: int,
          tick: Callable[[float], None] = lambda loss: None) -> list[float]:  # fmt: skip
    """Adam on random batches; the rate climbs over a tenth of the steps, then falls to zero. Returns the loss of each step."""
    queries, positives = texts
    size, rng, warm = min(BATCH, len(queries)), random.Random(seed), max(1, steps // 10)
    optimizer, left, losses = torch.optim.Adam(trained), list[int](), list[float]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        if len(left) < size:
            left = rng.sample(range(len(queries)), len(queries))
        batch, left = left[:size], left[size:]
        loss = info_nce(embed(model, [queries[i] for i in batch]), embed(model, [positives[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        tick(losses[-1])
    return losses

"""The whole life of an adapter in about two minutes, on a real model and real data: teach a text model to find code.

    task    a docstring (query) has to find its own function (positive) among the functions held out
    data    Python's standard library, which every machine has; or a JSONL file of {"query": ..., "positive": ...}
    model   all-MiniLM-L6-v2: 22.7 million parameters, 6 layers; mean over the tokens, scaled to unit length
    loss    InfoNCE over the batch, both ways (van den Oord et al. 2018, arXiv 1807.03748, eq. 4)
    score   recall@1 and mean reciprocal rank (MRR), over modules that training never saw

What makes it fair. The name of a function often repeats its docstring, so wherever the name stands in the code (calls to
itself included) it becomes `f`; and every docstring leaves the code, those of inner functions too. The query is the first
paragraph, which is what one would type. A query or a function that occurs twice is kept once, for else the right answer
would count as wrong. Modules and packages are whole on one side: no file, nor its neighbours, is in both training and test.

What it does not show. Code is cut at 64 tokens and training sees about a quarter of the pairs once: a minute's work, not a
good code search engine. `method` trains all weights or all biases with the same loop, to compare.
"""

from __future__ import annotations

import ast
import json
import math
import random
import re
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li

METHODS = {"lora": 5e-3, "full": 2e-4, "bitfit": 5e-3}  # and the learning rate that each likes
QUERY, POSITIVE = 32, 64  # tokens kept of each: nearly all of a docstring's first paragraph, the first lines of a function
BATCH, TEMPERATURE = 64, 0.05
HELD_OUT = 400
TOLERANCE = 1e-4  # between embeddings of unit length that float32 computes in another order; 1e-6 is what is seen
NOT_CODE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
Ids = list[list[int]]  # one list of token ids for each text; lengths differ


class Pair(NamedTuple):
    module: str
    query: str
    positive: str


class Scores(NamedTuple):
    recall_at_1: float
    mrr: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the demo measured, and what it wrote."""

    scores: dict[str, Scores]
    """before and after; for LoRA also loaded, merged and exported."""
    losses: list[float]
    trainable: int
    total: int
    files: tuple[Path, ...]


def run(model: str | Path | None = None, data: Path | None = None, out: Path = Path("demo-out"), *, targets: Sequence[str] = ("query", "value"),
        r: int = 8, alpha: float = 16, lr: float | None = None, steps: int = 24, seed: int = 0, method: str = "lora",
        device: str = "cpu") -> Result:  # fmt: skip
    """Train, score, save, load, merge, unmerge and export, telling each step; whatever does not hold raises LoraError.

    `model` is a directory or a hub name (None: the packaged MiniLM), `data` a JSONL file (None: the standard library), `lr`
    None is the method's own. Nothing is written but into `out`.
    """
    source = _settled(model, data, out, lr, steps, method, device)
    report, files = Report(), []

    report.head("Data")
    pairs = distinct(read_pairs(data) if data else stdlib_pairs())
    train_pairs, held_out = split_by_module(pairs, min(HELD_OUT, len(pairs) // 5), seed)
    if len(train_pairs) < 2 or len(held_out) < 2:
        raise li.LoraError(f"{len(pairs)} different pairs are too few to train on and to test with", way_out="give at least 10, in several modules")
    for name, part in (("train", train_pairs), ("held out", held_out)):
        report.say(f"{name:8}  {len(part):5,} pairs from {len({p.module for p in part}):3} modules")
    report.example(held_out[0])
    tokenize = tokenizer(source)
    train_q, train_p = tokenize([p.query for p in train_pairs], QUERY), tokenize([p.positive for p in train_pairs], POSITIVE)
    test_q, test_p = tokenize([p.query for p in held_out], QUERY), tokenize([p.positive for p in held_out], POSITIVE)

    report.head("Plan")
    net = load_model(source, device)
    trainable = make_trainable(net, method, targets, r, alpha, seed, report)
    count, total = sum(p.numel() for p in trainable), sum(p.numel() for n, p in net.named_parameters() if ".lora." not in n)
    report.say(f"trains {count:,} parameters, {count / total:.2%} of the model's {total:,}")

    report.head("Before")
    scores = {"before": report.scores(retrieval_scores(embed_all(net, test_q), embed_all(net, test_p)))}
    report.head(f"Train {steps} steps of {min(BATCH, len(train_q))} pairs")
    with report.progress(steps) as tick:
        losses = train(net, trainable, train_q, train_p, steps=steps, lr=lr or METHODS[method], seed=seed, tick=tick)
    report.head("After")
    after = torch.stack([embed_all(net, test_q), embed_all(net, test_p)])
    scores["after"] = report.scores(retrieval_scores(*after))

    out.mkdir(parents=True, exist_ok=True)
    change = relative_change(li.deltas(net)) if method == "lora" else {}
    if method == "lora":
        scores |= adapter_tour(net, source, device, test_q, test_p, after, out, report)
        files += [out / "adapter", out / "merged"]
    files.append(plot(losses, change, out / "demo.png"))
    report.summary(scores, files)
    return Result(scores=scores, losses=losses, trainable=count, total=total, files=tuple(files))


def adapter_tour(net: nn.Module, source: str | Path, device: str, queries: Ids, positives: Ids, after: Tensor, out: Path,
                 report: Report) -> dict[str, Scores]:  # fmt: skip
    """Save, load, merge, unmerge and export a trained adapter; every model on the way must embed as the trained one does."""
    scores = {}

    def same(name: str, other: nn.Module) -> None:
        """`other` gives the embeddings `after`, (2, N, D), up to rounding."""
        e_2ND = torch.stack([embed_all(other, queries), embed_all(other, positives)])
        scores[name] = retrieval_scores(*e_2ND)
        gap = float((e_2ND - after).abs().max())
        report.check(gap <= TOLERANCE, f"{name}: embeddings " + ("equal to the bit" if gap == 0 else f"equal up to {gap:.0e}"))
        report.scores(scores[name])

    report.head("Save, and load onto a fresh base")
    path = li.save(net, out / "adapter")
    base = load_model(source, device)
    size, whole = sum(f.stat().st_size for f in path.iterdir()), sum(p.nbytes for p in base.parameters())
    report.say(f"adapter on disk: {size / 1e3:,.0f} kB, 1/{whole / size:.0f} of the model's {whole / 1e6:,.1f} MB")
    loaded = li.load(load_model(source, device), path)
    same("loaded", loaded)

    report.head("Merge")
    report.say(str(li.merge(net)))
    report.check([type(m) for m in base.modules()] == [type(m) for n, m in net.named_modules() if "lora" not in n.split(".")],
                 "every module has its original class")  # fmt: skip
    same("merged", net)
    report.table(("forward of 8 functions", "median"), latencies({"base": base, "base + adapter": loaded, "merged": net}, positives[:8]))

    report.head("Unmerge")
    li.unmerge(net)
    now, pristine = net.state_dict(), base.state_dict()
    report.check(all(torch.equal(now[key], W0) for key, W0 in pristine.items()), f"all {len(pristine)} tensors of the base are back, to the bit")

    report.head("Merge for good, export with save_pretrained, read with AutoModel")
    li.merge(net, reversible=False)
    li.eject(net)
    net.save_pretrained(out / "merged")  # type: ignore[operator]
    same("exported", load_model(out / "merged", device))
    return scores


def make_trainable(net: nn.Module, method: str, targets: Sequence[str], r: int, alpha: float, seed: int, report: Report) -> list[nn.Parameter]:
    """Put LoRA on, or thaw everything (full) or all biases (BitFit, Ben Zaken et al. 2021, arXiv 2106.10199); what trains."""
    if method == "lora":
        report.say(str(li.find(net, targets, r, alpha=alpha)))
        torch.manual_seed(seed)
        return list(li.parameters(li.inject(net, targets, r, alpha=alpha)))
    for name, p in net.named_parameters():
        p.requires_grad_(method == "full" or name.endswith("bias"))
    return [p for p in net.parameters() if p.requires_grad]


# ---------------------------------------------------------------------------------------------------------------- data


def extract_pairs(source: str, module: str) -> list[Pair]:
    """(docstring, function) for each function in a source text, inner ones too; see above for what is fair."""
    documented = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]
            if not isinstance(node, ast.ClassDef) and not all(isinstance(s, ast.Pass | ast.Raise) for s in node.body):
                documented.append((node, " ".join(re.split(r"\n\s*\n", doc.strip())[0].split())))
    # Only now, with the docstrings of inner functions gone as well, is there text to make.
    return [Pair(module, doc, re.sub(rf"\b{node.name}\b", "f", ast.unparse(node))) for node, doc in documented if len(doc.split()) > 2]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Like ast.walk, but not into expressions, where most of the nodes are and no definition can be."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _statements(child)


def stdlib_pairs() -> list[Pair]:
    """The pairs of the standard library; a package counts as one module."""
    root, pairs = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not NOT_CODE & set(parts):
            with warnings.catch_warnings(action="ignore"):  # about escapes in the sources, which are not ours
                pairs += extract_pairs(path.read_text(encoding="utf-8"), parts[0].removesuffix(".py"))
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL file, each line its own module; raises FileError with every line that is no pair."""
    pairs, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            texts = [row[key].strip() for key in ("query", "positive")]
            pairs.append(Pair(f"line {number}", *texts))
        except (ValueError, LookupError, TypeError, AttributeError):
            problems.append(f"line {number}: {line[:60]!r}")
    if problems:
        raise li.FileError(f'{path}: these lines are not {{"query": "...", "positive": "..."}}:', problems, "correct or remove them")
    return pairs


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Without the pairs whose query or positive occurred before."""
    kept, seen = [], set()
    for p in pairs:
        if not {p.query, p.positive} & seen:
            kept.append(p)
        seen |= {p.query, p.positive}
    return kept


def split_by_module(pairs: Sequence[Pair], size: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): whole modules in random order are held out as long as they fit into `size` pairs."""
    by_module: dict[str, list[Pair]] = {}
    for p in pairs:
        by_module.setdefault(p.module, []).append(p)
    train, held_out = [], []
    for module in random.Random(seed).sample(sorted(by_module), len(by_module)):
        part = held_out if len(held_out) + len(by_module[module]) <= size else train
        part += by_module[module]
    return train, held_out

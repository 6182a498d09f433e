"""The page of a report: figures by matplotlib as SVG, put into a template of jinja2.

Text and lines of a figure take the color of the page (`currentColor`), so that one figure serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure  # pyplot would look for a screen
from matplotlib.ticker import MaxNLocator

from .measures import LayerSimilarity, Similarity, SiteMeasures, layer_number, starred

INK = "#010203"  # replaced by currentColor
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "lorainject", "font.family": "sans-serif", "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
                     "axes.titlecolor"), INK),
    "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
GRIDS = 6  # similarity grids that are drawn; the table has all pairs
SPECTRA = 12  # lines of one spectrum figure


def render(report: Any) -> str:
    """Return the page as one text of HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lorainject.analysis", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = _number
    with matplotlib.rc_context(STYLE):
        adapters = [_adapter(report, name) for name in report.adapters]
        chosen = _spread(report.similarities, GRIDS)
        grids = _grids(chosen) if chosen else ""
    return environment.get_template("page.html.jinja").render(
        adapters=adapters, similarities=report.similarities, grids=grids, has_base=any(
            row.relative_size is not None for row in report.sites), drawn=chosen,
    )  # fmt: skip


def _adapter(report: Any, name: str) -> dict[str, Any]:
    rows = report.rows(name)
    by_base = all(row.relative_size is not None for row in rows) and bool(rows)
    layers = report.layers.get(name, ())
    return {
        "name": name, "rows": rows, "notes": report.notes.get(name, ()), "by_base": by_base,
        "map": _map(rows, by_base) if rows else "", "spectra": _spectra(rows) if rows else "",
        "ranks": _ranks(rows) if rows else "", "layers": _layer_grids(layers) if layers else "",
        "layer_tables": layers, "parameters": sum(row.matrices * row.r * sum(row.shape) for row in rows),
        "amplification": _amplification(rows) if any(row.amplification for row in rows) else "",
    }  # fmt: skip


def _map(rows: Sequence[SiteMeasures], by_base: bool) -> str:
    """Draw the network: a column per layer, a line per projection, colored by the size of the update."""
    kinds = list(dict.fromkeys(starred(row.name) for row in rows))
    numbers = sorted({n for row in rows if (n := layer_number(row.name)) is not None}) or [0]
    values = np.full((len(kinds), len(numbers)), np.nan)
    for row in rows:
        value = row.relative_size if by_base else row.norm
        column = numbers.index(n) if (n := layer_number(row.name)) is not None else 0
        values[kinds.index(starred(row.name)), column] = np.nan if value is None else value
    figure = Figure(figsize=(3.6 + 0.28 * len(numbers), 1.1 + 0.24 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values * (100 if by_base else 1), aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(numbers) // 16)
    axes.set_xticks(range(0, len(numbers), step), [str(n) for n in numbers[::step]])
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="|ΔW| / |W0| in %" if by_base else "|ΔW|")
    return _svg(figure)


def _spectra(rows: Sequence[SiteMeasures]) -> str:
    """Draw the singular values of some updates, each relative to the largest."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for row, color, style in zip(_spread(rows, SPECTRA), cycle(COLORS), cycle("-" * 6 + ":" * 6), strict=False):
        S = np.array(row.singular_values)
        if S.max(initial=0) > 0:
            shares = S / S[0]
            shares[shares < 1e-10] = np.nan
            axes.plot(range(1, len(S) + 1), shares, marker=".", ls=style, color=color, label=row.name)
    axes.set(xlabel="direction", ylabel="singular value / largest", ylim=(0, 1.05))
    _whole_numbers(axes.xaxis)
    _legend(figure, axes)
    return _svg(figure)


def _ranks(rows: Sequence[SiteMeasures]) -> str:
    """Draw how much of the rank each update uses."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes, x = figure.subplots(), range(len(rows))
    axes.bar(x, [row.r for row in rows], color="#88888855", width=0.9, label="r")
    axes.bar(x, [row.rank_95 for row in rows], color=COLORS[0], width=0.9, label="95 % of the energy")
    known = [(i, row.effective_rank) for i, row in zip(x, rows, strict=True) if row.effective_rank is not None]
    axes.plot(*zip(*known, strict=True), ".", color=COLORS[1], label="effective rank") if known else None
    axes.set(xlabel="weights, in the order of the model", ylabel="rank")
    _whole_numbers(axes.xaxis)
    _legend(figure, axes)
    return _svg(figure)


def _amplification(rows: Sequence[SiteMeasures]) -> str:
    """Draw the amplification factor of each update, and what random directions would give."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes, x = figure.subplots(), range(len(rows))
    series = (([row.amplification for row in rows], COLORS[0], "directions of ΔW"),
              ([row.random_amplification for row in rows], COLORS[1], "random directions"))  # fmt: skip
    for values, color, label in series:
        axes.plot(x, [np.nan if v is None else v for v in values], ".", color=color, label=label)
    axes.set(xlabel="weights, in the order of the model", ylabel="|ΔW| / |UᵀW0V|", yscale="log")
    _whole_numbers(axes.xaxis)
    _legend(figure, axes)
    return _svg(figure)


def _grids(similarities: Sequence[Similarity]) -> str:
    def numbers(n: int) -> list[int]:
        return list(range(1, n + 1))

    return _images([
        (f"{s.site}\n{s.adapters[0]} (down), {s.adapters[1]} (right)", s.grid, numbers(len(s.grid)),
         numbers(len(s.grid[0]))) for s in similarities
    ], "i, j")  # fmt: skip


def _layer_grids(similarities: Sequence[LayerSimilarity]) -> str:
    return _images([(s.projection, s.table, s.layers, s.layers) for s in similarities[: 2 * GRIDS]], "layer")


def _images(parts: Sequence[tuple[str, Any, Sequence[int], Sequence[int]]], label: str) -> str:
    """Draw tables of numbers between 0 and 1 next to one another: title, table, and the numbers of rows and columns."""
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.9, 2.9 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(parts) :]:
        axes.set_visible(False)
    for axes, (title, table, *numbers) in zip(grid.flat, parts, strict=False):
        values = np.array([[np.nan if x is None else x for x in row] for row in table])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(label)
        for set_ticks, ticks in ((axes.set_yticks, numbers[0]), (axes.set_xticks, numbers[1])):
            step = -(-len(ticks) // 8)
            set_ticks(range(0, len(ticks), step), [str(n) for n in ticks[::step]])
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=grid, label="φ", shrink=0.8)
    return _svg(figure)


def _whole_numbers(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=7.5)


def _svg(figure: Figure) -> Any:
    """Return the figure as an svg element whose ink has the color of the text around it."""
    import markupsafe

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
    return markupsafe.Markup(re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor"))


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """Return up to n items, evenly spread from the first to the last."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def _number(x: object, form: str = ".3g") -> str:
    """Return a number as a table shows it; a dash for None."""
    if x is None:
        return "–"
    return format(x, form) if isinstance(x, float) else str(x)

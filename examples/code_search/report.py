"""What the demo shows: headings, lines, checks and tables on the terminal, and the plot."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from textwrap import indent

import lorainject as li

from .data import Pair

# Okabe and Ito's colors, which color-blind people can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Report:
    """Prints the course of the demo. Where there is no terminal, the text is plain and the progress is a few lines."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console, self.start = Console(highlight=False), time.perf_counter()

    def heading(self, title: str) -> None:
        """Print a heading with the seconds since the start."""
        self.console.print(f"\n[bold]{title}[/]  [dim]{time.perf_counter() - self.start:.0f} s[/]")

    def say(self, text: str) -> None:
        """Print indented text."""
        self.console.print(indent(text, "  "), markup=False, soft_wrap=True)

    def check(self, holds: bool, statement: str) -> None:
        """Print that a statement is true. Raise LoraError if it is not, which ends the demo."""
        if not holds:
            way_out = "this is a bug in lorainject: please report it"
            raise li.LoraError(f"the demo found that this does not hold: {statement}", way_out=way_out)
        self.console.print(f"  [green]ok[/] {statement}", soft_wrap=True)

    def example(self, pairs: Sequence[Pair]) -> None:
        """Print a pair whose function is short enough to be read at a glance."""
        from rich.syntax import Syntax

        pair = min(pairs, key=lambda p: (max(map(len, p.positive.split("\n"))) > 70, abs(len(p.positive) - 200)))
        self.say(f"for example, from {pair.module}: \u201c{pair.query}\u201d has to find")
        code = indent(pair.positive, "      ")
        self.console.print(Syntax(code, "python", theme="ansi_dark", background_color="default", word_wrap=True))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table whose first column is text and whose other columns are figures."""
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
        """Yield a function to call with the loss of each step. It moves a bar, or prints about six lines."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        description, remaining = TextColumn("{task.description}"), TimeRemainingColumn()
        columns = (TextColumn(" "), BarColumn(), MofNCompleteColumn(), description, remaining)
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=steps)

            def tick(loss: float) -> None:
                bar.update(task, advance=1, description=f"loss {loss:.2f}")
                done = int(bar.tasks[0].completed)
                if not self.console.is_terminal and done % math.ceil(steps / 6) == 0:
                    self.say(f"step {done:3} of {steps}   loss {loss:.2f}")

            yield tick


def plot(losses: Sequence[float], change: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Draw the loss by step and, if `change` is not empty, how far each layer's weights moved. Return the path."""
    from matplotlib.figure import Figure  # pyplot would look for a screen
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

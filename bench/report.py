"""A run on the screen, as Markdown, as JSON, and compared with an earlier one."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import lorainject as li

from .measure import PATIENCE, Setup
from .row import Result, Row

CONSOLE = Console(highlight=False)
COLUMNS = ("row", "case", "figure", "must", "aim", "measured", "", "beside", "at best", "apart")
TIMES = ("microseconds",)  # the figures that are neither ratios nor bytes
WORSE = 1.1  # an earlier run's figure, times this

HEAD = """# Benchmarks

Made by `scripts/bench`: lorainject, PEFT, and loralib where it has the same feature. Every variant runs once in each
round, in random order, for at least {rounds} rounds, and for a rho until it is steady (its quartiles within a tenth) or
{seconds:.0f} s have passed. A figure is the median over the rounds of a ratio taken within the round, with its
quartiles in brackets. Less is better. What was tried for speed, kept and deleted: [kernels.md](kernels.md).

- **overhead** = T / T(frozen base) - 1; **rho** = overhead(ours) / overhead(PEFT). T is {clock}.
  The row `disk` is wall time with all cores, each run in a fresh process. Memory is what torch's allocator hands out
  during the call, or, where it is called growth, what a fresh process grows by.
- A and B are random, never zero, float32, and the same in all variants (loralib keeps them in the dtype of the weight);
  r = 8 where the case names no other. W0 is the same memory in all variants, unless it is written to (where its pages
  lie decides how fast they are read). PEFT is used as its documentation does. *apart*: the relative difference between
  the outputs (and gradients, where there is a step) of ours and PEFT's in this run, before anything was timed; a large
  one is a failure.
- *at best* is the limit: what the row could be if only what is needed were done. "torch's calls alone" is the base with
  the two products written out by the fastest of torch's operators, measured in the same rounds (bench/floor.py).
- *must* and *aim* are the limits that this project set itself before it was built. `prefill`, `step` and `generate` of
  whole models, and experts on disk, have no must: their aim is that of the row that they are made of.
- *not seen*: the noise of the machine hid one of the two overheads, or the quartiles of a rho are further apart than
  it is large; there is no verdict.
"""


def machine(setup: Setup) -> list[str]:
    """Return the machine, the versions and the commit, as lines of text."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = next(
        (int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), math.nan
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "loralib"))
    where = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=where, check=False
    ).stdout.strip()
    gpu = [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}"] if setup.cuda else []
    return [
        ", ".join(
            [cpu, f"{os.cpu_count()} cores", f"{memory:.0f} GiB", f"load {os.getloadavg()[0]:.1f} at the start", *gpu]
        ),
        f"Python {platform.python_version()}, {versions}, lorainject {li.__version__}{f' ({commit})' * bool(commit)}",
    ]


def _lines(file: str) -> list[str]:
    """Return the lines of a file, none if it does not exist."""
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def number(x: float | None) -> str:
    """Return a number as the table prints it."""
    if x is None:
        return ""
    return "not measurable" if math.isinf(x) else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def cells(r: Result) -> list[str]:
    """Return the cells of a row of the table."""
    if r.error:
        return [r.row, "", "", "", "", "", r.verdict, r.error, "", ""]
    quartiles = "" if r.low == r.high else f" ({number(r.low)} to {number(r.high)})"
    goal_and_value = [number(r.must), number(r.aim), number(r.value) + quartiles]
    apart = "" if r.differ is None else f"{r.differ:.0e}"
    return [r.row, r.case, r.metric, *goal_and_value, r.verdict, r.beside, r.limit, apart]


def say(r: Result) -> None:
    """Print one result as it comes."""
    if r.error:
        CONSOLE.print(f"{r.row}: [red]{escape(r.error)}[/]", soft_wrap=True)
    else:
        CONSOLE.print(
            f"{r.row}, {r.case}: {r.metric} {cells(r)[5]} {r.verdict}  [{r.beside}]", markup=False, soft_wrap=True
        )


def show(rows: Sequence[Row], results: Sequence[Result], about: Sequence[str]) -> None:
    """Print the table, and why aims were missed."""
    table = Table(*COLUMNS[:-2], box=None, header_style="bold", pad_edge=False)
    colour = {"met": "green", "aim missed": "yellow", "must MISSED": "red", "failed": "red", "not seen": "blue"}
    for r in results:
        line = cells(r)[:-2]
        line[6] = f"[{colour[r.verdict]}]{r.verdict}[/]" if r.verdict else ""
        table.add_row(*line)
    wide = Console(highlight=False, width=max(CONSOLE.width, 170))
    wide.print(table)
    for paragraph in paragraphs(rows, results):
        wide.print(f"\n{paragraph}", markup=False, soft_wrap=True)
    wide.print()
    for line in about:
        wide.print(line, markup=False, soft_wrap=True)


def paragraphs(rows: Iterable[Row], results: Sequence[Result]) -> list[str]:
    """Return, for every row that misses an aim, what bounds it and where the time went in this run."""
    lines = []
    for row in rows:
        missed = [r for r in results if r.row == row.name and r.verdict in ("aim missed", "must MISSED", "not seen")]
        if missed:
            profiles = [f"{r.case}, {r.metric}: {r.profile}" for r in missed if r.profile]
            text = [row.bound or "What bounds it has not been written down yet."]
            if profiles:
                text.append(f"Profiled in this run: {'; '.join(profiles)}.")
            lines.append(f"**{row.name}** ({row.what}; limit: {row.limit}). " + " ".join(text))
    return lines


def markdown(rows: Sequence[Row], results: Sequence[Result], setup: Setup, about: Sequence[str]) -> str:
    """Return the whole document."""
    clock = (
        "measured by CUDA events"
        if setup.cuda
        else "this process's CPU time with one intra-op thread, since the machine is shared"
    )
    lines = [
        HEAD.format(rounds=setup.rounds, seconds=PATIENCE * setup.seconds, clock=clock),
        *(f"- {line}" for line in about),
        "",
    ]
    counts = {
        v: sum(r.verdict == v for r in results) for v in ("met", "aim missed", "must MISSED", "not seen", "failed")
    }
    lines += [
        f"Of {sum(counts.values())} figures with a goal: "
        + ", ".join(f"{n} {v}" for v, n in counts.items() if n)
        + ".",
        "",
    ]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells(r)) + " |" for r in results
    ]
    lines += ["", "## Limits", "", *(f"- `{row.name}`, {row.what}: {row.limit}" for row in rows)]
    if why := paragraphs(rows, results):
        lines += ["", "## What misses its aim, and why", "", *(f"{p}\n" for p in why)]
    return "\n".join(lines).rstrip() + "\n"


def to_json(results: Sequence[Result], about: Sequence[str]) -> str:
    """Return the results as JSON."""
    return json.dumps({"about": list(about), "results": [asdict(r) for r in results]}, indent=1)


def about(file: Path) -> list[str]:
    """Return where, with what and how an earlier run was made."""
    return list(json.loads(file.read_text())["about"])


def from_json(text: str) -> list[Result]:
    """Return the results of an earlier run."""
    return [Result(**r) for r in json.loads(text)["results"]]


def worse(now: Sequence[Result], before: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Return the figures that are worse than before, each with the earlier one.

    Those are ratios and bytes, not times, that grew by more than a tenth, with quartiles that do not overlap, and rows
    that fail now.
    """
    was = {r.key: r for r in before if r.metric not in TIMES}
    fails = {r.row for r in before if r.error}
    process_growth = [
        (r, was[r.key])
        for r in now
        if not r.error and r.key in was and r.value > was[r.key].value * WORSE and r.low > was[r.key].high
    ]
    ran = {b.row: b for b in before if b.row not in fails}
    return process_growth + [(r, ran[r.row]) for r in now if r.error and r.row in ran]


def show_worse(figures: Sequence[tuple[Result, Result]], file: Path | None) -> None:
    """Print what is worse than in an earlier run."""
    if file is not None and not figures:
        CONSOLE.print(f"nothing is worse than in {file.name}", markup=False, soft_wrap=True)
    for now, before in figures:
        change = f"{number(before.value)} -> {now.error or number(now.value)}"
        CONSOLE.print(
            f"worse than in {file and file.name}: {now.row}, {now.case}, {now.metric}: {change}",
            markup=False,
            soft_wrap=True,
        )

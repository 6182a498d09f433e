"""The command: run rows, print them, and write them to files."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report
from .measure import Setup
from .table import TABLE, run

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a row failed, or something is worse than in an earlier run."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="lorainject beside PEFT and loralib, row by row",
        epilog="rows: " + ", ".join(f"{row.name} ({row.what})" for row in TABLE),
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, about seven minutes; docs/benchmarks.md is left as it is"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", choices=[row.name for row in TABLE], help="these rows alone"
    )
    parser.add_argument("--cuda", action="store_true", help="the rows for a GPU: CUDA events, bf16, d 4096 and 14336")
    parser.add_argument("--rounds", type=int, help="at least so many rounds (11; --quick: 3)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown (of all rows in full: docs/benchmarks.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the raw results")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="an earlier --json: print what got worse, by ratios, and exit with 1",
    )
    parser.add_argument(
        "--rest",
        type=Path,
        metavar="FILE",
        help="an earlier --json: its results stand for the rows that are not run now",
    )
    args = parser.parse_args(argv)
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda needs an NVIDIA GPU and a torch that is built for it; this one sees none")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds, seconds = (3, 1.0) if args.quick else (11, 5.0)
    setup = Setup(
        quick=args.quick, device="cuda" if args.cuda else "cpu", rounds=args.rounds or rounds, seconds=seconds
    )
    rows = [row for row in TABLE if (not args.only or row.name in args.only) and (row.cuda or not args.cuda)]
    command = " ".join(["scripts/bench", *argv])
    start = time.perf_counter()
    machine = report.machine(setup)
    results = run(rows, setup, report.say)
    about = [*machine, f"`{command}`, {(time.perf_counter() - start) / 60:.0f} minutes"]
    if args.rest:
        about = [
            *report.about(args.rest),
            f"{', '.join(row.name for row in rows)}: run again later, on {machine[-1]}, {about[-1]}",
        ]
        earlier = [r for r in report.from_json(args.rest.read_text()) if r.row not in {row.name for row in rows}]
        rows = [row for row in TABLE if row.cuda or not args.cuda]
        results = [r for row in rows for r in (*earlier, *results) if r.row == row.name]
    report.show(rows, results, about)
    complete = not (args.quick or args.only or args.cuda)
    if args.write or complete:
        (args.write or DOCUMENT).write_text(report.markdown(rows, results, setup, about))
    if args.json:
        args.json.write_text(report.to_json(results, about))
    worse = report.worse(results, report.from_json(args.against.read_text())) if args.against else []
    report.show_worse(worse, args.against)
    return 1 if worse or any(r.error for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())

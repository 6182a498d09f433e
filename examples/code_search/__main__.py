"""The demo's command line, which scripts/demo starts."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import lorainject as li

from .demo import run

MODEL = "Text encoder: a directory or a name on the Hugging Face hub. Default: the packaged all-MiniLM-L6-v2."
DATA = 'JSONL file of {"query": ..., "positive": ...}. Default: Python\'s standard library.'
METHOD = "lora; or, to compare, full (train all weights) or bitfit (train all biases)."

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    data: Annotated[Path | None, typer.Option(help=DATA)] = None,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the adapter, the merged model and the plot.")
    ] = Path("demo-output"),
    targets: Annotated[
        list[str] | None, typer.Option("--targets", "-t", help="A target, such as query or q_proj. May be repeated.")
    ] = None,
    r: Annotated[int | None, typer.Option("-r", help="Rank.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of training steps.")] = None,
    method: Annotated[str, typer.Option(help=METHOD)] = "lora",
    seed: Annotated[int, typer.Option(help="Seed of the split, of A and of the order of the data.")] = 0,
) -> None:
    """Teach a real model to search code, and show every verb at work. It takes about two minutes on two cores."""
    options: dict[str, Any] = {"targets": targets, "r": r, "steps": steps}
    chosen = {name: value for name, value in options.items() if value is not None}
    run(model=model, data=data, out=out, method=method, seed=seed, **chosen)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app(prog_name="scripts/demo")
    except li.LoraError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)

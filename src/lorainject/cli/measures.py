"""The commands of lorainject.analysis: report and budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Alpha,
    Component,
    Group,
    Heads,
    Json,
    Pickle,
    app,
    in_shell_spelling,
    local_model,
    make_hints,
    meta_model,
)


@app.command()
def report(
    adapters: Annotated[list[Path], typer.Argument(help="One or more adapters of any format.")],
    out: Annotated[Path | None, typer.Option("--output", "-o", help="The page to write, a file of HTML.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Directory or hub name of the base model, whose weights are read.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept a base other than the one that the adapter was made for.")
    ] = False,
    as_json: Json = False,
    allow_pickle: Pickle = False,
    alpha: Alpha = None,
    heads: Heads = None,
    group: Group = None,
    component: Component = None,
) -> None:
    """Show what ADAPTERS change: size, use of the rank, similarity, amplification, survival, and what is unusual."""
    from ..analysis import report as make_report

    hints = make_hints(alpha, heads, group, component, None, base)
    model = None if base is None else local_model(base)
    result = make_report(*adapters, base=model, check_base=not any_base, allow_pickle=allow_pickle, hints=hints)
    if out is not None:
        result.write(out)
    print(json.dumps(result.as_json()) if as_json else in_shell_spelling(str(result)))
    if out is not None:
        print(f"written to {out}", file=sys.stderr)


@app.command()
def budget(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the model. Only its config is read.")],
    targets: Annotated[
        list[str] | None, typer.Option("--targets", "-t", help="A target of LoRA. May be repeated. Default: q and v.")
    ] = None,
    r: Annotated[int, typer.Option("-r", help="Rank of LoRA.")] = 8,
    prefix: Annotated[int, typer.Option(help="Vectors in front of the input (prefix tuning).")] = 256,
    infix: Annotated[int, typer.Option(help="Vectors behind the input (prefix tuning).")] = 8,
    bottleneck: Annotated[int, typer.Option(help="Inner width of an adapter layer.")] = 64,
    as_json: Json = False,
) -> None:
    """Show how many parameters full fine-tuning, BitFit, prefixes, adapter layers and LoRA would train in MODEL."""
    from ..analysis import parameter_budget

    result = parameter_budget(meta_model(model), r, targets or ("query", "value"), prefix=prefix, infix=infix,
                              bottleneck=bottleneck)  # fmt: skip
    print(json.dumps(result.as_json()) if as_json else result)

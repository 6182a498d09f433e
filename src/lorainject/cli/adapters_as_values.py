"""The commands of lorainject.algebra: verify, compare, combine, compress, extract, diff, patch and check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import lorainject as li

from .options import AdapterPath, Base, Heads, Json, Pickle, app, in_shell_spelling, local_model, make_hints, progress

Model = Annotated[str, typer.Argument(help="Directory or hub name of the base model.")]
Tuned = Annotated[str, typer.Argument(help="Directory or hub name of a fine-tuned or merged model.")]
VERIFIED = "BASE ADAPTER... MERGED"
Out = Annotated[Path, typer.Option("--output", "-o", help="The file or directory to write.")]
To = Annotated[str, typer.Option("--to", help=f"The format to write: one of {', '.join(li.FORMATS)}.")]
Weights = Annotated[
    list[float] | None,
    typer.Option("--weight", "-w", help="The weight of each adapter, in their order. Default: 1 for each."),
]
Error = Annotated[float | None, typer.Option("--error", help="The highest relative error of a site.")]


@app.command()
def verify(
    paths: Annotated[list[str], typer.Argument(metavar=VERIFIED, help="Base model, adapters, merged model.")],
    weights: Weights = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="Accept adapters made for another base.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Accept an adapter without A and B for layers that it targets.")
    ] = False,
    any_dtype: Annotated[
        bool, typer.Option("--any-dtype", help="Accept other tensors that were only rounded to another dtype.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell whether MERGED holds exactly BASE + ADAPTERS. The exit status is 1 if it does not."""
    from ..algebra import verify as verify_merge

    if len(paths) < 3:
        raise typer.BadParameter("give a base, at least one adapter, and a merged model", param_hint=VERIFIED)
    base, *adapters, merged = paths
    options: dict[str, Any] = {"weights": weights, "check_base": not any_base, "allow_missing": allow_missing,
                               "accept_dtype": any_dtype}  # fmt: skip
    with progress("verifying") as report_progress:
        result = verify_merge(local_model(base), adapters, local_model(merged), progress=report_progress, **options)
    _show(result, as_json)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def compare(first: AdapterPath, second: AdapterPath, as_json: Json = False, allow_pickle: Pickle = False,
            heads: Heads = None, base: Base = None) -> None:  # fmt: skip
    """Show angles, norms and shared subspaces of the updates of two adapters."""
    from ..algebra import compare as compare_adapters

    hints = make_hints(heads=heads, base=base)
    files = [li.read(path, allow_pickle=allow_pickle, hints=hints) for path in (first, second)]
    _show(compare_adapters(*files), as_json)


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Two or more adapters of any format.")],
    out: Out,
    weights: Weights = None,
    r: Annotated[int | None, typer.Option("-r", help="Compress the sum to this rank. Default: exact.")] = None,
    to: To = "lorainject",
    as_json: Json = False,
    allow_pickle: Pickle = False,
    heads: Heads = None,
    base: Base = None,
) -> None:
    """Write the weighted sum of ADAPTERS as one adapter."""
    from ..algebra import combine as combine_adapters

    hints = make_hints(heads=heads, base=base)
    files = [li.read(path, allow_pickle=allow_pickle, hints=hints) for path in adapters]
    _write(combine_adapters(files, weights, r=r), out, to, hints, as_json)


@app.command()
def compress(
    adapter: AdapterPath,
    out: Out,
    r: Annotated[int | None, typer.Option("-r", help="The highest rank of a site.")] = None,
    error: Error = None,
    energy: Annotated[float | None, typer.Option("--energy", help="The least share of |update|^2 to keep.")] = None,
    to: To = "lorainject",
    as_json: Json = False,
    allow_pickle: Pickle = False,
    heads: Heads = None,
    base: Base = None,
) -> None:
    """Write the best adapter of a lower rank. One of -r, --error and --energy is needed."""
    from ..algebra import compress as compress_adapter

    hints = make_hints(heads=heads, base=base)
    file = li.read(adapter, allow_pickle=allow_pickle, hints=hints)
    _write(compress_adapter(file, r=r, error=error, energy=energy), out, to, hints, as_json)


@app.command()
def extract(
    base: Model,
    tuned: Tuned,
    out: Out,
    r: Annotated[str, typer.Option("-r", help='The rank, or "auto": what stands above the rounding noise.')] = "auto",
    error: Error = None,
    whole: Annotated[bool, typer.Option("--whole", help="Take what is not low-rank along as whole tensors.")] = False,
    to: To = "lorainject",
    as_json: Json = False,
) -> None:
    """Write the adapter that makes BASE into TUNED, as far as the change is low-rank."""
    from ..algebra import extract as extract_adapter

    if r != "auto" and not r.isdigit():
        raise typer.BadParameter(f"{r} is neither a number nor auto", param_hint="-r")
    rank: Any = r if r == "auto" else int(r)
    with progress("extracting") as report_progress:
        file = extract_adapter(local_model(base), local_model(tuned), rank, error=error, whole=whole,
                               progress=report_progress)  # fmt: skip
    _write(file, out, to, None, as_json)


@app.command()
def diff(base: Model, tuned: Tuned, out: Out, as_json: Json = False) -> None:
    """Write what makes BASE into TUNED, to the byte: low-rank factors and an exact rest."""
    from ..algebra import diff as write_difference

    with progress("coding") as report_progress:
        result = write_difference(local_model(base), local_model(tuned), out, progress=report_progress)
    _show(result, as_json)


@app.command()
def patch(base: Model, difference: Annotated[Path, typer.Argument(help="A directory that `lorainject diff` wrote.")],
          out: Out, as_json: Json = False) -> None:  # fmt: skip
    """Rebuild the model that a DIFFERENCE was taken of, to the byte."""
    from ..algebra import patch as rebuild

    with progress("rebuilding") as report_progress:
        path = rebuild(local_model(base), difference, out, progress=report_progress)
    print(json.dumps({"path": str(path)}) if as_json else f"written to {path}, every file to the byte")


@app.command()
def check(
    adapter: AdapterPath,
    engine: Annotated[str, typer.Option("--for", help=f"The engine: one of {', '.join(li.ENGINES)}.")],
    as_json: Json = False,
    allow_pickle: Pickle = False,
    heads: Heads = None,
    base: Base = None,
) -> None:
    """Name every tensor of ADAPTER that an engine would ignore or misread. The exit status is 1 if there is one."""
    from ..algebra import check as check_for_engine

    hints = make_hints(heads=heads, base=base)
    result = check_for_engine(li.read(adapter, allow_pickle=allow_pickle, hints=hints), engine, hints=hints)
    _show(result, as_json)
    if not result.ok:
        raise typer.Exit(1)


def _show(result: Any, as_json: bool) -> None:
    print(json.dumps(result.as_dict()) if as_json else in_shell_spelling(str(result)))


def _write(file: li.AdapterFile, out: Path, to: str, hints: li.Hints | None, as_json: bool) -> None:
    """Write a record, and show what it lost and where it is."""
    done = li.write(file, out, format=to, hints=hints)
    reduced = getattr(file, "reduced", ())
    left_out = getattr(file, "left_out", ())
    if as_json:
        sites = [vars(entry) for entry in reduced] or [{"path": s.name, "r": s.r} for s in file.sites]
        print(json.dumps({"path": str(out), "format": to, "sites": sites, "error": getattr(file, "error", 0.0),
                          "left_out": left_out}))  # fmt: skip
        return
    for line in done.changed:
        print(f"note: {in_shell_spelling(line)}", file=sys.stderr)
    if reduced or left_out:
        print(file)
    print(f"{len(done.file.sites)} sites written to {out} as {to}")

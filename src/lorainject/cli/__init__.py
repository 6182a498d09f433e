"""The command line of lorainject.

    lorainject find MODEL -t q_proj -t v_proj      show what would be injected; reads the config, but no weight
    lorainject inspect ADAPTER                     show what an adapter file of any format holds
    lorainject convert ADAPTER OUT --to FORMAT     write the adapter as another tool's file, or --for ENGINE
    lorainject merge MODEL ADAPTER... -o DIR       merge adapters into a copy of a model's checkpoint, or --in-place
    lorainject unmerge MODEL                       undo a merge in place, to the byte
    lorainject train RECIPE.yaml [KEY=VALUE...]    train a recipe; --dry-run shows its plan, memory and steps
    lorainject verify MODEL ADAPTER... MERGED      does a merged model hold exactly model + adapters?
    lorainject compare, combine, compress          angles, sums and lower ranks of adapters
    lorainject extract, diff, patch                an adapter, or the exact difference, from two models; and back
    lorainject check ADAPTER --for ENGINE          what an engine would ignore or misread
    lorainject report ADAPTER... -o report.html    show as a page what adapters change, with --base MODEL beside W0
    lorainject budget MODEL                        show how many parameters each way of adapting a model trains

MODEL is a local directory or a name on the Hugging Face hub. Each command calls the public function of the same
purpose. Errors come from there and name Python arguments; `main` shows them as the options of the command line.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import lorainject as li

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as missing:
    sys.exit(f'the command line needs {missing.name}: pip install "lorainject[cli]"')

from ..checkpoint.merge_copy import read_origin
from ..files.describe import describe
from ..files.origin import origin_lines
from .options import (
    AdapterPath,
    Alpha,
    Base,
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
    parse_layers,
    progress,
)


def main() -> None:
    """Run the command line. An error of lorainject ends as a message on stderr and exit status 1."""
    warnings.formatwarning = lambda message, *_: f"warning: {in_shell_spelling(str(message))}\n"
    try:
        app()
    except li.LoraError as e:
        print(f"error: {in_shell_spelling(str(e))}", file=sys.stderr)
        sys.exit(1)


@app.command()
def find(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the model. Only its config is read.")],
    targets: Annotated[
        list[str], typer.Option("--targets", "-t", help="A target, such as q_proj or all-linear. May be repeated.")
    ],
    r: Annotated[int, typer.Option("-r", help="Rank.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="Numerator of the scale. Default: the rank.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A target to leave out. May be repeated.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="A layer number, or a range such as 0-3. May be repeated.")
    ] = None,
    scaling: Annotated[str, typer.Option(help="standard (alpha / r) or rslora (alpha / sqrt(r)).")] = "standard",
    as_json: Json = False,
) -> None:
    """Show which weights of MODEL would get an adapter. It takes seconds for a model of any size."""
    plan = li.find(
        meta_model(model), targets, r, alpha=alpha, exclude=exclude or (), layers=parse_layers(layers), scaling=scaling
    )
    if not as_json:
        print(plan)
        return
    sites = []
    for site in plan:
        rows = None if site.rows is None else [(part.start, part.stop, part.step) for part in site.rows]
        computed = {"rows": rows, "dtype": str(site.dtype), "scale": site.scale, "trainable": site.trainable}
        sites.append(asdict(site) | computed)
    print(json.dumps({"trainable": plan.trainable, "total": plan.total, "bytes": plan.bytes, "sites": sites}))


@app.command()
def inspect(
    adapter: AdapterPath,
    as_json: Json = False,
    allow_pickle: Pickle = False,
    alpha: Alpha = None,
    heads: Heads = None,
    group: Group = None,
    component: Component = None,
    base: Base = None,
) -> None:
    """Show the format, base, ranks, scales and norms of ADAPTER, and what is unusual about it.

    Of a merged model, show what it was merged from.

    The exit status is 1 if the file cannot be read.
    """
    if (origin := read_origin(adapter)) is not None:
        print(json.dumps({"origin": origin}) if as_json else "\n".join(origin_lines(origin)))
        return
    hints = make_hints(alpha, heads, group, component, base=base)
    description = describe(li.read(adapter, allow_pickle=allow_pickle, hints=hints))
    if as_json:
        print(json.dumps(description))
    else:
        _print_description(description)


def _print_description(description: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("module", "in", "out", "r", "alpha", "scale", "dtype", "|sBA|"):
        table.add_column(column, justify="left" if column in ("module", "dtype") else "right")
    for row in description["sites"]:  # escaped, because rich would take the [q] of a slice for markup
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in row.values()))
    console = Console()
    console.print(table)
    base = f" of {description['base']}" if description["base"] else ""
    summary = f"{len(description['sites'])} sites, {description['parameters']:,} parameters"
    heading = f"{description['format']} file, adapter {description['name']!r}{base}: {summary}"
    console.print(heading, highlight=False, markup=False)
    for line in origin_lines(description["origin"]) if description["origin"] else ():
        console.print(escape(line), highlight=False)
    for line in description["beside"]:
        console.print(f"[yellow]besides A and B:[/] {escape(line)}", highlight=False)
    for line in description["unusual"]:
        console.print(f"[yellow]note:[/] {escape(in_shell_spelling(line))}", highlight=False)


@app.command()
def convert(
    source: AdapterPath,
    out: Annotated[Path, typer.Argument(help="The file or directory to write.")],
    to: Annotated[
        str | None, typer.Option("--to", help=f"The format to write: one of {', '.join(li.FORMATS)}.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--for", help=f"The engine that will serve it: one of {', '.join(li.ENGINES)}.")
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Leave out what the format has no place for, and list it.")
    ] = False,
    allow_pickle: Pickle = False,
    alpha: Alpha = None,
    heads: Heads = None,
    group: Group = None,
    component: Component = None,
    architecture: Annotated[str | None, typer.Option(help="GGUF's name of the base, such as llama.")] = None,
    base: Base = None,
    original: Annotated[
        str | None, typer.Option(help="Directory or hub name of the original base, for PiSSA and OLoRA. It is loaded.")
    ] = None,
) -> None:
    """Write an adapter in another format, or for a serving engine: exactly, or not at all (unless --lossy)."""
    if (to is None) == (engine is None):
        way_out = "write, for instance, lorainject convert ADAPTER OUT --for vllm"
        raise li.SpecError("convert needs either --to FORMAT or --for ENGINE", way_out=way_out)
    hints = make_hints(alpha, heads, group, component, architecture, base, original)
    done = li.convert(source, out, format=to, engine=engine, lossy=lossy, allow_pickle=allow_pickle, hints=hints)
    for line in (*done.file.notes, *done.changed, *(f"left out: {line}" for line in done.lost)):
        print(f"note: {in_shell_spelling(line)}", file=sys.stderr)
    sites = done.file.sites
    options = {"alpha": f"--alpha {sites[0].scale * sites[0].r:g}", "heads": "--heads", "groups": "--group"}
    result = [f"{len(sites)} sites written to {done.path} as {done.format}"]
    if asks := li.FORMATS[done.format].asks:
        result.append(f"to read it, pass {', '.join(options[hint] for hint in asks)}")
    if done.asks:
        result.append(done.asks)
    print("; ".join(result))


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the model.")],
    adapters: Annotated[list[Path], typer.Argument(help="One or more adapters: directories or files.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The directory to write. It must be new or empty.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change MODEL itself. `lorainject unmerge` restores it.")
    ] = False,
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="The weight of each adapter, in their order. Default: 1 for each."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse if rounding to the stored dtype loses much of the update.")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept a base other than the one that the adapter was made for.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Accept an adapter without A and B for layers that it targets.")
    ] = False,
) -> None:
    """Merge ADAPTERS into MODEL's checkpoint, shard by shard. It takes little more than a copy, whatever the size."""
    if (out is None) != in_place:
        way_out = "write, for instance, lorainject merge MODEL ADAPTER -o DIR"
        raise li.SpecError("merge needs either --output DIR or --in-place", way_out=way_out)
    options: dict[str, Any] = {"weights": weights, "strict": strict, "check_base": not any_base,
                               "allow_missing": allow_missing}  # fmt: skip
    with progress("merging") as report_progress:
        if out is None:
            report = li.merge_in_place(local_model(model), adapters, progress=report_progress, **options)
        else:
            report = li.merge_checkpoint(local_model(model), adapters, out, progress=report_progress, **options)
    pairs = zip(adapters, report.strengths, strict=True)
    merged = ", ".join(f"{path}" if weight == 1 else f"{path} ({weight:g})" for path, weight in pairs)
    print(f"merged {merged} into {len(report.sites)} weights ({report.weight_bytes:,} bytes)")
    print(f"{report.survival:.4f} of the update survived the rounding to the stored dtype")
    print(f"written to {out}" if out is not None else f"`lorainject unmerge {model}` restores the model")


@app.command()
def unmerge(
    model: Annotated[Path, typer.Argument(help="A directory that `lorainject merge --in-place` has changed.")],
) -> None:
    """Restore every byte of MODEL to what it was before `merge --in-place`, also if that was interrupted."""
    with progress("unmerging") as report_progress:
        li.unmerge_in_place(model, progress=report_progress)
    print(f"{model} is restored: every file is as it was, to the byte")


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace those of the recipe, as trainer.max_steps=10.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, the memory and the number of steps, and load nothing.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as RECIPE says, and write it with a report, the loss curve and the recipe."""
    if recipe is None and not schema:
        raise typer.BadParameter("give a recipe, such as configs/code-search.yaml", param_hint="RECIPE")
    try:
        from ..training import Recipe, train_sweep
        from ..training import train as train_recipe
    except ModuleNotFoundError as e:
        raise li.LoraError(f"train needs the package {e.name}", way_out='pip install "lorainject[train]"') from e
    if recipe is None:
        print(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    with redirect_stdout(sys.stderr):  # where the trainer prints its progress
        read = Recipe.read(recipe, settings or ())
        run = train_sweep if read.sweep.root else train_recipe
        result: Any = read.prepare() if dry_run else run(read)
    print(json.dumps(result.as_json()) if as_json else result)


from . import adapters_as_values, measures  # noqa: E402, F401  (their commands come after these in the help)

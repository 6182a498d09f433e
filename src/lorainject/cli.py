"""The command line of lorainject.

    lorainject find MODEL -t q_proj -t v_proj      show what would be injected; reads the config, but no weight
    lorainject inspect ADAPTER                     show what an adapter file of any format holds
    lorainject convert ADAPTER OUT --to FORMAT     write the adapter as another tool's file, or --for ENGINE
    lorainject merge MODEL ADAPTER... -o DIR       merge adapters into a copy of a model's checkpoint, or --in-place
    lorainject unmerge MODEL                       undo a merge in place, to the byte
    lorainject train RECIPE.yaml [KEY=VALUE...]    train a recipe; --dry-run shows its plan, memory and steps
    lorainject report ADAPTER... -o report.html    show as a page what adapters change, with --base MODEL beside W0
    lorainject budget MODEL                        show how many parameters each way of adapting a model trains

MODEL is a local directory or a name on the Hugging Face hub. Each command calls the public function of the same
purpose. Errors come from there and name Python arguments; `main` shows them as the options of the command line.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import lorainject as li

from .files.describe import describe

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Table
except ModuleNotFoundError as missing:
    sys.exit(f'the command line needs {missing.name}: pip install "lorainject[cli]"')

app = typer.Typer(help="LoRA surgery on PyTorch models.", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False)  # fmt: skip

SHELL_SPELLING = (
    (r"allow_pickle=True", "--allow-pickle"),
    (r"check_base=False", "--any-base"),
    (r"allow_missing=True", "--allow-missing"),
    (r"lossy=True", "--lossy"),
    (r"accept the loss with strict=False", "leave out --strict to accept the loss"),
    (r"(?:hints=)?Hints\(alpha=([^)]+)\)", r"--alpha \1"),
    (r"(?:hints=)?Hints\(heads=\((\d+), (\d+)\)\)", r"--heads \1,\2"),
    (r"(?:hints=)?Hints\((architecture|component)=['\"](\w+)['\"]\)", r"--\1 \2"),
    (r"(?:hints=)?Hints\(model=\.\.\.\)", "--base MODEL"),
)
"""How Python arguments in the library's messages are written as options, as patterns with replacements."""
NOT_SAFETENSORS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "onnx/*"]
"""Files of a hub repository that are not downloaded."""

AdapterPath = Annotated[Path, typer.Argument(help="An adapter of any format: a file or a directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open pickles (.bin, .pt), with torch's restricted unpickler.")
]
Alpha = Annotated[float | None, typer.Option(help="Alpha, for files that do not hold it (loralib, torchtune).")]
Heads = Annotated[
    str | None,
    typer.Option(help="Numbers of attention heads of queries and of keys, as in 32,8 (torchtune, litgpt, GGUF)."),
]
Group = Annotated[
    list[str] | None, typer.Option(help="Enabled parts of loralib's MergedLinear, as in c_attn=101. May be repeated.")
]
Component = Annotated[
    str | None, typer.Option(help="Component of an image pipeline: unet, transformer or text_encoder.")
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Directory or hub name of the base model. Its config is read, for the names of modules."
    ),
]


def main() -> None:
    """Run the command line. An error of lorainject ends as a message on stderr and exit status 1."""
    warnings.formatwarning = lambda message, *_: f"warning: {_in_shell_spelling(str(message))}\n"
    try:
        app()
    except li.LoraError as e:
        print(f"error: {_in_shell_spelling(str(e))}", file=sys.stderr)
        sys.exit(1)


def _in_shell_spelling(message: str) -> str:
    for pattern, replacement in SHELL_SPELLING:
        message = re.sub(pattern, replacement, message)
    return message


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
        _meta_model(model), targets, r, alpha=alpha, exclude=exclude or (), layers=_layers(layers), scaling=scaling
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

    The exit status is 1 if the file cannot be read.
    """
    hints = _hints(alpha, heads, group, component, None, base)
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
    for line in description["beside"]:
        console.print(f"[yellow]besides A and B:[/] {escape(line)}", highlight=False)
    for line in description["unusual"]:
        console.print(f"[yellow]note:[/] {escape(_in_shell_spelling(line))}", highlight=False)


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
) -> None:
    """Write an adapter in another format, or for a serving engine: exactly, or not at all (unless --lossy)."""
    if (to is None) == (engine is None):
        way_out = "write, for instance, lorainject convert ADAPTER OUT --for vllm"
        raise li.SpecError("convert needs either --to FORMAT or --for ENGINE", way_out=way_out)
    hints = _hints(alpha, heads, group, component, architecture, base)
    done = li.convert(source, out, format=to, engine=engine, lossy=lossy, allow_pickle=allow_pickle, hints=hints)
    for line in (*done.file.notes, *done.changed, *(f"left out: {line}" for line in done.lost)):
        print(f"note: {_in_shell_spelling(line)}", file=sys.stderr)
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
    with _progress("merging") as progress:
        if out is None:
            report = li.merge_in_place(_local_model(model), adapters, progress=progress, **options)
        else:
            report = li.merge_checkpoint(_local_model(model), adapters, out, progress=progress, **options)
    print(f"merged {', '.join(map(str, adapters))} into {len(report.sites)} weights ({report.weight_bytes:,} bytes)")
    print(f"{report.survival:.4f} of the update survived the rounding to the stored dtype")
    print(f"written to {out}" if out is not None else f"`lorainject unmerge {model}` restores the model")


@app.command()
def unmerge(
    model: Annotated[Path, typer.Argument(help="A directory that `lorainject merge --in-place` has changed.")],
) -> None:
    """Restore every byte of MODEL to what it was before `merge --in-place`, also if that was interrupted."""
    with _progress("unmerging") as progress:
        li.unmerge_in_place(model, progress=progress)
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
        from .training import Recipe, train_sweep
        from .training import train as train_recipe
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
    from .analysis import report as make_report

    hints = _hints(alpha, heads, group, component, None, base)
    model = None if base is None else _local_model(base)
    result = make_report(*adapters, base=model, check_base=not any_base, allow_pickle=allow_pickle, hints=hints)
    if out is not None:
        result.write(out)
    print(json.dumps(result.as_json()) if as_json else _in_shell_spelling(str(result)))
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
    from .analysis import parameter_budget

    result = parameter_budget(_meta_model(model), r, targets or ("query", "value"), prefix=prefix, infix=infix,
                              bottleneck=bottleneck)  # fmt: skip
    print(json.dumps(result.as_json()) if as_json else result)


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of bytes done and bytes in all that moves a bar on stderr, if stderr is a terminal."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _layers(entries: list[str] | None) -> list[int] | None:
    """Return the layer numbers of entries such as "5" and "0-2"."""
    if entries is None:
        return None
    try:
        ends = [entry.partition("-")[::2] for entry in entries]
        return [number for first, last in ends for number in range(int(first), int(last or first) + 1)]
    except ValueError:
        what = f"--layers {' '.join(entries)}: this is neither a number nor a range"
        raise li.SpecError(what, way_out="write --layers 3 or --layers 0-3") from None


def _hints(alpha: float | None, heads: str | None, groups: Sequence[str] | None, component: str | None,
           architecture: str | None, base: str | None) -> li.Hints:  # fmt: skip
    """Return the hints that the options give."""
    if heads is not None and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)?", heads):
        way_out = "write --heads 32,8 for 32 heads of queries and 8 heads of keys"
        raise li.SpecError(f"--heads {heads}: this is not one or two numbers", way_out=way_out)
    counts = None if heads is None else [int(count) for count in heads.split(",")]
    if malformed := [group for group in groups or () if not re.fullmatch(r"[^=]+=[01]+", group)]:
        way_out = "write --group c_attn=101 for a layer with adapters on q and v, of q, k and v"
        raise li.SpecError(f"--group {' '.join(malformed)}: this is not a name and a row of 0 and 1", way_out=way_out)
    named_bits = (group.split("=") for group in groups or ())
    enabled = {name: [bit == "1" for bit in bits] for name, bits in named_bits}
    return li.Hints(
        alpha=alpha, heads=None if counts is None else (counts[0], counts[-1]), groups=enabled or None,
        component=component, architecture=architecture, model=None if base is None else _meta_model(base),
    )  # fmt: skip


def _meta_model(model: str) -> Any:
    """Build the model of a config on the meta device, in the class that the checkpoint was saved from if it names
    one."""
    import torch
    import transformers

    config = _from_hub(model, transformers.AutoConfig.from_pretrained)
    name = (getattr(config, "architectures", None) or [""])[0] or ""
    model_class: Any = getattr(transformers, name, None) or transformers.AutoModel._model_mapping[type(config)]
    with torch.device("meta"):
        return model_class(config)


def _local_model(model: str) -> Path:
    """Return a model's directory. A model of the hub is downloaded into the local cache."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(_from_hub(model, snapshot_download, ignore_patterns=NOT_SAFETENSORS))


def _from_hub(model: str, load: Callable[..., Any], **options: Any) -> Any:
    """Return load(model, **options). Raise FileError if the model is not there."""
    try:
        return load(model, **options)
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        if Path(model).exists():
            way_out = "give a directory with config.json, as save_pretrained writes it"
            raise li.FileError(f"{model} cannot be loaded: {reason}", way_out=way_out) from e
        what = f"{model!r} is not a directory, and cannot be loaded from the hub: {reason}"
        raise li.FileError(what, way_out="check the spelling and the connection, or give a local directory") from e


if __name__ == "__main__":
    main()

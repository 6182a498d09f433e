"""The command line: a thin face over the public names.

    lorainject find MODEL -t q_proj -t v_proj      what would be injected, on the meta device: no weight is read
    lorainject inspect ADAPTER                     what an adapter file of any format holds
    lorainject convert ADAPTER OUT --to FORMAT     the same adapter as another tool's file; --for ENGINE: as a server takes it
    lorainject merge MODEL ADAPTER... -o DIR       fold adapters into a model's checkpoint: a copy, or --in-place
    lorainject unmerge MODEL                       and out again, to the byte, after --in-place

MODEL is a local directory or a name on the Hugging Face hub.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

app = typer.Typer(
    help=__doc__.split("\n")[0], no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
# What a file may not say itself.
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open pickles (.bin, .pt), by torch's restricted unpickler.")
]
Alpha = Annotated[float | None, typer.Option(help="Where the file holds none (loralib, torchtune).")]
Heads = Annotated[
    str | None, typer.Option(help="Attention heads of queries, and of keys: 32,8 (torchtune, litgpt, GGUF).")
]
Group = Annotated[
    list[str] | None, typer.Option(help="Enabled parts of a MergedLinear: c_attn=101 (loralib); repeat for more.")
]
Component = Annotated[str | None, typer.Option(help="Of an image pipeline: unet, transformer, text_encoder.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="The base's directory or hub name; only its config is read, to look names up."),
]


def main() -> None:
    """Run; a user's mistake ends as its message on stderr and exit status 1."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app()
    except li.LoraError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


@app.command()
def find(
    model: Annotated[str, typer.Argument(help="Directory or hub name; only its config is read.")],
    targets: Annotated[list[str], typer.Option("--targets", "-t", help="One entry; repeat for more.")],
    r: Annotated[int, typer.Option("-r", help="Rank.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="None means alpha = r.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="One entry; repeat for more.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="One layer number, or a range such as 0-3; repeat for more.")
    ] = None,
    scaling: Annotated[str, typer.Option(help="standard or rslora.")] = "standard",
    as_json: Json = False,
) -> None:
    """Show what inject would do to MODEL, as a table. Takes seconds for any size: nothing is downloaded but the config."""
    plan = li.find(
        _skeleton(model), targets, r, alpha=alpha, exclude=exclude or (), layers=_layers(layers), scaling=scaling
    )
    if as_json:
        sites = [
            asdict(s) | {"rows": _rows(s.rows), "dtype": str(s.dtype), "scale": s.scale, "trainable": s.trainable}
            for s in plan
        ]
        print(json.dumps({"trainable": plan.trainable, "total": plan.total, "bytes": plan.bytes, "sites": sites}))
    else:
        print(plan)


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's file or directory, of any format.")],
    as_json: Json = False,
    allow_pickle: Pickle = False,
    alpha: Alpha = None,
    heads: Heads = None,
    group: Group = None,
    component: Component = None,
    base: Base = None,
) -> None:
    """Show what an adapter file holds: format, base, ranks, scales, the norm of each delta, what is unusual. Fails if it would not load."""
    file = li.read(adapter, allow_pickle=allow_pickle, hints=_hints(alpha, heads, group, component, None, base))
    about = describe(file)
    if as_json:
        print(json.dumps(about))
    else:
        _print(about)
    if not about["loads"]:
        raise typer.Exit(1)


def _print(about: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("module", "in", "out", "r", "alpha", "scale", "dtype", "|sBA|"):
        table.add_column(column, justify="left" if column in ("module", "dtype") else "right")
    for row in about["sites"]:
        table.add_row(
            *(f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in row.values())
        )  # a slice's [q] is no markup
    console = Console()
    console.print(table)
    of = f" of {about['base']}" if about["base"] else ""
    count, size = len(about["sites"]), about["parameters"]
    console.print(
        f"{about['format']} file, adapter {about['name']!r}{of}: {count} sites, {size:,} parameters",
        highlight=False,
        markup=False,
    )
    for line in about["beside"]:
        console.print(f"[yellow]beside A and B:[/] {escape(line)}", highlight=False)
    if not about["loads"]:
        console.print("[yellow]load refuses it[/] for what is beside A and B; convert carries it")
    for line in about["unusual"]:
        console.print(f"[yellow]note:[/] {escape(line)}", highlight=False)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter's file or directory, of any format.")],
    out: Annotated[Path, typer.Argument(help="The file or directory to write.")],
    to: Annotated[str | None, typer.Option("--to", help=f"One of {', '.join(li.FORMATS)}.")] = None,
    engine: Annotated[
        str | None, typer.Option("--for", help=f"As this one serves it rightly: {', '.join(li.ENGINES)}.")
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Leave out what the format has no place for, and say what.")
    ] = False,
    allow_pickle: Pickle = False,
    alpha: Alpha = None,
    heads: Heads = None,
    group: Group = None,
    component: Component = None,
    architecture: Annotated[str | None, typer.Option(help="GGUF's word for the base, such as llama.")] = None,
    base: Base = None,
) -> None:
    """Write an adapter in another format, or for a serving engine: exactly, or not at all (unless --lossy)."""
    if (to is None) == (engine is None):
        raise li.SpecError(
            "convert needs either --to FORMAT or --for ENGINE", way_out="lorainject convert ADAPTER OUT --for vllm"
        )
    hints = _hints(alpha, heads, group, component, architecture, base)
    done = li.convert(source, out, format=to, engine=engine, lossy=lossy, allow_pickle=allow_pickle, hints=hints)
    for line in (*done.file.notes, *done.changed, *(f"left out: {line}" for line in done.lost)):
        print(f"note: {line}", file=sys.stderr)
    said = {
        "alpha": f"--alpha {done.file.sites[0].scale * done.file.sites[0].r:g}",
        "heads": "--heads",
        "groups": "--group",
    }
    asks = ", ".join(said[what] for what in li.FORMATS[done.format].asks)
    print(f"{len(done.file.sites)} sites written to {done.path} as {done.format}" + f"; such a file does not tell {asks}" * bool(asks)
          + f"; {done.asks}" * bool(done.asks))  # fmt: skip


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="Directory or hub name.")],
    adapters: Annotated[list[Path], typer.Argument(help="One or more adapters: directories or .safetensors files.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to make; must not exist, or be empty.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Into MODEL itself; `lorainject unmerge` takes it out again.")
    ] = False,
    weights: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="Of each adapter, in their order; 1 each if not given.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse where rounding to the stored dtype would lose much of the update.")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept a base that the adapter was not made for.")
    ] = False,
) -> None:
    """Fold ADAPTERS into MODEL's checkpoint, shard by shard: nearly a file copy, whatever its size."""
    if (out is None) != in_place:
        raise li.SpecError(
            "merge needs either --output DIR or --in-place", way_out="lorainject merge MODEL ADAPTER -o DIR"
        )
    options: dict[str, Any] = {"weights": weights, "strict": strict, "check_base": not any_base}
    with _progress("merging") as progress:
        if out is None:
            report = li.merge_in_place(_local(model), adapters, progress=progress, **options)
        else:
            report = li.merge_checkpoint(_local(model), adapters, out, progress=progress, **options)
    where = f"written to {out}" if out is not None else f"`lorainject unmerge {model}` takes it out again"
    print(f"merged {', '.join(map(str, adapters))} into {len(report.sites)} weights ({report.weight_bytes:,} bytes);"
          f" {report.survival:.4f} of the update survived the storage dtype\n{where}")  # fmt: skip


@app.command()
def unmerge(
    model: Annotated[Path, typer.Argument(help="A directory that `lorainject merge --in-place` has changed.")],
) -> None:
    """Give MODEL back every byte that it had before `merge --in-place`, or before one that was interrupted."""
    with _progress("unmerging") as progress:
        li.unmerge_in_place(model, progress=progress)
    print(f"{model} is what it was: every file to the byte")


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that counts bytes, on stderr, if that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _local(model: str) -> Path:
    """The directory, or the hub's model in the local cache."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    ignored = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "onnx/*"]
    return Path(_hub(model, snapshot_download, ignore_patterns=ignored))


def _rows(rows: tuple[range, ...] | None) -> list[tuple[int, int, int]] | None:
    """A slice's rows for JSON: start, stop, step of each run."""
    return None if rows is None else [(part.start, part.stop, part.step) for part in rows]


def _layers(entries: list[str] | None) -> list[int] | None:
    """["0-2", "5"] -> [0, 1, 2, 5]."""
    if entries is None:
        return None
    try:
        ends = [entry.partition("-")[::2] for entry in entries]
        return [number for first, last in ends for number in range(int(first), int(last or first) + 1)]
    except ValueError:
        raise li.SpecError(
            f"--layers {' '.join(entries)}: neither a number nor a range", way_out="write --layers 3 or --layers 0-3"
        ) from None


def _config(model: str) -> Any:
    from transformers import AutoConfig

    return _hub(model, AutoConfig.from_pretrained)


def _model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from; without one in the config, the bare model's."""
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    known = getattr(transformers, name, None) if name else None
    return known or transformers.AutoModel._model_mapping[type(config)]


def _hub(model: str, get: Callable[..., Any], **options: Any) -> Any:
    try:
        return get(model, **options)
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        if Path(model).exists():
            raise li.FileError(
                f"{model} can't be loaded: {reason}",
                way_out="give a directory with config.json, as save_pretrained writes it",
            ) from e
        raise li.FileError(
            f"{model!r} is neither a directory here nor to be had from the hub: {reason}",
            way_out="check the spelling and the connection, or give the path of a local directory",
        ) from e


def _hints(alpha: float | None, heads: str | None, groups: list[str] | None, component: str | None, architecture: str | None,
           base: str | None) -> li.Hints:  # fmt: skip
    """What the options say of a file that does not say it itself."""
    try:
        pair = None if heads is None else tuple(map(int, heads.split(",")))
        if pair is not None and len(pair) not in (1, 2):
            raise ValueError
    except ValueError:
        raise li.SpecError(
            f"--heads {heads}: not one or two numbers",
            way_out="write --heads 32,8 for 32 heads of queries and 8 of keys",
        ) from None
    if odd := [g for g in groups or () if not re.fullmatch(r"[^=]+=[01]+", g)]:
        raise li.SpecError(
            f"--group {' '.join(odd)}: not a name and a row of 0 and 1",
            way_out="write --group c_attn=101 for q and v of q, k, v",
        )
    enabled = {name: [bit == "1" for bit in bits] for name, _, bits in (g.partition("=") for g in groups or ())}
    return li.Hints(alpha=alpha, heads=None if pair is None else (pair[0], pair[-1]), groups=enabled or None, component=component,
                    architecture=architecture, model=None if base is None else _skeleton(base))  # fmt: skip


def _skeleton(base: str) -> Any:
    """The model of a config, on the meta device."""
    import torch

    with torch.device("meta"):
        return _model_class(config := _config(base))(config)


if __name__ == "__main__":
    main()

"""What all commands share: the application, options that several of them have, progress, and models from the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import lorainject as li

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
    (r"hints=Hints\(original=model\)", "lorainject convert ADAPTER OUT --original MODEL"),
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


def in_shell_spelling(message: str) -> str:
    for pattern, replacement in SHELL_SPELLING:
        message = re.sub(pattern, replacement, message)
    return message


@contextmanager
def progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of bytes done and bytes in all that moves a bar on stderr, if stderr is a terminal."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def parse_layers(entries: list[str] | None) -> list[int] | None:
    """Return the layer numbers of entries such as "5" and "0-2"."""
    if entries is None:
        return None
    try:
        ends = [entry.partition("-")[::2] for entry in entries]
        return [number for first, last in ends for number in range(int(first), int(last or first) + 1)]
    except ValueError:
        what = f"--layers {' '.join(entries)}: this is neither a number nor a range"
        raise li.SpecError(what, way_out="write --layers 3 or --layers 0-3") from None


def make_hints(alpha: float | None = None, heads: str | None = None, groups: Sequence[str] | None = None,
               component: str | None = None, architecture: str | None = None, base: str | None = None,
               original: str | None = None) -> li.Hints:  # fmt: skip
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
        component=component, architecture=architecture, model=None if base is None else meta_model(base),
        original=None if original is None else _load_model(original),
    )  # fmt: skip


def meta_model(model: str) -> Any:
    """Build the model of a config on the meta device, in the class that the checkpoint was saved from if it names
    one."""
    import torch

    model_class, config = _model_class(model)
    with torch.device("meta"):
        return model_class(config)


def _load_model(model: str) -> Any:
    """Load a model with its values."""
    return _from_hub(model, _model_class(model)[0].from_pretrained)


def _model_class(model: str) -> tuple[Any, Any]:
    """Return the class that a checkpoint was saved from, or the bare model of its config, and the config."""
    import transformers

    config = _from_hub(model, transformers.AutoConfig.from_pretrained)
    name = (getattr(config, "architectures", None) or [""])[0] or ""
    return getattr(transformers, name, None) or transformers.AutoModel._model_mapping[type(config)], config


def local_model(model: str) -> Path:
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

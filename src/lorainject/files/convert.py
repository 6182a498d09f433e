"""Every format by one table; `read`, `write` and `convert`: a file into the record, the record into another file.

li.read("adapter.gguf", hints=li.Hints(heads=(32, 8)))
li.write(file, "out", format="peft")
li.convert("lit_model.pth.lora", "out", format="peft", allow_pickle=True)
li.convert("adapter", "out", engine="vllm")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError, SpecError
from ..lora.model_index import ModelIndex
from . import engines
from .fit import describe_changes, fit_record
from .format import Format
from .formats import adapterhub, diffusers, gguf, kohya, litgpt, loralib, mlx, native, onnx, peft_reader, torchtune
from .formats.pairs import other_method
from .io import atomic_write
from .io.open_adapter import FILES, Hints, Source, open_source
from .record import AdapterFile, payload_problems
from .rename import rename_for_model, select_component

# The first that claims a source has it: the more particular ones come first.
FORMATS: dict[str, Format] = {f.name: f for f in (
    native.FORMAT, gguf.FORMAT, onnx.FORMAT, kohya.FORMAT, diffusers.FORMAT, peft_reader.FORMAT, torchtune.FORMAT, mlx.FORMAT, adapterhub.FORMAT,
    litgpt.FORMAT, loralib.FORMAT,
)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `write` and `convert` did."""

    path: Path
    format: str
    file: AdapterFile
    """As it was written, in the form that the format holds."""
    lost: tuple[str, ...] = ()
    """What was left out, one line each; nothing unless `lossy` was asked for."""
    changed: tuple[str, ...] = ()
    """What was rewritten, one line each, with the same update of every weight."""
    asks: str | None = None
    """What the engine must be told when it is started."""


def read(
    path: str | Path, *, format: str | None = None, allow_pickle: bool = False, hints: Hints | None = None
) -> AdapterFile:
    """Read an adapter file or directory of any format in `li.FORMATS`, without a model.

    The format is found by content; `format` says it where the content leaves it open. Pickles are opened only with `allow_pickle=True`,
    and then by torch's restricted unpickler. Raises FileError with all that is wrong with the file, or that `hints` have to tell.
    """
    return understood(open_source(path, allow_pickle), format, hints)


def understood(source: Source, format: str | None = None, hints: Hints | None = None,
               index: ModelIndex | None = None) -> AdapterFile:  # fmt: skip
    """The same of what has been opened; `index` is that of hints.model, where it exists already."""
    path, hints = source.path, hints or Hints()
    form = _form(format) if format is not None else next((f for f in FORMATS.values() if f.claims(source)), None)
    if form is None:
        raise FileError(
            f"{path} is in no format that is known here:", _unknown(source), f"known are {', '.join(FORMATS)}"
        )
    problems = payload_problems(source.tensors)
    try:
        file = form.read(source, hints, problems)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ArithmeticError) as e:
        what = f"{source.path} and the config beside it are" if source.configs else f"{source.path} is"
        raise FileError(
            f"{what} not as {form.library} writes them: {type(e).__name__}: {e}",
            way_out="get the file again, or save the adapter anew",
        ) from e
    if file is not None and hints.component is not None:
        file = select_component(file, hints.component)
    if file is not None and not file.sites and not problems:
        problems.append("it holds no A and B" + (f" of {hints.component}" if hints.component else ""))
    if problems or file is None:
        raise FileError(
            f"{path} can't be used:",
            problems,
            "get a damaged file again; what is not plain LoRA, merge or convert with PEFT first",
        )
    return file if hints.model is None else rename_for_model(file, index or ModelIndex(hints.model))


def write(file: AdapterFile, path: str | Path, *, format: str | None = None, engine: str | None = None, lossy: bool = False,
          hints: Hints | None = None) -> Conversion:  # fmt: skip
    """Write a record in a format of `li.FORMATS` (our own, if none is named), or as an engine of `li.ENGINES` serves it rightly; atomically.

    What has no place there is converted where an exact form exists. Raises FileError with everything else, before anything is written;
    `lossy=True` leaves it out instead, and says what and how much.
    """
    if format is not None and engine is not None:
        raise SpecError(
            f"format {format!r} or engine {engine!r}: one of the two",
            way_out=f"{engine} reads a format of its own: leave format out",
        )
    served = None if engine is None else engines.engine(engine)
    path, form = Path(path), _form(format or "lorainject") if served is None else served.form
    if not file.sites:
        raise FileError(f"{file.path} holds no A and B", way_out="nothing was written")
    fit, lost = fit_record(file, form, lossy)
    changed, problems, n = describe_changes(file, fit), list[str](), len(fit.sites)
    for check in served.checks if served else ():
        fit = check(fit, hints or Hints(), problems)
    if problems:
        raise FileError(
            f"{form.name} does not serve this adapter:",
            problems,
            "have it merged into the base instead (PEFT's merge_and_unload)",
        )
    if added := [s.name for s in fit.sites[n:]]:
        changed.append(
            f"{len(added)} sites of zeros are added, without which {form.name} refuses it: {', '.join(added[:3])}{', ...' * (len(added) > 3)}"
        )
    if not fit.sites:
        raise FileError(f"{form.name} has no place for any of the sites", lost, "nothing was written")
    if form.suffix and path.suffix != form.suffix:
        raise FileError(f"{form.name} is a single file", way_out=f"give a path that ends in {form.suffix}")
    if not form.suffix and (path.is_file() or path.suffix == ".safetensors") and form.write is not native.write:
        raise FileError(
            f"{form.name} is a directory", way_out="give a path that is no file, and does not end in .safetensors"
        )
    files = form.write(fit, path, hints or Hints())
    if others := [name for name in FILES if (path / name).exists() and path / name not in files]:
        raise FileError(
            f"{path} holds another adapter, with which this one would be mixed up:", others, "give another directory"
        )
    atomic_write.write(files)
    return Conversion(path=path, format=served.reads if served else form.name, file=fit, lost=lost, changed=tuple(changed),
                      asks=served.asks(fit) if served else None)  # fmt: skip


def convert(source: str | Path, path: str | Path, *, format: str | None = None, engine: str | None = None, lossy: bool = False,
            allow_pickle: bool = False, hints: Hints | None = None) -> Conversion:  # fmt: skip
    """`write(read(source), path, format=format)`, or `engine=engine`."""
    _ = (
        (format is None or _form(format)),
        (engine is None or engines.engine(engine)),
    )  # misspelt: before anything is read
    return write(
        read(source, allow_pickle=allow_pickle, hints=hints),
        path,
        format=format,
        engine=engine,
        lossy=lossy,
        hints=hints,
    )


def _form(name: str) -> Format:
    if name not in FORMATS:
        raise SpecError(f"there is no format {name!r}", way_out=f"choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _unknown(source: Source) -> list[str]:
    """What can be said of a source that no format claims."""
    found = [
        f"it is {what}, which is no pair of low-rank factors"
        for what in dict.fromkeys(map(other_method, source.tensors))
        if what
    ]
    names = list(source.tensors)
    return found or [f"it holds {len(names)} tensors: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"]

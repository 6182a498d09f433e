"""Read, write and convert adapter files of every format, without a model.

    li.read("adapter.gguf", hints=li.Hints(heads=(32, 8)))
    li.write(file, "out", format="peft")
    li.convert("lit_model.pth.lora", "out", format="peft", allow_pickle=True)
    li.convert("adapter", "out", engine="vllm")

Every reader makes a record of a file (record.py), and every writer makes a file of a record that fits its format
(fit.py). FORMATS is the table of both. The format of a file is found by its content, never by its name.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError, SpecError, system_errors
from ..lora.model_index import ModelIndex
from ..numerics.modes import in_default_modes
from ..spec import explains_settings
from . import engines
from .fit import describe_changes, fit_record
from .format import Format
from .formats import adapterhub, diffusers, gguf, kohya, litgpt, loralib, mlx, native, onnx, peft_reader, torchtune
from .formats.pairs import REMOVE_ONE, other_method
from .io import atomic_write
from .io.open_adapter import FILES, Hints, Source, open_source
from .io.regular_file import as_path
from .parts import select_component
from .read_back import require_same
from .record import AdapterFile, Problem, next_steps, payload_problems
from .rename import rename_for_model

# The first format that claims a source has it, so the more specific ones come first.
MODULES = (native, gguf, onnx, kohya, diffusers, peft_reader, torchtune, mlx, adapterhub, litgpt, loralib)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in MODULES}

DAMAGED = "if the file is damaged, copy it again, or save it again with the library that wrote it"
TEMPORARY_SPACE = "check the free space in the system's directory for temporary files, where a copy is read back"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `write` or `convert` did."""

    path: Path
    """Where the adapter was written."""
    format: str
    """The format of the written file, a name in `li.FORMATS`."""
    file: AdapterFile
    """The record as it was written, in the form that the format holds."""
    lost: tuple[str, ...] = ()
    """What was left out, one line each; empty unless `lossy` was asked for."""
    changed: tuple[str, ...] = ()
    """What was rewritten, one line each; the update of every weight is the same before and after."""
    asks: str | None = None
    """What the engine must be told when it is started."""


@explains_settings
@in_default_modes
def read(
    path: str | Path, *, format: str | None = None, allow_pickle: bool = False, hints: Hints | None = None
) -> AdapterFile:
    """Read an adapter file or directory of any format in `li.FORMATS`, without a model.

    Args:
        path: The file or directory.
        format: Its format, for a file whose content fits several; None finds it by content.
        allow_pickle: Open pickles, with torch's restricted unpickler. Without it they are refused.
        hints: What the file does not say, for instance alpha, or the base model for its names and layouts.

    Returns:
        The record of the file.

    Raises:
        FileError: All that is wrong with the file, or that `hints` must tell.
        SpecError: There is no such format.
    """
    return read_source(open_source(path, allow_pickle), format, hints)


def read_source(
    source: Source, format: str | None = None, hints: Hints | None = None, index: ModelIndex | None = None
) -> AdapterFile:
    """Return the record of an opened source, as `read` does; `index` is that of hints.model, if there is one."""
    path, hints = source.path, hints or Hints()
    form = _format(format) if format is not None else next((f for f in FORMATS.values() if f.claims(source)), None)
    if form is None:
        raise FileError(
            f"{path} is in no format that is known here:", _describe(source), f"known are {', '.join(FORMATS)}"
        )
    problems = payload_problems(source.tensors)
    try:
        file = form.read(source, hints, problems)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ArithmeticError) as e:
        subject = f"{path} or the config next to it" if source.configs else f"{path}"
        raise FileError(
            f"{subject} is not as {form.library} writes it: {type(e).__name__}: {e}",
            way_out="check how the file was made, or save the adapter again with the library that trained it",
        ) from e
    if file is not None and hints.component is not None:
        file = select_component(file, hints.component, problems)
    if file is not None:
        problems += _repeated(file, source)
    if file is not None and file.is_empty and not problems:
        problems.append("it holds no A and B, and no other tensors of an adapter")
    if problems or file is None:
        raise FileError(
            f"{path} cannot be read as an adapter of the format {form.name}:", problems, next_steps(problems, DAMAGED)
        )
    if hints.model is None:
        return file
    file = rename_for_model(file, index or ModelIndex(hints.model))
    if problems := _repeated(file, source):
        raise FileError(f"{path} names one weight of this model twice:", problems, REMOVE_ONE)
    return file


def _repeated(file: AdapterFile, source: Source) -> list[str]:
    """Return a line per site that a record has twice, with the keys: which of the two adapters counts is not known."""
    counts = Counter(s.name for s in file.sites)
    repeated = {s.A.data_ptr(): s.name for s in file.sites if counts[s.name] > 1}
    keys: dict[str, list[str]] = {name: [] for name in repeated.values()}
    for key in source.tensors if keys else ():
        if (name := repeated.get(source.tensors[key].data_ptr())) is not None:
            keys[name].append(key)
    return [
        Problem(f"{name}: the file has {counts[name]} adapters for it: {', '.join(keys[name])}", REMOVE_ONE)
        for name in keys
    ]


@explains_settings
@in_default_modes
def write(
    file: AdapterFile,
    path: str | Path,
    *,
    format: str | None = None,
    engine: str | None = None,
    lossy: bool = False,
    hints: Hints | None = None,
) -> Conversion:
    """Write a record atomically in a format of `li.FORMATS`, or in the form that an engine of `li.ENGINES` serves
    correctly.

    What has no place in the format is converted where an exact form exists. What was written is read again and compared
    with the record before it is put in place (read_back.py), which takes the time and the space of a second copy.

    Args:
        file: The record.
        path: The file or directory to be written.
        format: A name in `li.FORMATS`; None means our own.
        engine: A name in `li.ENGINES`, in place of a format.
        lossy: Leave out what has no exact form, and list it in `Conversion.lost`, instead of raising.
        hints: What the format needs beyond the record, for instance the number of heads.

    Returns:
        What was written, rewritten and left out.

    Raises:
        FileError: All that has no place in the format, that its reader would take for something else, or that `hints`
            must tell. Nothing was written.
        SpecError: There is no such format or engine, or both were given.
    """
    if format is not None and engine is not None:
        raise SpecError(
            f"format {format!r} and engine {engine!r} exclude each other",
            way_out=f"{engine} reads a format of its own: leave format out",
        )
    served = None if engine is None else engines.engine(engine)
    form = served.form if served else _format(format or "lorainject")
    path, hints = as_path(path), hints or Hints()
    if file.is_empty:
        raise FileError(f"{file.path} holds no A and B", way_out="nothing was written")
    fit, lost = fit_record(file, form, lossy)
    changed = describe_changes(file, fit)
    if served:
        count = len(fit.sites)
        fit = _prepare(fit, served, hints)
        if added := [s.name for s in fit.sites[count:]]:
            names = ", ".join(added[:3]) + ", ..." * (len(added) > 3)
            changed.append(f"{len(added)} sites of zeros are added, without which {form.name} refuses it: {names}")
    if not fit.sites and (fit.is_empty or form.write is not native.write):
        raise FileError(f"{form.name} has no place for an adapter without A and B", lost, "nothing was written")
    _check_path(path, form)
    with system_errors(f"{path} cannot be written", ["what was there before is unchanged"], TEMPORARY_SPACE):
        written = form.write(fit, path, hints)
        files = {place: pieces if pieces is None else list(pieces) for place, pieces in written.items()}
        require_same(file, fit, form, files, path, hints)
    if others := [name for name in FILES if (path / name).exists() and path / name not in files]:
        raise FileError(
            f"{path} holds another adapter, which would be mixed up with this one:", others, "give another directory"
        )
    atomic_write.write(files)
    return Conversion(path=path, format=served.reads if served else form.name, file=fit, lost=lost,
                      changed=tuple(changed), asks=served.asks(fit) if served else None)  # fmt: skip


@explains_settings
@in_default_modes
def convert(
    source: str | Path,
    path: str | Path,
    *,
    format: str | None = None,
    engine: str | None = None,
    lossy: bool = False,
    allow_pickle: bool = False,
    hints: Hints | None = None,
) -> Conversion:
    """Read an adapter and write it in another format, or for an engine.

    Args:
        source: The file or directory to be read.
        path: The file or directory to be written.
        format, engine, lossy: As in `write`.
        allow_pickle: As in `read`.
        hints: What the file does not say, and what the format needs beyond the record.

    Returns:
        What was written, rewritten and left out.

    Raises:
        FileError: All that is wrong with the file, or that has no place in the format. Nothing was written.
        SpecError: There is no such format or engine, or both were given.
    """
    if format is not None:
        _format(format)  # a misspelled name is reported before anything is read
    if engine is not None:
        engines.engine(engine)
    file = read(source, allow_pickle=allow_pickle, hints=hints)
    return write(file, path, format=format, engine=engine, lossy=lossy, hints=hints)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise SpecError(f"there is no format {name!r}", way_out=f"choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _prepare(file: AdapterFile, engine: engines.Engine, hints: Hints) -> AdapterFile:
    """Return the record as the engine's checks want it. Raises FileError with all that the engine does not serve."""
    problems: list[str] = []
    for check in engine.checks:
        file = check(file, hints, problems)
    if problems:
        raise FileError(f"{engine.form.name} does not serve this adapter:", problems, engines.MERGED)
    return file


def _check_path(path: Path, form: Format) -> None:
    """Raise FileError unless the path can be the format's single file or directory."""
    if form.suffix and path.suffix != form.suffix:
        raise FileError(f"{form.name} is a single file", way_out=f"give a path that ends in {form.suffix}")
    if form.suffix or form.write is native.write:  # our own format is either
        return
    if path.is_file() or path.suffix == ".safetensors":
        raise FileError(
            f"{form.name} is a directory",
            way_out="give a path that is not an existing file and does not end in .safetensors",
        )


def _describe(source: Source) -> list[str]:
    """Return what can be said about a source that no format claims."""
    if methods := [method for method in dict.fromkeys(map(other_method, source.tensors)) if method]:
        return [f"it is {method}, which is no pair of low-rank factors" for method in methods]
    names = list(source.tensors)
    return [f"it holds {len(names)} tensors: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"]

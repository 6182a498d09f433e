"""Open an adapter before anybody knows its format: the tensors, their header and the configs next to them.

A directory is recognized by the names of its files, a file by its first bytes (containers.py). The files may come from
strangers: sizes are checked before anything is read by them, and all members of an archive before any is read. What the
tensors mean is decided later, by the formats (convert.py).
"""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from ...errors import FileError, system_errors
from ...spec import explains_settings
from ...spec.safe_yaml import parse_yaml
from . import atomic_write, containers, safetensors_file
from .regular_file import as_path, read_regular
from .safetensors_file import COPY_AGAIN

TENSORS = "adapter_model.safetensors"
FILES = (
    TENSORS, "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
    "adapters.safetensors", "adapters.npz", "adapter.safetensors", "pytorch_adapter.bin", "lit_model.pth.lora",
    "lit_model_lora_finetuned.pth", "adapter_model.pt",
)  # fmt: skip
"""What libraries call the tensor file. If a directory has several, the first one of this list is read."""
CONFIG = "adapter_config.json"
CONFIGS = (CONFIG, "hyperparameters.yaml", "model_config.yaml")
NEMO = ("model_config.yaml", "model_weights.ckpt")
MAX_NAME = 1024  # characters of a tensor's name
MAX_TEXT = 2**24  # bytes of a config, or of JSON in a header
MAX_YAML = 2**18  # bytes of a config in YAML, whose parser takes a second for a megabyte
MAX_MEMBERS = 10_000
UNPACK = "unpack it yourself and give the adapter in it"
EXPORT_NEMO = "export it to Hugging Face's format with NeMo, and give that"


@explains_settings
@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a file does not say about itself. A format that needs a hint asks for it by name."""

    alpha: float | None = None
    """Alpha, for files that do not hold it (loralib, torchtune, bare tensor files)."""
    scaling: str = "standard"
    """How this `alpha` becomes the scale: "standard" or "rslora"."""
    heads: tuple[int, int] | None = None
    """The numbers of attention heads of queries, and of keys and values. Needed for formats that order the rows of q
    and k differently (torchtune, GGUF)."""
    groups: Mapping[str, Sequence[bool]] | None = None
    """loralib's `enable_lora`, by the end of a module's path: {"c_attn": [True, False, True]}."""
    expert_order: str | None = None
    """The order of the columns of a stack's B: "rank_major" (PEFT) or "grouped_by_expert" (unsloth up to 2026.9.5)."""
    out_proj_factor: float | None = None
    """The factor by which PEFT multiplied the update of nn.MultiheadAttention's out_proj. None means 2 for files of
    PEFT up to 0.21.2, which adds that update twice, and 1 for later ones."""
    component: str | None = None
    """The component of an image pipeline: "unet", "transformer", "text_encoder", "text_encoder_2". Reading takes only
    this component's sites; writing names the component that the sites belong to."""
    architecture: str | None = None
    """GGUF's name of the base's architecture, such as "llama"."""
    model: nn.Module | None = field(default=None, repr=False)
    """The base model, which may be on the meta device. Names and layouts are then looked up in it."""
    original: nn.Module | None = field(default=None, repr=False)
    """The original base with its values, for an adapter that belongs to an altered one (PEFT's PiSSA and OLoRA): it is
    then read as an adapter of twice the rank on the original base."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened file or directory."""

    path: Path
    """The path that the caller gave."""
    file: Path
    """The tensor file."""
    container: str
    """"safetensors", "pickle", "npz", "gguf" or "onnx_adapter"."""
    tensors: Mapping[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    """The metadata of the tensor file's header."""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The configs next to the tensor file, by file name."""

    @property
    def config(self) -> dict[str, Any]:
        """The contents of adapter_config.json, empty if there is none."""
        return self.configs.get(CONFIG, {})


def open_source(path: str | Path, allow_pickle: bool = False, spool: bool = False) -> Source:
    """Find the tensor file and the configs next to it, and read them.

    Args:
        path: A directory or a tensor file.
        allow_pickle: Open pickles, with torch's restricted unpickler.
        spool: Keep the tensors of a safetensors file in a temporary file instead of memory (safetensors_file.Spool).

    Raises:
        FileError: If there is no adapter at the path, or one that is damaged or not safe to open.
    """
    path = as_path(path)
    opened = functools.partial(_open, path, allow_pickle=allow_pickle, spool=spool)
    if path.is_dir():
        names = (*FILES, *CONFIGS)
        return atomic_write.read(path, names, lambda locate: opened(next(filter(locate, FILES), None), locate))
    if path.name in FILES:
        return atomic_write.read(path.parent, (path.name, *CONFIGS), lambda locate: opened(path.name, locate))
    return opened("", lambda name: None)  # the configs next to a file of another name need not belong to it


def _open(path: Path, name: str | None, locate: atomic_write.Locate, *, allow_pickle: bool, spool: bool) -> Source:
    if name is None:
        raise _no_adapter(path)
    file = locate(name) or path
    located = {config: locate(config) for config in CONFIGS}
    configs = {config: _read_config(place, config) for config, place in located.items() if place and place.is_file()}
    container = containers.detect(file)
    if container == "tar":
        return _open_archive(path)
    if container == "pickle" and not allow_pickle:
        kind = containers.PICKLES[containers.first_bytes(file)[:1]]
        danger = f"it looks like {kind}, which could run code when it is opened"
        way_out = "if you trust it, pass allow_pickle=True (torch's restricted unpickler takes only tensors from it)"
        raise FileError(f"{file} is not safetensors", [danger], way_out)
    if container == "safetensors" and spool:
        tensors, metadata = safetensors_file.spool(file)
    else:
        tensors, metadata = containers.READERS[container](file)
    if long := [key[:40] for key in tensors if len(key) > MAX_NAME]:
        way_out = "no module has such a name, so this may be an attack: get the adapter from a source that you trust"
        raise FileError(f"{file} has tensors with names of more than {MAX_NAME} characters:", long, way_out)
    return Source(path=path, file=file, container=container, tensors=tensors, metadata=metadata, configs=configs)


def header_json(source: Source, key: str) -> dict[str, Any] | None:
    """Return the JSON object that the header's metadata hold under this key, or None if the key is missing."""
    text = source.metadata.get(key)
    return None if text is None else parse_json(f"{key} in the header of {source.file}", text)


def parse_json(what: str, text: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a text. Raise a FileError that names `what` for anything else, however long or deep."""
    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"it has {len(text):,} bytes")
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as e:
        way_out = "if it was edited, correct it; else copy or download the adapter again, or save it again"
        raise FileError(f"{what} cannot be read as JSON: {e}", way_out=way_out) from e
    return value


def _no_adapter(folder: Path) -> FileError:
    contents = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    problems = [f"it holds {contents}"]
    way_out = "give the directory that save (or PEFT) wrote, or the tensor file itself"
    if (folder / "adapter_metadata.json").exists():
        problems.append("this is a distributed checkpoint of NeMo, which only NeMo can put together")
        way_out = EXPORT_NEMO
    elif below := next(folder.glob(f"*/{TENSORS}"), None):  # PEFT puts an adapter with a name of its own there
        way_out = f"give {below.parent}"
    return FileError(f"{folder} holds no {TENSORS}, and no adapter under another name", problems, way_out)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    with system_errors(f"{path} cannot be read", way_out="check its permissions"):
        text = read_regular(path, MAX_TEXT if name.endswith(".json") else MAX_YAML)
    return parse_json(str(path), text) if name.endswith(".json") else parse_yaml(path, text)


def _open_archive(path: Path) -> Source:
    """Open Tinker's archive, a tar with PEFT's two files, which are read without unpacking anything to disk."""
    try:
        with tarfile.open(path, "r:*") as tar:
            files = {PurePosixPath(m.name).name: m for m in _members(tar, path) if m.isfile()}
            if any(name in files for name in NEMO):
                raise FileError(f"{path} is an archive of NeMo", way_out=EXPORT_NEMO)
            if not {TENSORS, CONFIG} <= files.keys():
                contents = [f"it holds {', '.join(list(files)[:8]) or 'no files'}"]
                raise FileError(f"{path} is an archive without {TENSORS} and {CONFIG}", contents, UNPACK)
            if files[CONFIG].size > MAX_TEXT:
                what = f"{CONFIG} in {path} has {files[CONFIG].size:,} bytes, and no config is that long"
                raise FileError(what, way_out=UNPACK)
            config, data = (_member_bytes(tar, files[name]) for name in (CONFIG, TENSORS))
    except FileError:
        raise
    except (tarfile.TarError, OSError, EOFError) as e:
        raise FileError(f"{path} cannot be read as an archive: {e}", way_out=COPY_AGAIN) from e
    tensors, metadata = safetensors_file.parse(data, f"{TENSORS} in {path}")
    configs = {CONFIG: parse_json(f"{CONFIG} in {path}", config)}
    return Source(path=path, file=path, container="safetensors", tensors=tensors, metadata=metadata, configs=configs)


def _members(tar: tarfile.TarFile, path: Path) -> list[tarfile.TarInfo]:
    """List an archive's members. Raise FileError if there is too much, or if a member could lead out of the archive."""
    members: list[tarfile.TarInfo] = []
    total, limit = 0, max(containers.MIN_UNPACKED, containers.MAX_RATIO * path.stat().st_size)
    for member in tar:  # one by one, because a hostile archive may have no end
        members.append(member)
        total += member.size
        if len(members) > MAX_MEMBERS or total > limit:
            raise FileError(f"{path} unpacks to more than any adapter needs", way_out=UNPACK)
    if unsafe := [m.name for m in members if not _is_safe(m)]:
        problems = [f"{name!r} leads out of it, or is a link or device" for name in unsafe[:20]]
        raise FileError(f"{path} is not a safe archive:", problems, "ask for the adapter as a directory")
    return members


def _is_safe(member: tarfile.TarInfo) -> bool:
    name = PurePosixPath(member.name)
    return not name.is_absolute() and ".." not in name.parts and (member.isfile() or member.isdir())


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    return b"" if content is None else content.read()

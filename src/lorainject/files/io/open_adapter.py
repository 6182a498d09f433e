"""What lies on disk before anybody has understood it: tensors, header, configs beside them.

A directory is an adapter by the names in it, a file by its first bytes (containers.py). Sizes are checked before anything is read by them, an
archive's members before any of them.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from ...errors import FileError, system_errors
from . import atomic_write, containers, safetensors_file

TENSORS = "adapter_model.safetensors"
# In this order, if there are several: whoever writes both means the first.
FILES = (TENSORS, "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapters.safetensors", "adapters.npz",
         "adapter.safetensors", "pytorch_adapter.bin", "lit_model.pth.lora", "lit_model_lora_finetuned.pth", "adapter_model.pt")  # fmt: skip
CONFIG = "adapter_config.json"
CONFIGS = (CONFIG, "hyperparameters.yaml", "model_config.yaml")
LONGEST_NAME = 1024
LONGEST = 2**24  # bytes of a config, or of JSON in a header


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a file does not say by itself. None: not told; a format that needs it says so."""

    alpha: float | None = None
    """The numerator of the scale, for files that hold none (loralib, torchtune, bare tensor files)."""
    scaling: str = "standard"
    """How alpha, where it is given here, becomes the scale."""
    heads: tuple[int, int] | None = None
    """Attention heads of queries, and of keys and values: for formats that sort the rows of q and k in another way (torchtune, GGUF)."""
    groups: Mapping[str, Sequence[bool]] | None = None
    """loralib's enable_lora, by the end of a module's path: {"c_attn": [True, False, True]}."""
    expert_order: str | None = None
    """How the columns of a stack's B go: "rank_major" (PEFT) or "grouped_by_expert" (unsloth up to 2026.9.5)."""
    out_proj_factor: float | None = None
    """What PEFT's nn.MultiheadAttention applied out_proj's update times. None: 2 up to 0.21.2, whose code adds it twice, 1 after."""
    component: str | None = None
    """Of an image pipeline: "unet", "transformer", "text_encoder", "text_encoder_2". Read: only this one's sites; write: whose these are."""
    architecture: str | None = None
    """GGUF's word for the base ("llama")."""
    model: nn.Module | None = field(default=None, repr=False)
    """The base, on the meta device if you like: names and layouts are then looked up in it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened file or directory."""

    path: Path
    """As it was given."""
    file: Path
    """The tensor file."""
    container: str
    """"safetensors", "pickle", "npz", "gguf" or "onnx_adapter"."""
    tensors: Mapping[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    """The header's."""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By file name."""

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json; empty if there is none."""
        return self.configs.get(CONFIG, {})


def open_source(path: str | Path, allow_pickle: bool = False, spool: bool = False) -> Source:
    """Find the tensor file and what lies beside it, and read them. Raises FileError for all that is no adapter, or not to be trusted.

    With `spool` a safetensors file takes no memory, but room in a temporary one (see safetensors_file.Spool).
    """
    path = Path(path)
    opened = functools.partial(_opened, path, allow_pickle=allow_pickle, spool=spool)
    if path.is_dir():
        return atomic_write.read(
            path, (*FILES, *CONFIGS), lambda where: opened(next(filter(where, FILES), None), where)
        )
    if path.name in FILES:
        return atomic_write.read(path.parent, (path.name, *CONFIGS), lambda where: opened(path.name, where))
    return opened("", lambda name: None)  # a file of any name says nothing of its neighbours


def _opened(path: Path, name: str | None, where: atomic_write.Locate, *, allow_pickle: bool, spool: bool) -> Source:
    """The tensor file of this name and the configs beside it; without a name, the file `path` alone."""
    if name is None:
        raise _nothing(path)
    file = where(name) or path
    configs = {config: _config(at, config) for config in CONFIGS if (at := where(config)) and at.is_file()}
    kind = containers.sniff(file)
    if kind == "tar":
        return _archive(path)
    if kind == "pickle" and not allow_pickle:
        looks = (
            f"it looks like {containers.PICKLES[containers.start(file)[:1]]}, which could run code when it is opened"
        )
        raise FileError(f"{file} is not a whole safetensors file", [looks],
                        "if you trust it: allow_pickle=True (only tensors are taken out of it, by torch's restricted unpickler)")  # fmt: skip
    tensors, metadata = safetensors_file.spool(file) if spool and kind == "safetensors" else containers.OPEN[kind](file)
    if long := [key[:40] for key in tensors if len(key) > LONGEST_NAME]:
        raise FileError(
            f"{file} has tensors with names of more than {LONGEST_NAME} characters:",
            long,
            "no module has such a name: it was made to do harm",
        )
    return Source(path=path, file=file, container=kind, tensors=tensors, metadata=metadata, configs=configs)


def header(source: Source, key: str) -> dict[str, Any] | None:
    """A JSON object in the header; None if there is none."""
    text = source.metadata.get(key)
    return None if text is None else parsed(f"{key} in the header of {source.file}", text)


def parsed(what: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises FileError for anything else, however long or deep."""
    try:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text):,} bytes")
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as e:
        raise FileError(
            f"{what} can't be read as JSON: {e}", way_out="get the file again, or save the adapter anew"
        ) from e
    return value


def _nothing(folder: Path) -> FileError:
    holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    if (folder / "adapter_metadata.json").exists():
        holds += ": a distributed checkpoint of NeMo, which only NeMo puts together; export it to Hugging Face's format there"
    below = [p.parent for p in folder.glob(f"*/{TENSORS}")]  # PEFT puts an adapter that is not called "default" there
    return FileError(f"{folder} holds no {TENSORS}, and no adapter by another name", [f"it holds {holds}"],
                     f"give {below[0] if below else 'the directory that save (or PEFT) wrote, or the tensor file itself'}")  # fmt: skip


def _config(path: Path, name: str) -> dict[str, Any]:
    with system_errors(f"{path} can't be read"):
        if path.stat().st_size > LONGEST:
            raise FileError(
                f"{path} has {path.stat().st_size:,} bytes", way_out="no config is that long: get the file again"
            )
        text = path.read_bytes()
    if name.endswith(".json"):
        return parsed(str(path), text)
    try:
        import yaml

        value = yaml.safe_load(text)
    except ModuleNotFoundError:
        raise FileError(f"{path} is YAML", way_out='pip install "lorainject[formats]"') from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise FileError(f"{path} can't be read as YAML: {e}", way_out="get the file again") from e
    return value if isinstance(value, dict) else {}


def _archive(path: Path) -> Source:
    """Tinker's archive: a tar with PEFT's two files in it. Read member by member, never unpacked."""
    try:
        with tarfile.open(path, "r:*") as tar:
            members: list[tarfile.TarInfo] = []
            for member in tar:  # one by one: a hostile archive may go on for ever
                members.append(member)
                if len(members) > 10_000 or sum(m.size for m in members) > max(
                    containers.SMALL, 100 * path.stat().st_size
                ):
                    raise FileError(
                        f"{path} holds too much for an adapter", way_out="unpack it yourself and give the adapter in it"
                    )
            if bad := [m.name for m in members if _escapes(m)]:
                raise FileError(f"{path} is no archive to be trusted:", [f"{n!r} leads out of it, or is a link or device" for n in bad[:20]],
                                "ask for the adapter as a directory")  # fmt: skip
            if any(PurePosixPath(m.name).name in ("model_config.yaml", "model_weights.ckpt") for m in members):
                raise FileError(
                    f"{path} is NeMo's", way_out="export it to Hugging Face's format with NeMo, and give that"
                )
            found = {
                PurePosixPath(m.name).name: m
                for m in members
                if m.isfile() and PurePosixPath(m.name).name in (TENSORS, CONFIG)
            }
            if found.keys() != {TENSORS, CONFIG}:
                raise FileError(f"{path} is an archive without {TENSORS} and {CONFIG}", [f"it holds {', '.join(m.name for m in members[:8])}"],
                                "unpack it yourself and give the adapter in it")  # fmt: skip
            if found[CONFIG].size > LONGEST:
                raise FileError(
                    f"{CONFIG} in {path} has {found[CONFIG].size:,} bytes", way_out="no config is that long"
                )
            text, data = ((tar.extractfile(found[name]) or io.BytesIO()).read() for name in (CONFIG, TENSORS))
    except (tarfile.TarError, OSError, EOFError) as e:
        if isinstance(e, FileError):
            raise
        raise FileError(f"{path} is no whole archive: {e}", way_out="get the file again") from e
    tensors, metadata = safetensors_file.parse(data, path)
    return Source(
        path=path,
        file=path,
        container="safetensors",
        tensors=tensors,
        metadata=metadata,
        configs={CONFIG: parsed(CONFIG, text)},
    )


def _escapes(member: tarfile.TarInfo) -> bool:
    name = PurePosixPath(member.name)
    return name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir())

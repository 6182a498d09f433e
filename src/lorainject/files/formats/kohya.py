"""kohya-ss, A1111 and LyCORIS' LoCon (4.1.3), one safetensors file.

    <prefix>_<path with _ for .>
        .lora_down.weight (r, in[, *kernel])               .lora_up.weight (out, r[, 1, 1])
        .alpha ()                                          s = alpha / r
        .lora_mid.weight (r, r, *kernel)                   with .lora_down.weight (r, in, 1, 1): a convolution in three
                                                           factors (Tucker)
        .dora_scale (out, 1[, 1, 1]) or (1, in[, 1, 1])    DoRA by output or by input
        .scale ()                                          s itself (A1111)

Without alpha s is 1. An underscore in a name may have been a dot, which only the model can tell: the record keeps the
flat names until the model is given (rename.py).

Sources: https://github.com/kohya-ss/sd-scripts (networks/lora_flux.py and lora_sd3.py for prefixes, train_network.py
and library/model_util.py for the header), https://github.com/KohakuBlueleaf/LyCORIS,
https://github.com/AUTOMATIC1111/stable-diffusion-webui (extensions-builtin/Lora/network.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import transforms
from ..format import Files, Format
from ..io import safetensors_file
from ..io.open_adapter import Hints, Source
from ..record import AdapterFile, Problem, StoredSite, checked_sites, require_writable
from .image_model_names import PREFIXES, kohya_prefix
from .pairs import Pair, as_matrices, read_pairs

ENDINGS = {".lora_down.weight": "A", ".lora_up.weight": "B", ".lora_A.weight": "A", ".lora_B.weight": "B",
           ".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "magnitude", ".scale": "scale"}  # fmt: skip


def claims(source: Source) -> bool:
    """True if .lora_down.weight follows a name without dots, or any of the endings a name with kohya's prefix."""
    for key in source.tensors:
        name, _, ending = key.partition(".")
        if f".{ending}" in ENDINGS and (kohya_prefix(name) or (name and ending == "lora_down.weight")):
            return True
    return False


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record, under the file's own names."""
    pairs = read_pairs(
        source.tensors, ENDINGS, problems, translate=lambda name: name if name and "." not in name else None
    )
    sites = [s for name, pair in pairs.items() if (s := _site(name, pair, problems)) is not None]
    return AdapterFile(path=source.path, format="kohya", sites=tuple(checked_sites(sites, problems)),
                       config=dict(source.metadata), namespace="kohya")  # fmt: skip


def _site(name: str, pair: Pair, problems: list[str]) -> StoredSite | None:
    A, B = pair.A, pair.B
    if B.ndim > 2 and B.shape[2:].numel() == 1:
        B = B.flatten(1)
    if (mid := pair.extras.get("mid")) is not None:
        if mid.ndim < 3 or min(A.ndim, B.ndim) < 2 or mid.shape[:2] != (B.shape[1], A.shape[0]):
            shapes = f"lora_down {tuple(A.shape)}, lora_mid {tuple(mid.shape)} and lora_up {tuple(B.shape)}"
            problems.append(f"{name}: {shapes} are no three factors (r, in, 1, 1), (r, r, *kernel) and (out, r)")
            return None
        A = transforms.tucker_A(name, mid, A)
    r = A.shape[0] if A.ndim else 1
    alpha: float = r
    if "scale" in pair.extras:
        alpha = float(pair.extras["scale"]) * r
    elif "alpha" in pair.extras:
        alpha = float(pair.extras["alpha"].flatten()[0])
    m = pair.extras.get("magnitude")
    axis = "out" if m is None or m.shape[0] == m.numel() else "in"
    return StoredSite(path=name, alpha=alpha, magnitude=None if m is None else m.flatten(), magnitude_axis=axis,
                      **as_matrices(A, B))  # fmt: skip


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return one safetensors file. Raises FileError with all paths that have no flat name, or another path's."""
    problems: list[str] = []
    names = flat_names(file, hints, problems)
    paths: dict[str, str] = {}
    for module, name in names.items():
        if paths.setdefault(name, module) != module:
            line = f"{module} and {paths[name]} are both {name}, because names in this format have no dots"
            problems.append(Problem(line, "rename one of the modules, or choose another format"))
    require_writable("kohya's readers", problems)
    tensors: dict[str, Tensor] = {}
    sites = [transforms.to_standard_scaling(s) for s in file.sites]
    for s in sites:
        name = names[s.path]
        kernel = s.shape[2:] if s.kind == "conv" else ()
        ones, alpha = [1] * len(kernel), torch.tensor(s.alpha, dtype=torch.float64)
        tensors[f"{name}.lora_down.weight"] = s.A.reshape(s.r, -1, *kernel)
        tensors[f"{name}.lora_up.weight"] = s.B.view(*s.B.shape, *ones)
        tensors[f"{name}.alpha"] = alpha.float() if alpha.float().double() == alpha else alpha
        if s.magnitude is not None:
            shape = (-1, 1) if s.magnitude_axis == "out" else (1, -1)
            tensors[f"{name}.dora_scale"] = s.magnitude.view(*shape, *ones)
    return {path: safetensors_file.dump(tensors, file.config if file.format == "kohya" else _metadata(sites))}


def _metadata(sites: Sequence[StoredSite]) -> dict[str, str]:
    """Return the header by which sd-scripts, A1111 and their tools recognize a file, as sd-scripts writes it.

    A1111 takes every file with a header, but without a version of the base, for one of Stable Diffusion 1, and does not
    show it for a model of another version. The width of the cross-attention's input tells the version.
    """
    is_dora = any(s.magnitude is not None for s in sites)  # which sd-scripts' own module would ignore
    width = next((s.A.shape[-1] for s in sites if re.search(r"attn2[._]to_[kv]$", s.path)), 0)
    return {
        "ss_network_module": "lycoris.kohya" if is_dora else "networks.lora",
        "ss_network_dim": _common_value({str(s.r) for s in sites}),
        "ss_network_alpha": _common_value({str(float(s.alpha)) for s in sites}),
        **({"ss_network_args": '{"algo": "lora", "dora_wd": "True"}'} if is_dora else {}),
        **BASES.get(width, {}),
    }


def _common_value(values: set[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "Dynamic"


BASES = {
    768: {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    1024: {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    2048: {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}
"""sd-scripts' words for Stable Diffusion 1, 2 and XL, by the number of features of their text encoders."""
WRITTEN = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The components whose diffusers names other readers of kohya's files know. diffusers itself takes the flat names of a
transformer (Flux, SD3, Wan) for nothing or for an error: those files have the names of the models' original code."""
# diffusers' reader turns other flat names of these modules into names that no U-Net has.
ORIGINAL = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
T5_BLOCK = "encoder.block."


def flat_names(file: AdapterFile, hints: Hints, problems: list[str]) -> dict[str, str]:
    """Return kohya's names for the modules of a record, by path.

    `problems` receives a line per module of a component that kohya's readers do not know by such a name.
    """
    if file.namespace == "kohya":
        return {s.path: s.path for s in file.sites}
    is_pipeline = file.namespace == "pipeline"
    has_several = is_pipeline and any(s.path.startswith("text_encoder_") for s in file.sites)
    names = {}
    for s in file.sites:
        component, path = hints.component, s.path
        if is_pipeline:
            component, _, path = path.partition(".")
        if prefix := _prefix(component, path, has_several):
            flat = path.replace(".", "_")
            names[s.path] = prefix + (ORIGINAL.get(flat, flat) if component == "unet" else flat)
        elif any(component in known for known in PREFIXES.values()):
            line = f"{s.path}: kohya's files have no names that diffusers reads for diffusers' modules of a {component}"
            problems.append(Problem(line, "write the format diffusers, which diffusers and ComfyUI read"))
        else:
            step = "say which part of the pipeline the adapter belongs to: Hints(component='unet')"
            problems.append(Problem(f"{s.path}: kohya has no prefix for {component!r}", step))
    return names


def _prefix(component: str | None, path: str, has_several: bool) -> str:
    """Return the prefix for a module, or nothing if its component is written by no reader's name.

    lora_te1_ is the name in pipelines with several text encoders, lora_te_ in others. A T5 is lora_te3_, also in Flux,
    where it is the second encoder (networks/lora_flux.py; lora_te2_ in its first version, which is read as well).
    """
    if component == "text_encoder_2" and path.startswith(T5_BLOCK):
        return "lora_te3_"
    fitting = [prefix for prefix, known in PREFIXES.items() if component in known and component in WRITTEN]
    return next((prefix for prefix in fitting if prefix != "lora_te1_" or has_several), "")


FORMAT = Format(name="kohya", library="lycoris-lora 4.1.3", claims=claims, read=read, write=write, scales="site",
                suffix=".safetensors", holds=frozenset({"convolutions", "magnitudes", "magnitudes by input"}),
                names=frozenset({"hf", "kohya", "pipeline"}))  # fmt: skip

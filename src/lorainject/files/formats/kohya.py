"""kohya-ss, A1111 and LyCORIS' LoCon (4.1.3): https://github.com/kohya-ss/sd-scripts, https://github.com/KohakuBlueleaf/LyCORIS.

    <prefix>_<path with _ for .>.lora_down.weight (r, in[, *kernel])    .lora_up.weight (out, r[, 1, 1])    .alpha ()     s = alpha / r
    .lora_mid.weight (r, r, *kernel)                with .lora_down.weight (r, in, 1, 1): a convolution in three factors (Tucker)
    .dora_scale (out, 1[, 1, 1]) or (1, in[, 1, 1])    DoRA by output or by input
    .scale ()                                       s itself (A1111)

Without alpha s is 1. An underscore in a name may have been a dot: only the model tells, so the names stay as they are until it is there.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FileError
from .. import transforms
from ..format import Files, Format
from ..io import safetensors_file
from ..io.open_adapter import Hints, Source
from ..record import NONE, AdapterFile, StoredSite, checked
from .image_model_names import PREFIXES, kohya_prefix
from .pairs import other_method

KEY = re.compile(r"(?P<path>[^.]+)\.(?P<part>lora_(?:down|up|mid|A|B)\.weight|alpha|dora_scale|scale)")
SAME = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def claims(source: Source) -> bool:
    """Whether any tensor has a name of one part and kohya's ends, or all have kohya's prefixes."""
    return any((m := KEY.fullmatch(key)) and ("lora_down" in key or kohya_prefix(m["path"])) for key in source.tensors)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record, under the file's own names; what is wrong goes into `problems`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in source.tensors.items():
        if known := KEY.fullmatch(key):
            found.setdefault(known["path"], {})[SAME.get(known["part"], known["part"])] = t
        else:
            what = other_method(key)
            problems.append(
                f"{key}: {f'{what}, which is no pair of low-rank factors' if what else 'unexpected, neither lora_down nor lora_up'}"
            )
    sites = [s for at, parts in found.items() if (s := _site(at, parts, problems)) is not None]
    return AdapterFile(
        path=source.path, format="kohya", sites=tuple(sites), config=dict(source.metadata), namespace="kohya"
    )


def _site(at: str, parts: dict[str, Tensor], problems: list[str]) -> StoredSite | None:
    if missing := [half for half in ("lora_down.weight", "lora_up.weight") if half not in parts]:
        problems.extend(f"{at}.{half}: missing" for half in missing)
        return None
    down, up, mid = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("lora_mid.weight")
    unfit = mid is not None and (mid.ndim < 3 or mid.shape[:2] != (up.shape[1], down.shape[0]))
    if up.ndim < 2 or down.ndim < 2 or up.shape[2:].numel() != 1 or unfit:
        problems.append(
            f"{at}: lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)} are no pair (r, in) and (out, r)"
        )
        return None
    A = down if mid is None else transforms.tucker_A(at, mid, down)
    r, out = A.shape[0], up.shape[0]
    alpha = (
        float(parts["scale"]) * r if "scale" in parts else float(parts["alpha"].flatten()[0]) if "alpha" in parts else r
    )
    m, axis = parts.get("dora_scale"), "out"
    if m is not None:
        axis = "out" if m.shape[0] == m.numel() else "in"
    s = StoredSite(path=at, kind="conv" if A.ndim > 2 else "linear", shape=(out, *A.shape[1:]) if A.ndim > 2 else (), A=NONE, B=NONE, alpha=0,
                   magnitude=None if m is None else m.flatten(), magnitude_axis=axis)  # fmt: skip
    return checked(s, A.flatten(1), up.flatten(1), problems, alpha=alpha)


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """One safetensors file. Raises FileError for names that are the same with underscores."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    problems = []
    for s in map(transforms.to_standard_scaling, file.sites):
        at = s.path if file.namespace == "kohya" else _flat(s.path, file, hints)
        if names.setdefault(at, s.path) != s.path:
            problems.append(f"{s.path} and {names[at]} are both {at}")
        kernel = tuple(s.shape[2:]) if s.kind == "conv" else ()
        ones, alpha = [1] * len(kernel), torch.tensor(s.alpha, dtype=torch.float64)
        down = s.A.reshape(s.r, -1, *kernel)
        tensors |= {f"{at}.lora_down.weight": down, f"{at}.lora_up.weight": s.B.view(*s.B.shape, *ones),
                    f"{at}.alpha": alpha.float() if alpha.float().double() == alpha else alpha}  # fmt: skip
        if s.magnitude is not None:
            tensors[f"{at}.dora_scale"] = s.magnitude.view(*((-1, 1) if s.magnitude_axis == "out" else (1, -1)), *ones)
    if problems:
        raise FileError("kohya's names have no dots:", problems, "rename one of them, or choose another format")
    ranks, alphas = (
        {str(v) for v in values}
        for values in ((s.r for s in file.sites), (transforms.to_standard_scaling(s).alpha for s in file.sites))
    )
    about = {"ss_network_module": "networks.lora", "ss_network_dim": _one(ranks), "ss_network_alpha": _one(alphas)}
    return {path: safetensors_file.dump(tensors, file.config if file.format == "kohya" else about)}


def _one(values: set[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "Dynamic"


def _flat(path: str, file: AdapterFile, hints: Hints) -> str:
    component, _, rest = path.partition(".") if file.namespace == "pipeline" else (hints.component, "", path)
    two = any(s.path.startswith("text_encoder_2.") for s in file.sites) and file.namespace == "pipeline"
    prefix = next(
        (p for p, parts in PREFIXES.items() if component in parts and not (p == "lora_te1_" and not two)), None
    )
    if prefix is None:
        raise FileError(
            f"kohya has no prefix for {component!r}",
            way_out="say which part of the pipeline it is: Hints(component='unet')",
        )
    return prefix + rest.replace(".", "_")


FORMAT = Format(name="kohya", library="lycoris-lora 4.1.3", claims=claims, read=read, write=write, scales="site", suffix=".safetensors",
                holds=frozenset({"convolutions", "magnitudes", "magnitudes by input"}), names=frozenset({"hf", "kohya", "pipeline"}))  # fmt: skip

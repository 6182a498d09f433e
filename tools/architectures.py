"""Every architecture of the installed transformers under lorainject, and under PEFT: what is adapted, and whether it is
right.

    python tools/architectures.py llama --json         one type, as JSON python tools/architectures.py --all
    every type, each in a process of its own; writes docs/architectures.md python tools/architectures.py --all --resume
    FILE  goes on where an interrupted run stopped (its lines are in FILE)

The models are those of tests/support/zoo.py: tiny, with random weights. What is right is decided by a dense oracle,
which shares
nothing with the library: a copy of the base whose weights are W0 + s B A, formed here. Its outputs must be the adapted
model's, and <dL/dW, s B A>, differentiated, must give the gradients of A and B.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import lorainject as li

import zoo
from feed import tensors
from models import state

ROOT = Path(__file__).parent.parent
# Relative to an output's largest number: where only the order of sums may differ (by how memory is aligned:
# EfficientLoFTR right after inject is off by 1.6e-6 in float32, by 0 in float64), and where the rounding may.
EXACT, CLOSE = 5e-6, 1e-5
Inputs = Mapping[str, Any]


class Wrong(Exception):
    """A check that did not hold; the message is the reason."""


# --- running and comparing ------------------------------------------------------------------------------------------


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All floating tensors that the model puts out; what it draws at random is drawn alike each time."""
    torch.manual_seed(0)
    return list(tensors(model(**copy.deepcopy(dict(inputs)))))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return run(model, inputs)


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of the tensor it is in; inf if shapes or non-finite places
    differ."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a.nan_to_num(0, 1, -1)[~finite], b.nan_to_num(0, 1, -1)[~finite]):
            return math.inf
        if finite.any():
            worst = max(
                worst,
                float((a.double() - b.double())[finite].abs().max()) / max(float(b.double()[finite].abs().max()), 1e-6),
            )
    return worst


def loss(out: list[Tensor]) -> Tensor:
    """A random linear function of all outputs, the same for the same shapes."""
    g = torch.Generator().manual_seed(7)
    weighted = [(t.double() * torch.randn(t.shape, generator=g)).nan_to_num(0, 0, 0) for t in out if t.requires_grad]
    return sum((w.sum() / max(w.numel(), 1) ** 0.5 for w in weighted), torch.zeros((), dtype=torch.double))


def clone(model: nn.Module) -> nn.Module:
    """A deep copy. What a forward with gradients left on a module (a recurrent state) is cut off from its graph
    first."""
    for module in model.modules():
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                module.__dict__[key] = value.detach()
    return copy.deepcopy(model)


def flat(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the base, each once."""
    return {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if ".lora" not in f".{name}"}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """The names whose tensors differ."""
    return [
        n
        for n in a
        if n not in b
        or a[n].dtype != b[n].dtype
        or not torch.equal(a[n].contiguous().flatten().view(torch.uint8), b[n].contiguous().flatten().view(torch.uint8))
    ]


# --- which parameters are weights of a matrix product ---------------------------------------------------------------


class Products(TorchDispatchMode):
    """Watches a forward for the parameters that get into a matrix product (`matmul`) or a convolution (`conv`).

    A parameter is followed through views (they share its storage) and through the operations that only move or cast it.
    Where both factors come from parameters (learned queries under a projection), the second one is the weight.
    """

    MOVES = (
        "clone", "_to_copy", "copy", "cat", "stack", "index", "index_select", "gather", "take_along_dim",
        "contiguous", "permute", "repeat", "flip",
        "roll", "constant_pad_nd", "_reshape_copy", "view_copy", "transpose_copy", "expand_copy", "detach_copy",
        "unsqueeze_copy",
    )  # fmt: skip
    MATMUL = (
        "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "_grouped_mm", "_scaled_mm", "linear", "matmul",
        "_addmm_activation",
        "mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu", "_thnn_fused_lstm_cell",
    )  # fmt: skip
    PLUS = ("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")  # whose first argument is only added

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.origin: dict[int, set[str]] = {}
        self.kept: list[Tensor] = []  # so that no other tensor gets their storage
        self.matmul: set[str] = set()
        self.conv: set[str] = set()
        self.shapes = {name: p.ndim for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            self.origin.setdefault(p.untyped_storage()._cdata, set()).add(name)

    def of(self, value: object) -> set[str]:
        """The parameters that a tensor consists of."""
        return (
            self.origin.get(value.untyped_storage()._cdata, set())
            if isinstance(value, Tensor) and value.layout == torch.strided
            else set()
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in self.MATMUL:
            factors = [names for t in given[name in self.PLUS :] if (names := self.of(t))]
            found = (
                set().union(*factors)
                if "rnn" in name or "lstm" in name or "gru" in name
                else factors[-1]
                if factors
                else set()
            )
            self.matmul |= {n for n in found if self.shapes[n] >= 2}
        elif "convolution" in name:
            self.conv |= {n for n in self.of(given[1]) if self.shapes[n] >= 2}
        elif name in self.MOVES:
            floating = [t for t in given if t.is_floating_point()]
            if floating and all(self.of(t) for t in floating):
                for t in tree_leaves(out):
                    if isinstance(t, Tensor) and t.is_floating_point() and not self.of(t):
                        self.origin[t.untyped_storage()._cdata] = set().union(*map(self.of, floating))
                        self.kept.append(t)
        return out


def observe(model: nn.Module, inputs: Inputs) -> Products:
    """One forward, watched. With gradients on, since without them torch has fast paths in one piece."""
    with Products(model) as seen:
        run(model, inputs)
    return seen


# --- the dense oracle -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One adapted weight: its module and name in the base, A and B, and the delta in the weight's shape as a function
    of them."""

    path: str
    parameter: str
    A: Tensor
    B: Tensor
    delta: Callable[[], Tensor]

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}".lstrip(".")


def sites(model: nn.Module, name: str = "default") -> list[Site]:
    """Where adapters sit, from the modules themselves. s B A is formed here; of the library's own deltas only the
    layout is taken."""
    found = []
    theirs = [delta for *_, delta in li.deltas(model)]
    for path, module in model.named_modules():
        for key, child in module._modules.items():
            if key.split("[")[0].startswith("lora") and type(child).__name__ == "AdapterDict" and name in child:
                found.append((path, getattr(child, "parameter", "weight"), child[name]))
    if len(found) != len(theirs):
        raise Wrong(f"li.deltas yields {len(theirs)} sites, but {len(found)} modules carry adapters")
    return [
        Site(path, parameter, low.A, low.B, _delta(low, theirs[i])) for i, (path, parameter, low) in enumerate(found)
    ]


def _delta(low: nn.Module, theirs: Tensor) -> Callable[[], Tensor]:
    """s B A in the layout of `theirs`: as it is or transposed, and with the axes of a kernel."""

    def dense(transposed: bool) -> Tensor:
        d = low.scale * (low.B @ low.A)
        return (d.mT if transposed else d).reshape(theirs.shape)

    for transposed in (False, True):
        if dense(transposed).sub(theirs).abs().max() <= 1e-5 * theirs.abs().max():
            return lambda: dense(transposed)
    raise Wrong(f"li.deltas is not s B A: {tuple(theirs.shape)} from A {tuple(low.A.shape)}, B {tuple(low.B.shape)}")


def oracle(base: nn.Module, deltas: list[tuple[str, str, Tensor]]) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the base with dense weights W0 + delta, which require gradients and are tied to nothing."""
    dense = clone(base).requires_grad_(False)
    weights = []
    for path, parameter, delta in deltas:
        module = dense.get_submodule(path)
        W = nn.Parameter(
            module._parameters[parameter].detach() + delta.detach().to(module._parameters[parameter].dtype)
        )
        module._parameters[parameter] = W
        weights.append(W)
    return dense, weights


def gradients(model: nn.Module, inputs: Inputs, wanted: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and the gradients of `loss` by what is wanted."""
    out = run(model, inputs)
    value = loss(out)
    got = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else [None] * len(wanted)
    return [t.detach() for t in out], list(got)


def alive(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.ne(0).any())


@torch.no_grad()
def randomize(sited: list[Site], base: nn.Module) -> None:
    """A and B as if trained, and large: B about 0.2 of the weight's deviation."""
    g = torch.Generator().manual_seed(3)
    for site in sited:
        W = base.get_submodule(site.path)._parameters[site.parameter]
        site.A.copy_(torch.randn(site.A.shape, generator=g) * 0.5)
        std = float(W.float().std()) if W.numel() > 1 else 0.0
        site.B.copy_(torch.randn(site.B.shape, generator=g) * (0.2 * std if math.isfinite(std) and std else 0.02))


# --- our checks -----------------------------------------------------------------------------------------------------


def inject(model: nn.Module, without: list[str] | None = None) -> dict[str, Any]:
    """all-linear, or all-conv for a model without linears. What is refused by name is excluded, so that the rest can be
    seen."""
    found: dict[str, Any] = {"targets": "all-linear", "excluded": list(without or [])}
    modules = {path for path, _ in model.named_modules() if path}
    for _ in range(5):
        try:
            plan = li.find(model, found["targets"], r=4, init="gaussian", exclude=found["excluded"])
            li.inject(model, found["targets"], r=4, init="gaussian", exclude=found["excluded"])
            return found | {"left_out": list(plan.left_out)}
        except li.LoraError as e:
            if found["targets"] == "all-linear" and any(
                "matches nothing" in p or "leaves nothing" in p for p in e.problems
            ):
                found |= {"targets": "all-conv", "excluded": []}
                continue
            named = [p.split(": ", 1)[0] for p in e.problems if ": " in p]
            named = [p if p in modules else p.rpartition(".")[0] for p in named]
            found.setdefault("refused", _why(e))
            new = [p for p in dict.fromkeys(named) if p in modules and p not in found["excluded"]]
            if not new:
                break
            found["excluded"] += new
    raise Wrong(f"refused: {found['refused']}")


def _why(e: Exception) -> str:
    """The first problem, without the path, so that the same reasons can be counted."""
    problems = getattr(e, "problems", ())
    text = problems[0].split(": ", 1)[-1] if problems else str(e).split("\n")[0]
    return " ".join(text.split())[:200]


def check_ours(base: nn.Module, inputs: Inputs, noise: float) -> dict[str, Any]:
    """All checks on lorainject; `reason` names the first that failed."""
    row: dict[str, Any] = {}
    model = clone(base)
    want = outputs(model, inputs)
    before = state(model)
    seen = observe(base, inputs)
    row["matmul"], row["conv"] = len(seen.matmul), len(seen.conv)
    try:
        row |= inject(model)
        sited = sites(model)
        row["sites"] = len(sited)
        row |= share(base, seen, [s.name for s in sited], set(row["left_out"]))
        if (d := apart(outputs(model, inputs), want)) > max(EXACT, 3 * noise):
            raise Wrong(f"law 1: the output right after inject is off by {d:.1g}")
        randomize(sited, base)
        row |= against_oracle(base, model, sites(model), inputs, noise)
        row |= check_probe(model, inputs, row)
        check_files(base, model, inputs, noise)
        row |= check_merge(base, model, inputs, noise, row["excluded"])
        li.eject(model)
        after = state(model)
        if changed := [p for p in {**before, **after} if before.get(p) != after.get(p)]:
            raise Wrong(f"eject: {changed[0] or 'the model'} is not as before")
        row["half"] = check_half(base)
    except Wrong as e:
        row["reason"] = str(e)
    except li.LoraError as e:
        row["reason"] = f"refused: {_why(e)}"
    except Exception as e:
        row["reason"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    row["verdict"] = verdict(row)
    return row


def verdict(row: Mapping[str, Any]) -> str:
    """ok, refused (in whole, or what was excluded), unreached, wrong, or error: something was raised that says nothing
    to a user."""
    reason = row.get("reason", "")
    if re.match(r"\w+(Error|Exception): ", reason):
        return "error"
    if reason:
        return "refused" if reason.startswith("refused") else "unreached" if "UNREACHED" in reason else "wrong"
    return "refused" if row.get("refused") else "ok"


def share(base: nn.Module, seen: Products, adapted: list[str], out: set[str]) -> dict[str, Any]:
    """Of the parameters in matrix products, those that are adapted: without heads and routers left out by design, and
    with."""
    canonical = {id(p): n for n, p in base.named_parameters()}
    size = {n: p.numel() for n, p in base.named_parameters()}
    every = list(base.named_parameters(remove_duplicate=False))
    ours = {canonical[id(p)] for n, p in every if n in set(adapted)}
    design = {
        canonical[id(p)] for n, p in every if n.rpartition(".")[0] in out
    } - ours  # a tied head goes by the embedding's name

    def part(of: set[str]) -> float | None:
        total = sum(size[n] for n in of)
        return round(sum(size[n] for n in of & ours) / total, 4) if total else None

    missed = sorted(seen.matmul - design - ours, key=lambda n: -size[n])
    return {
        "share": part(seen.matmul - design),
        "share_all": part(seen.matmul),
        "share_conv": part(seen.conv),
        "missed": missed[:4],
    }


def doubled(inputs: Inputs) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def against_oracle(
    base: nn.Module, model: nn.Module, sited: list[Site], inputs: Inputs, noise: float
) -> dict[str, Any]:
    """Outputs and gradients. Where it may be float32's rounding that is large (it moves a choice of experts), float64
    decides."""
    try:
        return _against_oracle(base, model, sited, inputs, max(CLOSE, 3 * noise), 1e-3)
    except Wrong as e:
        if "UNREACHED" in str(e):
            raise
        first = e
    try:
        wide = clone(model).double()
        return _against_oracle(clone(base).double(), wide, sites(wide), doubled(inputs), 1e-8, 1e-6) | {
            "float64": str(first)
        }
    except Wrong as e:
        raise Wrong(f"{first} (float64: {e})") from None
    except Exception:  # many models hold on to float32 somewhere
        raise first from None


def _against_oracle(
    base: nn.Module, model: nn.Module, sited: list[Site], inputs: Inputs, close: float, gradient_close: float
) -> dict[str, Any]:
    dense, weights = oracle(base, [(s.path, s.parameter, s.delta()) for s in sited])
    want, by_weight = gradients(dense, inputs, weights)
    got, by_factor = gradients(model, inputs, [t for s in sited for t in (s.A, s.B)])
    largest = max((float(g.nan_to_num(0, 0, 0).abs().max()) for g in by_weight if g is not None), default=0.0)
    dead, wrong, unreached = 0, [], []
    for i, (site, gradient) in enumerate(zip(sited, by_weight, strict=True)):
        for_A, for_B = by_factor[2 * i : 2 * i + 2]
        if not alive(gradient):
            dead += 1
            if alive(for_B) and float(for_B.abs().max()) > gradient_close * largest:
                wrong.append(f"{site.name}: its B has a gradient, the dense weight none")
            continue
        if not gradient.isfinite().all():  # the base's own affair
            continue
        expected = torch.autograd.grad((gradient.detach() * site.delta().to(gradient.dtype)).sum(), [site.A, site.B])
        if not alive(for_B) and float(expected[1].abs().max()) > 1e-6 * largest:
            unreached.append(site.name)
            continue
        for letter, mine, theirs in zip("AB", (for_A, for_B), expected, strict=True):
            scale = max(float(theirs.abs().max()), 1e-4 * largest)
            off = (
                float(((mine if mine is not None else torch.zeros_like(theirs)) - theirs).abs().max()) / scale
                if scale
                else 0.0
            )
            if not off <= gradient_close:
                wrong.append(f"{site.name}: dL/d{letter} is off by {off:.1g}")
    if unreached:
        raise Wrong(f"SILENTLY UNREACHED: {len(unreached)} sites, as {unreached[0]}")
    if (d := apart(got, want)) > close:
        raise Wrong(f"output differs from the dense oracle's by {d:.1g}")
    if wrong:
        raise Wrong(f"gradient: {wrong[0]} ({len(wrong)} in all)")
    return {"dead": dead}


def check_probe(model: nn.Module, inputs: Inputs, row: Mapping[str, Any]) -> dict[str, Any]:
    """probe may complain only where the oracle saw dead weights."""
    try:
        torch.manual_seed(0)
        li.probe(model, **copy.deepcopy(dict(inputs)))
        return {}
    except li.UnreachedAdapter as e:
        bypassed = [p for p in e.problems if "without the layer being called" in p]
        if bypassed or len(e.problems) > row["dead"]:
            raise Wrong(
                f"probe complains of {len(e.problems)} sites, the oracle of {row['dead']}: {e.problems[0][:120]}"
            ) from None
        return {"probe": len(e.problems)}


def check_merge(base: nn.Module, model: nn.Module, inputs: Inputs, noise: float, excluded: list[str]) -> dict[str, Any]:
    """merge keeps the outputs, writes the oracle's weights, and unmerge gives W0 back. Tied weights are refused, and
    then left out."""
    want, deltas = outputs(model, inputs), [(s.path, s.parameter, s.delta().detach()) for s in sites(model)]
    first = {n: t.clone() for n, t in flat(model).items()}
    close = max(CLOSE, 3 * noise)
    try:
        li.merge(model)
    except li.MergeError as e:
        tied = [p.split(": ", 1)[0] for p in e.problems if "tied" in p]
        if len(tied) != len(e.problems) or not set(tied).isdisjoint(excluded):
            raise Wrong(f"merge refused: {_why(e)}") from None
        rest = clone(base)
        inject(rest, [*excluded, *tied])
        randomize(sites(rest), base)
        return check_merge(base, rest, inputs, noise, [*excluded, *tied]) | {"tied": len(tied)}
    got = outputs(model, inputs)
    dense, _ = oracle(base, deltas)
    if (
        (d := apart(got, want)) > close
        and (d := apart(got, outputs(dense, inputs))) > close
        and not _merges_in_float64(model, inputs)
    ):
        raise Wrong(f"merged output differs by {d:.1g}")
    for path, parameter, _ in deltas:
        W, D = (m.get_submodule(path)._parameters[parameter].detach() for m in (model, dense))
        if (d := apart([W], [D])) > EXACT:
            raise Wrong(f"merged weight {path} differs from W0 + s B A by {d:.1g}")
    li.unmerge(model)
    if changed := same_bits(first, flat(model)):
        raise Wrong(f"unmerge: {changed[0]} is not back to the bit")
    if (d := apart(outputs(model, inputs), want)) > max(EXACT, 3 * noise):
        raise Wrong(f"the output after unmerge differs by {d:.1g}")
    return {"exact": True}


def _merges_in_float64(model: nn.Module, inputs: Inputs) -> bool:
    """Whether merging keeps the outputs in float64: some bases (swinv2, vits) are themselves 2e-5 off theirs in
    float32."""
    wide = clone(model)
    li.unmerge(wide)
    wide.double()
    try:
        want = outputs(wide, doubled(inputs))
    except Exception:  # many models hold on to float32 somewhere
        return False
    li.merge(wide)
    return apart(outputs(wide, doubled(inputs)), want) <= 1e-8


def check_half(base: nn.Module) -> str:
    """merge and unmerge in bfloat16 give every bit back."""
    model = clone(base).bfloat16()
    inject(model)
    randomize(sites(model), model)
    first = {n: t.clone() for n, t in flat(model).items()}
    try:
        li.merge(model)
    except li.MergeError:
        return "refused"
    li.unmerge(model)
    if changed := same_bits(first, flat(model)):
        raise Wrong(f"bfloat16: after unmerge {changed[0]} is not back to the bit")
    return "ok"


def check_files(base: nn.Module, model: nn.Module, inputs: Inputs, noise: float) -> None:
    """A saved adapter, loaded onto a fresh base, gives the same outputs."""
    want = outputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        li.save(model, Path(folder) / "adapter.safetensors")
        fresh = li.load(clone(base), Path(folder) / "adapter.safetensors")
        if (d := apart(outputs(fresh, inputs), want)) > max(EXACT, 3 * noise):
            raise Wrong(f"loaded: the output differs by {d:.1g}")


# --- PEFT's ---------------------------------------------------------------------------------------------------------


def check_peft(base: nn.Module, inputs: Inputs, noise: float, left_out: set[str]) -> dict[str, Any]:
    """The same of PEFT, as far as it has it: target_modules="all-linear"."""
    import peft
    from peft.tuners.lora import LoraLayer

    row: dict[str, Any] = {}
    seen = observe(base, inputs)
    want = outputs(base, inputs)

    def adapted() -> tuple[nn.Module, dict[str, LoraLayer]]:
        torch.manual_seed(5)
        model = peft.get_peft_model(clone(base), peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")).eval()
        found = {}
        for path, m in model.base_model.model.named_modules():
            if isinstance(m, LoraLayer):  # one around another, where a module has several parameters
                found[path.removesuffix(".base_layer"), getattr(m, "parameter_name", "weight")] = m
        return model, found

    try:
        model, layers = adapted()
        row["sites"] = len(layers)
        row |= share(base, seen, [".".join(place) for place in layers], left_out)
        if (d := apart(outputs(model, inputs), want)) > max(EXACT, 3 * noise):
            raise Wrong(f"the output right after get_peft_model is off by {d:.1g}")
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for (path, parameter), layer in layers.items():
                std = float(base.get_submodule(path)._parameters[parameter].float().std())
                for factor, size in ((layer.lora_A, 0.5), (layer.lora_B, 0.2 * std or 0.02)):
                    factor["default"].weight.copy_(torch.randn(factor["default"].weight.shape, generator=g) * size)
        dense, weights = oracle(base, [(*place, layer.get_delta_weight("default")) for place, layer in layers.items()])
        expected, by_weight = gradients(dense, inputs, weights)
        got, by_B = gradients(model, inputs, [layer.lora_B["default"].weight for layer in layers.values()])
        unreached = [
            ".".join(place) for place, w, b in zip(layers, by_weight, by_B, strict=True) if alive(w) and not alive(b)
        ]
        row["dead"] = sum(not alive(w) for w in by_weight)
        if unreached:
            raise Wrong(f"SILENTLY UNREACHED: {len(unreached)} sites, as {unreached[0]}")
        if (d := apart(got, expected)) > max(10 * CLOSE, 3 * noise):
            raise Wrong(f"output differs from the dense oracle's by {d:.1g}")
        fresh, _ = adapted()
        peft.set_peft_model_state_dict(fresh, copy.deepcopy(peft.get_peft_model_state_dict(model)))
        if (d := apart(outputs(fresh, inputs), got)) > max(EXACT, 3 * noise):
            raise Wrong(f"loaded: the output differs by {d:.1g}")
        first = {place: getattr(layer.get_base_layer(), place[1]).detach().clone() for place, layer in layers.items()}
        model.merge_adapter()
        merged = apart(outputs(model, inputs), got)
        model.unmerge_adapter()
        row["exact"] = all(
            torch.equal(first[place], getattr(layer.get_base_layer(), place[1])) for place, layer in layers.items()
        )
        if merged > max(10 * CLOSE, 3 * noise):
            raise Wrong(f"merged output differs by {merged:.1g}")
    except Wrong as e:
        row["reason"] = str(e)
    except Exception as e:
        row["reason"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    row["verdict"] = verdict(row)
    return row


# --- one type -------------------------------------------------------------------------------------------------------


def examine(model_type: str, peft: bool = True) -> dict[str, Any]:
    """Everything about one type, fit for JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    row: dict[str, Any] = {"type": model_type}
    try:
        base = zoo.build(model_type)
    except zoo.NoModel as e:
        return row | {"verdict": "not built", "reason": str(e)}
    inputs = zoo.inputs(base)
    row |= {
        "class": type(base).__name__,
        "parameters": sum(p.numel() for p in base.parameters()),
        "inputs": sorted(inputs),
    }
    first = outputs(base, inputs)
    row["noise"] = noise = apart(outputs(base, inputs), first)
    row["ours"] = check_ours(base, inputs, noise)
    if peft:
        row["peft"] = check_peft(base, inputs, noise, set(row["ours"].get("left_out", ())))
    return row | {"verdict": row["ours"]["verdict"], "seconds": round(time.monotonic() - start, 1)}


# --- all of them ----------------------------------------------------------------------------------------------------


def _child(model_type: str, out: Any, memory: int) -> None:
    """In a process of its own: whatever a model does, the others are not harmed."""
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 1)
        os.dup2(devnull.fileno(), 2)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError):
        pass
    try:
        out.send(examine(model_type))
    except BaseException as e:
        out.send(
            {"type": model_type, "verdict": "error", "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
        )


def examine_all(names: Iterable[str], jobs: int, seconds: float, record: Callable[[dict[str, Any]], None]) -> None:
    """Each type in a fresh process, so many at a time, each for at most so many seconds and with 12 GiB of
    addresses."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(
            ["torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "lorainject"]
        )
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, send, 12 << 30), daemon=True)
            process.start()
            send.close()
            running[receive] = (name, process, time.monotonic() + seconds)
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        for receive, (name, process, deadline) in list(running.items()):
            row = None
            if receive in ready:
                try:
                    row = receive.recv()
                except EOFError:
                    row = {"type": name, "verdict": "error", "reason": "the process died (out of memory?)"}
            elif time.monotonic() > deadline:
                row = {"type": name, "verdict": "error", "reason": f"took more than {seconds:g} s"}
            if row is not None:
                process.kill()
                process.join()
                receive.close()
                del running[receive]
                record(row)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def report(rows: list[dict[str, Any]], command: str) -> str:
    """docs/architectures.md."""
    import peft
    import transformers

    rows = sorted(rows, key=lambda r: r["type"].lower())
    built = [r for r in rows if "ours" in r]
    ours, theirs = ([r[who] for r in built if who in r] for who in ("ours", "peft"))

    linear = [r for r in built if r["ours"].get("targets") == "all-linear"]

    def holds(who: str, least: float) -> str:
        return str(sum(r.get(who, {}).get("verdict") == "ok" and (r[who].get("share") or 0) >= least for r in linear))

    def count(of: list[dict[str, Any]], which: str) -> str:
        return str(sum(r["verdict"] == which for r in of))

    def exact(of: list[dict[str, Any]]) -> str:
        return f"{sum(bool(r.get('exact')) for r in of)} of {sum('exact' in r for r in of)}"

    verdicts = {"ok": "every check holds", "refused": "refused by name, in whole or in part",
                "unreached": "adapters that silently do nothing",
                "wrong": "another check failed", "error": "raised"}  # fmt: skip
    packages = f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}"
    versions = f"{packages}, Python {platform.python_version()}"
    lines = [
        INTRO.format(versions=versions, own=li.__version__, command=command),
        "| | lorainject | PEFT |", "|---|---|---|",
        f"| types that transformers knows | {len(rows)} | |",
        f"| of these built and run here | {len(built)} | |",
        *(f"| {label} | {count(ours, key)} | {count(theirs, key)} |" for key, label in verdicts.items()),
        f"| of the {len(linear)} with anything linear: every check holds | {holds('ours', 0)} | {holds('peft', 0)} |",
        f"| ... and 99.9 % of the matmul weights are adapted | {holds('ours', 0.999)} | {holds('peft', 0.999)} |",
        f"| unmerge exact in float32, where merge was possible | {exact(ours)} | {exact(theirs)} |", "",
    ]  # fmt: skip
    for title, of in (("Reasons, lorainject", ours), ("Reasons, PEFT", theirs)):
        reasons = collections.Counter(_general(r.get("reason") or r.get("refused") or "") for r in of)
        reasons.pop("", None)
        lines += [f"## {title}", "", *(f"- {n}: {reason}" for reason, n in reasons.most_common(40)), ""]
    lines += [
        "## Types",
        "",
        "| type | parameters | lorainject | share | all | conv | PEFT | share | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(r) for r in built]
    lines += ["", "## Not built or not run", "", "| type | reason |", "|---|---|"]
    lines += [f"| {r['type']} | {_cell(r.get('reason', ''))} |" for r in rows if "ours" not in r]
    return "\n".join(lines) + "\n"


INTRO = """# Architectures

Every model type that transformers knows, tiny and with random weights (`tests/support/zoo.py`), under lorainject
{own} and under PEFT:
{versions}. Made by `{command}`.

Both adapt `all-linear` with r = 4, get random A and B, and are compared with a dense oracle, a copy of the base
with the weights W0 + s B A. `ok` means: the output right after injecting is the base's; outputs, and the gradients
of every A and B, are the oracle's; merge, unmerge (to the bit, also in bfloat16), save, load and eject hold. For
PEFT: output, live gradients, load, merge; whether unmerge was exact is counted.

*share*: of the parameters that a forward was seen to use in matrix products, those adapted, by number of elements;
heads and routers that lorainject leaves out by design are not counted (under *all* they are). *conv*: the same of
convolutions. A site is *dead* if the base's own weight has no gradient in this forward. *float64*: in float32
rounding moved a choice, in float64 all agrees.
"""


def _line(row: Mapping[str, Any]) -> str:
    """One type's line of the table."""
    ours, theirs = row["ours"], row.get("peft", {})
    notes = [
        ours.get("reason") or ours.get("refused"),
        f"{ours['dead']} sites dead" if ours.get("dead") else "",
        f"merge refused: {ours['tied']} tied" if ours.get("tied") else "",
        "float64" if ours.get("float64") else "",
        f"missed: {ours['missed'][0]}" if ours.get("missed") else "",
        f"PEFT: {theirs['reason']}" if theirs.get("reason") else "",
    ]
    cells = [
        row["type"], f"{row['parameters']:,}",
        ours["verdict"], *(percent(ours.get(key)) for key in ("share", "share_all", "share_conv")),
        theirs.get("verdict", ""), percent(theirs.get("share")), _cell("; ".join(n for n in notes if n)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _general(reason: str) -> str:
    """A reason without names and numbers, so that like ones can be counted."""
    text = reason.split(" (float64")[0].split(" (")[0]
    text = re.sub(r"\b[\w]+(\.[\w]+)+\b|'[^']*'", "…", text)
    return re.sub(r"(?<!\w)[-+]?\d[\d.e+-]*", "n", text)[:140]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", help="model types, such as llama")
    parser.add_argument("--json", action="store_true", help="print one JSON object a type")
    parser.add_argument("--all", action="store_true", help="every type, and write the report")
    parser.add_argument("--only", default="", help="with --all: these types alone, separated by commas")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seconds", type=float, default=180, help="time limit for one type")
    parser.add_argument(
        "--resume", type=Path, help="JSON lines: read what is done, append what is new (default: a temporary file)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet()
    if not args.all and not args.types:
        parser.error("name model types, or --all")
    if not args.all:
        for name in args.types:
            row = examine(name)
            print(json.dumps(row) if args.json else json.dumps(row, indent=2))
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    path = args.resume or Path(tempfile.gettempdir()) / "architectures.jsonl"
    lines = path.read_text().splitlines() if args.resume and path.exists() else []
    done = {
        row["type"]: row for row in (json.loads(line) for line in lines if line.endswith("}"))
    }  # the last may be torn
    wanted = args.only.split(",") if args.only else zoo.types()
    with (
        path.open("a" if done else "w") as file,
        Progress(
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
        ) as progress,
    ):
        task = progress.add_task("architectures", total=len(wanted), completed=sum(n in done for n in wanted), last="")

        def record(row: dict[str, Any]) -> None:
            done[row["type"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.update(task, advance=1, last=f"{row['type']}: {row['verdict']}")

        examine_all([n for n in wanted if n not in done], args.jobs, args.seconds, record)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(
        report([done[n] for n in wanted], "scripts/architectures" + (f" --only {args.only}" if args.only else ""))
    )
    print(f"{args.out} written; one JSON object a type in {path}")


def quiet() -> None:
    """No advice from transformers about configs that are made small on purpose."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()

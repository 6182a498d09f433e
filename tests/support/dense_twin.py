"""A dense twin of an adapted model: the plain model, whose weights are W0 + the sum of s B A, formed here from copies.

The twin keeps books of its own of W0, A, B, the scales and the active adapters, in float64. It knows of the library
only how the parameters of an adapter are named. Its architectures are as small as they can be.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 5, 8, 11
Used = dict[str, float]
"""Adapters that are used together, with their strengths."""
RowNames = tuple[Used, ...]
"""The adapters of each row of the batch."""


@dataclass(frozen=True)
class Slot:
    """A weight, or a slice of one, that can carry adapters."""

    weight: str
    """The name of the weight among the parameters of the model."""
    label: str = ""
    rows: range | None = None
    """The rows of the slice. None for a whole weight."""
    transposed: bool = False
    read: bool = False
    """True if the model's own code reads the weight, so that `rows` refuses it."""
    twins: tuple[str, ...] = ()
    """The same weight in other modules of its class, which have the same adapters."""

    @property
    def name(self) -> str:
        """The name of the weight for lorainject."""
        return self.weight.removesuffix(".weight")

    @property
    def target(self) -> str:
        """A target that matches this slot and no other."""
        return f"{self.name}[{self.label}]" if self.label else self.name

    @property
    def child(self) -> str:
        """The path of the adapters of this slot."""
        path, _, parameter = self.weight.rpartition(".")
        return f"{path}.lora{'' if parameter == 'weight' else '_' + parameter}{f'[{self.label}]' * bool(self.label)}"

    def overlaps(self, other: Slot) -> bool:
        """True if one inject cannot take both slots."""
        return self.weight == other.weight and (not self.label or not other.label or self.label == other.label)

    def moved(self, old: str, new: str) -> Slot:
        """Return the slot with another path."""
        return replace(self, weight=self.weight.replace(old, new, 1))


@dataclass(frozen=True)
class Architecture:
    """How to build a model of one architecture, and what can be adapted in it."""

    build: Callable[[], nn.Module]
    slots: tuple[Slot, ...]
    tolerance: float = 1e-10
    """Relative tolerance in float64. Some architectures compute in float32 in between."""
    layers: str = ""
    """The path of a ModuleList to which a copy of its first layer can be appended."""


class Twins(nn.Module):
    """Two linear layers with one weight, an embedding and a head with one weight, and a layer at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.again = nn.Sequential(nn.Tanh(), self.c)
        self.b.weight, self.head.weight = self.a.weight, self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.c(self.b(self.a(self.emb(ids)).tanh())).tanh()))


class Layers(nn.Module):
    """An embedding and a list of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Attention(nn.Module):
    """torch's attention, whose weights its own code reads, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return self.out(self.mha(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """A recurrent layer, whose kernel takes its weights from a list, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.lstm(self.emb(ids))[0])


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, use_cache=False))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralModel

    model = MixtralModel(MixtralConfig(**SIZES, num_hidden_layers=1, num_local_experts=3, use_cache=False))
    model.set_experts_implementation("eager")
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": VOCABULARY,
        "n_positions": 8,
        "n_embd": WIDTH,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))


def _slices(weight: str, labels: str, transposed: bool = False, read: bool = False) -> tuple[Slot, ...]:
    """Return the slots of a fused weight of equal parts: the whole weight, and each part."""
    rows = [range(i * WIDTH, (i + 1) * WIDTH) for i in range(len(labels))]
    parts = (Slot(weight, label, part, transposed, read) for label, part in zip(labels, rows, strict=True))
    return Slot(weight, transposed=transposed, read=read), *parts


EMB, OUT = Slot("emb.weight", transposed=True), Slot("out.weight")
GPT2_BLOCK, MIXTRAL_BLOCK = "transformer.h.0", "layers.0"
ARCHITECTURES = {
    "twins": Architecture(Twins, (EMB, Slot("a.weight", twins=("b.weight",)), Slot("c.weight"), Slot("head.weight"))),
    "layers": Architecture(Layers, (EMB, Slot("layers.0.0.weight"), Slot("layers.1.0.weight")), layers="layers"),
    "attention": Architecture(
        Attention, (*_slices("mha.in_proj_weight", "qkv", read=True), Slot("mha.out_proj.weight", read=True), EMB, OUT)
    ),
    "recurrent": Architecture(
        Recurrent, (Slot("lstm.weight_ih_l0", read=True), Slot("lstm.weight_hh_l0", read=True), EMB, OUT)
    ),
    "gpt2": Architecture(
        _gpt2,
        (
            *_slices(f"{GPT2_BLOCK}.attn.c_attn.weight", "qkv", transposed=True),
            Slot(f"{GPT2_BLOCK}.mlp.c_proj.weight", transposed=True),
            Slot("transformer.wte.weight", transposed=True),
            Slot("lm_head.weight"),
        ),
        tolerance=1e-6,
    ),
    "mixtral": Architecture(
        _mixtral,
        (
            Slot(f"{MIXTRAL_BLOCK}.mlp.experts.gate_up_proj"),
            Slot(f"{MIXTRAL_BLOCK}.mlp.experts.down_proj"),
            Slot(f"{MIXTRAL_BLOCK}.self_attn.q_proj.weight"),
            Slot(f"{MIXTRAL_BLOCK}.self_attn.o_proj.weight"),
        ),
        tolerance=1e-5,
    ),
    "llama": Architecture(
        _llama,
        (
            Slot("model.layers.0.self_attn.q_proj.weight"),
            Slot("model.layers.0.mlp.down_proj.weight"),
            Slot("model.layers.1.self_attn.v_proj.weight"),
            Slot("model.embed_tokens.weight", transposed=True),
            Slot("lm_head.weight"),
        ),
        tolerance=1e-5,
        layers="model.layers",
    ),
}
IDS = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def call(model: Callable[..., object]) -> Tensor:
    """Return the model's output for IDS, shape (ROWS, LENGTH, width)."""
    out = model((IDS,)) if isinstance(model, partial) else model(IDS)
    if isinstance(out, Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.last_hidden_state  # type: ignore[attr-defined]


def loss_of(output: Tensor) -> Tensor:
    """Return a random linear function of an output, the same one each time."""
    return (output.double() * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum()


@dataclass(eq=False)
class Factors:
    """A, B and the scale of one adapter on one slot."""

    A: Tensor
    B: Tensor
    s: float

    def copied(self) -> Factors:
        """Return a copy with A and B of its own, that a gradient can be taken of."""
        return Factors(*(t.detach().double().clone().requires_grad_() for t in (self.A, self.B)), self.s)


class DenseTwin:
    """What an adapted model must be: its plain model, and books of its adapters.

    Args:
        model: The base model, before anything is injected.
        slots: What can be adapted in it.
    """

    def __init__(self, model: nn.Module, slots: tuple[Slot, ...]) -> None:
        self.plain = copy.deepcopy(model).double()
        self.slots = list(slots)
        self.adapters: dict[str, dict[Slot, Factors]] = {}
        self.default: Used = {}
        self.before: dict[str, Used] = {}
        """For each adapter, what was active before it was added."""
        self.merged: Used = {}
        self.lost: set[Slot] = set()
        """Adapted slots whose module was replaced."""
        self.groups: dict[str, int] = {}
        """By the path of the adapters: the layers that a context acts on. A copy of a layer is a group of its own."""
        self.numbers = itertools.count()
        self.outputs: dict[tuple[object, ...], Tensor] = {}
        """Outputs by the adapters of each group. Whoever changes the books clears them."""

    def sites(self) -> Iterator[tuple[Slot, str, Factors]]:
        """Yield every adapter that is in the model, with its slot and its name."""
        for name, factors in self.adapters.items():
            yield from ((slot, name, f) for slot, f in factors.items() if slot not in self.lost)

    def tied(self) -> dict[str, list[str]]:
        """Return, for every name of a parameter that modules of several classes have, all of its names."""
        twins = [{slot.weight, *slot.twins} for slot in self.slots]
        owners: dict[int, dict[tuple[int, str], list[str]]] = {}
        for path, module in self.plain.named_modules(remove_duplicate=False):
            for name, p in module._parameters.items():
                if p is not None:
                    owners.setdefault(id(p), {}).setdefault((id(module), name), []).append(f"{path}.{name}")
        shared = [[name for names in by.values() for name in names] for by in owners.values() if len(by) > 1]
        return {name: names for names in shared if {*names} not in twins for name in names}

    def paths(self, slot: Slot) -> list[str]:
        """Return the paths of the adapters of a slot: a module may stand at several paths."""
        child = slot.child.rpartition(".")[2]
        modules = list(self.plain.named_modules(remove_duplicate=False))
        owners = [dict(modules)[name.rpartition(".")[0]] for name in (slot.weight, *slot.twins)]
        return [f"{path}.{child}" for path, module in modules if any(module is owner for owner in owners)]

    def add(self, name: str, factors: Mapping[Slot, Factors]) -> None:
        """Add an adapter, and make it the active one."""
        state = next(iter(self.groups.values())) if self.groups else next(self.numbers)
        for slot in factors:
            self.groups.setdefault(slot.child, state)
        self.before[name] = self.default
        self.adapters[name], self.default = dict(factors), {name: 1.0}

    def remove(self, name: str) -> None:
        """Take an adapter off. If it alone was active, what was active before it is active again."""
        del self.adapters[name]
        previous = self.before.pop(name)
        self.before = {n: previous if [*was] == [name] else was for n, was in self.before.items()}
        active = previous if [*self.default] == [name] else self.default
        self.default = {n: t for n, t in active.items() if n in self.adapters}
        kept = {slot.child for slot, _, _ in self.sites()}
        self.groups = {child: group for child, group in self.groups.items() if child in kept}

    def weights(self, names: Callable[[int], Used]) -> dict[str, Tensor]:
        """Return W0 + the sum of t s B A of every weight that carries an adapter.

        Args:
            names: The adapters that are active in a group of layers.
        """
        weights: dict[str, Tensor] = {}
        for slot, name, f in self.sites():
            used = self.merged or names(self.groups[slot.child])
            if name in used:
                W0 = weights.get(slot.weight, self.plain.get_parameter(slot.weight).detach())
                delta = used[name] * f.s * (f.B @ f.A)
                if slot.rows is not None:
                    rows = W0.shape[-1] if slot.transposed else W0.shape[-2]
                    delta = delta.new_zeros(rows, delta.shape[-1]).index_put((torch.tensor(slot.rows),), delta)
                W = W0 + (delta.mT if slot.transposed else delta)
                weights |= dict.fromkeys((slot.weight, *slot.twins), W)
        return weights

    def output(self, choice: Callable[[int], RowNames]) -> Tensor:
        """Return the output of the plain model with these weights.

        Args:
            choice: The adapters of each row in a group of layers.
        """
        picked = []
        for row in range(ROWS):
            names = {group: choice(group)[row] for group in sorted({*self.groups.values()})}
            key = tuple(tuple(used.items()) for used in names.values())
            if key not in self.outputs:
                weights = self.weights(names.__getitem__)
                self.outputs[key] = call(partial(functional_call, self.plain, weights, tie_weights=False))
            picked.append(self.outputs[key][row])
        return torch.stack(picked)

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        """Return the gradient of `loss_of` for every A and B that trains, by the name of the parameter."""
        leaves = {
            f"{slot.child}.{name}.{letter}": t
            for slot, name, f in self.sites()
            if name in self.default and not self.merged
            for letter, t in (("A", f.A), ("B", f.B))
        }
        if not leaves or not output.requires_grad:
            return {}
        grads = torch.autograd.grad(loss_of(output), list(leaves.values()), allow_unused=True, retain_graph=True)
        return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}

    def set_weight(self, name: str, value: Tensor) -> None:
        """Give a weight another W0. A tie that it had ends."""
        path, _, parameter = name.rpartition(".")
        self.plain.get_submodule(path)._parameters[parameter] = nn.Parameter(value.detach().double().clone())

"""One linear layer: forward, training step, what is saved for the backward, and q, k and v on one input.

M = 512 tokens and d = 2048 (on a GPU M = 4096, d = 4096 and 14336). In training x needs a gradient, as within a model,
so that the step of the frozen layer is one product forward and one back; x comes from another operator, as it does
there. Where the processor has no fast bfloat16 product for the backward (on one it took 250 times the time of the
forward), x needs no gradient, because no one would see an adapter beside that product. Such cases say "x a leaf".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product

import loralib
import torch
from torch import Tensor, nn

from .floor import TORCH, least, products
from .measure import Setup, Timed, interleaved, peak, profile_excess, saved
from .models import ALPHA, RANKS, Block, R, Trio, agree, dtype_name, mebibytes, pairs, trio
from .row import Figure, Goal, Row, exact_value

QKV = ("q_proj", "k_proj", "v_proj")


def shapes(setup: Setup) -> list[tuple[int, int, int]]:
    """Return the shapes to measure: tokens M, input features K, output features N."""
    if setup.cuda:
        return [(4096, 4096, 4096), (4096, 4096, 14336)]
    return [(128, 1024, 1024)] if setup.quick else [(512, 2048, 2048)]


def with_loralib(model: Trio) -> nn.Module:
    """Return the block with loralib's layers, with the same weights, A and B. It keeps A and B in the dtype of the
    weight."""
    other = copy.deepcopy(model.base)
    for (name, linear), ((A, B), _) in zip(model.base.named_children(), pairs(model.ours, model.theirs), strict=True):
        layer = loralib.Linear(linear.in_features, linear.out_features, model.r, ALPHA, bias=False).to(linear.weight)
        layer.weight = linear.weight if model.shared else copy.deepcopy(linear.weight)
        with torch.no_grad():
            layer.lora_A.copy_(A), layer.lora_B.copy_(B)
        setattr(other, name, layer)
    return other.train()


def bare(model: Trio) -> dict[str, nn.Module]:
    """Return the blocks themselves, loralib's too, and PEFT's without the PeftModel around it, which serves whole
    models."""
    return {
        "base": model.base,
        "ours": model.ours,
        "PEFT": model.theirs.base_model.model,
        "loralib": with_loralib(model),
    }


def ranks(setup: Setup) -> tuple[int, ...]:
    """Return the ranks to measure."""
    return (RANKS[0], RANKS[-1]) if setup.quick else RANKS


def outputs_agree(blocks: dict[str, nn.Module], x: Tensor) -> float:
    """Return how far our output is from PEFT's, after a check of loralib's."""
    with torch.no_grad():
        outputs = {who: block(x) for who, block in blocks.items()}
    for who in outputs.keys() & {"loralib", TORCH}:
        agree(outputs[who], outputs["PEFT"], x.dtype)
    return agree(outputs["ours"], outputs["PEFT"], x.dtype)


def limit(k: int, n: int, r: int, part: float) -> str:
    """Return the least time by FLOPs; `part` is the adapter's share of a step's products over the base's."""
    return f"{1 + part * r * (k + n) / (k * n):.3f} x base by FLOPs"


def rank(r: int) -> str:
    """Return the part of a case's name that says its rank, empty for the rank of all other rows."""
    return f", r {r}" * (r != R)


def forward(setup: Setup) -> Iterator[Figure]:
    """Measure a forward at every rank, and the peak of its memory."""
    for (m, k, n), dtype, r in product(shapes(setup), setup.dtypes, ranks(setup)):
        model = trio(Block(["q_proj"], k, n, dtype, setup.device), ["q_proj"], r=r)
        x = torch.randn(m, k, dtype=dtype, device=setup.device)
        blocks = bare(model) | {TORCH: products(model)}
        differ = outputs_agree(blocks, x)
        calls = {who: Timed(torch.no_grad()(partial(block, x))) for who, block in blocks.items()}
        case = f"{dtype_name(dtype)}, M {m}, {k} x {n}{rank(r)}"
        times = interleaved(calls, setup, steady=True)
        yield Figure(
            case=case,
            metric="rho",
            value=times.rho(),
            beside=times.summary(),
            limit=f"{limit(k, n, r, 1)}; {least(times)}",
            differ=differ,
            why=partial(profile_excess, calls["ours"], calls["base"], setup),
        )
        if r != R:  # x A^T alone may be more than the must allows
            continue
        peaks = {who: peak(call, setup) for who, call in calls.items()}
        yield Figure(
            case=case,
            metric="peak / base's",
            value=exact_value(peaks["ours"] / peaks["base"]),
            beside=mebibytes(peaks),
            limit="y alone",
        )


def step(x: Tensor, g: Tensor, block: nn.Module) -> None:
    """Run forward and backward of a block. A frozen linear layer whose x is a leaf has no backward."""
    y = block(x)
    if y[0].requires_grad:  # not a frozen linear whose x is a leaf
        torch.autograd.backward(y, [g] * len(y))


@cache
def has_fast_way_back(dtype: torch.dtype) -> bool:
    """True if the product of the backward, dy W, takes about the time of x W^T."""
    x, w = (torch.randn(n, 512, dtype=dtype) for n in (64, 512))
    times = interleaved(
        {"y": Timed(lambda: x @ w.T, number=5), "dx": Timed(lambda: x @ w, number=5)}, Setup(rounds=3, seconds=0)
    )
    return times.ratio("dx", "y").value < 4


def training(
    setup: Setup, names: tuple[str, ...], m: int, k: int, n: int, dtype: torch.dtype, r: int
) -> Iterator[Figure]:
    """Measure time and memory of a training step, after a check of the gradients of A, B and x."""
    model = trio(Block(names, k, n, dtype, setup.device).train(), names, r=r)
    blocks = bare(model)
    g = torch.randn(m, n, dtype=dtype, device=setup.device)
    inner = setup.cuda or has_fast_way_back(dtype)
    x = torch.randn(m, k, dtype=dtype, device=setup.device, requires_grad=inner)
    grads = {}
    for who in ("ours", "PEFT"):
        x.grad = None
        step(x, g, blocks[who])
        grads[who] = [
            p.grad for p in (*([x] if inner else []), *(p for p in blocks[who].parameters() if p.requires_grad))
        ]
    differ = max(outputs_agree(blocks, x), agree(grads["ours"], grads["PEFT"], dtype))

    def afresh(block: nn.Module) -> None:
        """Delete all gradients."""
        x.grad = None
        block.zero_grad()

    calls = {
        who: Timed(lambda block=block: step(x * 1, g, block), before=partial(afresh, block))
        for who, block in blocks.items()
    }
    times, grouped = interleaved(calls, setup, steady=True), ", q k v grouped" * (len(names) > 1)
    case = f"{dtype_name(dtype)}, M {m}, {k} x {n}{rank(r)}{', x a leaf' * (not inner)}"
    yield Figure(
        case=case,
        metric=f"rho{grouped}",
        value=times.rho(),
        beside=times.summary(),
        limit=limit(k, n, r, 1.5),
        differ=differ,
        why=partial(profile_excess, calls["ours"], calls["base"], setup),
    )
    if r != R:  # x A^T and the gradients of A and B alone may be more than the must allows
        return
    peaks = {
        who: peak(Timed(partial(step, x, g, block), before=partial(afresh, block)), setup)
        for who, block in blocks.items()
    }
    yield Figure(
        case=case,
        metric=f"peak / frozen linear's{grouped}",
        value=exact_value(peaks["ours"] / peaks["base"]),
        beside=mebibytes(peaks),
        limit="y, dx, x A^T and the gradients of A and B",
    )


def train(setup: Setup) -> Iterator[Figure]:
    """Measure the training step of one layer, and of q, k and v on one input, at every rank."""
    for names, (m, k, n), dtype, r in product((("q_proj",), QKV), shapes(setup), setup.dtypes, ranks(setup)):
        yield from training(setup, names, m, k, n, dtype, r)


def backward(setup: Setup) -> Iterator[Figure]:
    """Count what is saved for the backward: bytes, which neither vary nor depend on the machine."""
    m, k, n = shapes(replace(setup, quick=False))[0]
    for dtype in setup.dtypes:
        x = torch.randn(m, k, dtype=dtype, device=setup.device, requires_grad=True)
        kept: dict[tuple[str, int, float], float] = {}
        for names in (("q_proj",), QKV):
            for dropout in (0.0, 0.1):
                model = trio(Block(names, k, n, dtype, setup.device).train(), names, dropout=dropout)
                for who, block in (("base", model.base), ("ours", model.ours), ("PEFT", model.theirs.base_model.model)):
                    kept[who, len(names), dropout] = (
                        saved(lambda block=block, x=x: block(x.view_as(x)), block) / x.nbytes
                    )
        for (who, many, dropout), ours in kept.items():
            if who == "ours":
                case = f"{dtype_name(dtype)}, {'q k v' if many > 1 else 'one linear'}{', dropout' * bool(dropout)}"
                theirs, base = kept["PEFT", many, dropout], kept["base", many, dropout]
                beside = f"ours {ours:.3g}, PEFT {theirs:.3g}, frozen linear {base:.3g} x's"
                yield Figure(
                    case=case,
                    metric="bytes / PEFT's",
                    value=exact_value(ours / theirs),
                    beside=beside,
                    limit="one x, and x A^T",
                )
        added = {who: kept[who, 1, 0.1] - kept[who, 1, 0.0] for who in ("ours", "PEFT")}
        yield Figure(
            case=dtype_name(dtype),
            metric="dropout adds, in x's",
            value=exact_value(added["ours"]),
            beside=f"PEFT {added['PEFT']:.3g}",
            limit="0",
        )
        yield Figure(
            case=dtype_name(dtype),
            metric="q k v keep, in x's",
            value=exact_value(kept["ours", 3, 0.0]),
            beside=f"PEFT {kept['PEFT', 3, 0.0]:.3g}",
            limit="1, and x A^T",
        )


SLOW = (
    "How much of it torch's own two products take, with nothing beside them, the column *at best* says: with the rank"
    " as one side (`mm`, `addmm_`) they run at a fraction of the rate of a square product. Up to rank 16 a large"
    " float32 output is added to 16 tokens at a time (`baddbmm_`). x does not fit into the core's own cache. In"
    " bfloat16 A and B are cast, and a product costs 20 us whatever its size; on a processor without instructions for"
    " it, x is cast to float32, some rows at a time, and the term back. The rest is Python."
)
STEP = (
    "A third of it is the products with A and B, six in each library; another third is Python: a node of the graph,"
    " whose backward is Python too."
)

ROWS = (
    Row(
        name="forward",
        what="forward of one layer",
        limit="+ r(K+N)/KN of the FLOPs, y accumulated in place",
        goals={"rho": Goal(0.5, 0.3), "peak / base's": Goal(1.05)},
        measure=forward,
        bound=SLOW,
        cuda=True,
    ),
    Row(
        name="train",
        what="training step of one layer, and of q, k, v on one x",
        limit="+ 1.5 r(K+N)/KN of the FLOPs",
        goals={
            "rho": Goal(0.7, 0.5),
            "peak / frozen linear's": Goal(1.05),
            "rho, q k v grouped": Goal(0.7, 0.35),
            "peak / frozen linear's, q k v grouped": Goal(1.05),
        },
        measure=train,
        bound=f"{STEP} {SLOW}",
        cuda=True,
    ),
    Row(
        name="saved",
        what="saved for backward",
        limit="one x per distinct input, and M r if x A^T is kept",
        goals={
            "bytes / PEFT's": Goal(1.0),
            "dropout adds, in x's": Goal(None, 0.0),
            "q k v keep, in x's": Goal(None, 1.05),
        },
        measure=backward,
        bound="With dropout, autograd keeps the dropped x as well, for the gradient of A, and the mask; we keep the"
        " seed. In bfloat16 q, k and v share x; the rest is x A^T.",
        cuda=True,
    ),
)

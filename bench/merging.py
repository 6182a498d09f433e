"""Merge and unmerge in memory: the merge that keeps nothing, and the exact one, compared with PEFT's and loralib's.

Each is measured as in a process that merges once (`once` in measure.interleaved). The merge that keeps nothing is also
measured again and again, in memory that is mapped already. PEFT keeps nothing, and its unmerge does not restore W0, so
its like is the merge that keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import lorainject as li

from .layer import QKV, bare
from .measure import Setup, Timed, Times, interleaved, peak, profile_functions
from .models import ALPHA, Block, R, Trio, dtype_name, mebibytes, trio
from .row import Figure, Goal, Row, exact_value, figures_in_fresh_process

TILE = 1.0  # MiB: 256 Ki elements of float32
CYCLES = 1000


def shapes(setup: Setup) -> list[tuple[int, int]]:
    """Return the input and output features of the three weights."""
    return (
        [(4096, 4096), (4096, 14336)] if setup.cuda else [(1024, 1024)] if setup.quick else [(2048, 2048), (4096, 4096)]
    )


def blocks(k: int, n: int, dtype: torch.dtype, device: str = "cpu", share: float = 0.03) -> Trio:
    """Return three weights whose delta's elements are about `share` of the weight's."""
    model = trio(Block(QKV, k, n, dtype, device), QKV, shared=False)
    sizes = [p for name, p in (*model.ours.named_parameters(), *model.theirs.named_parameters()) if "lora" in name]
    factor = share * k**-0.5 / 3**0.5 / (ALPHA / R * 0.02 * (R / k) ** 0.5)  # what the weight has, over what s B A has
    with torch.no_grad():
        for p in sizes:
            p.mul_(factor**0.5)
    return model


def weights(block: nn.Module) -> list[Tensor]:
    return [m.weight for m in block.children()]


@torch.no_grad()
def anew(block: nn.Module, w0: list[Tensor], factors: list[tuple[Tensor, Tensor]]) -> None:
    """Restore W0 and the adapters after merge(reversible=False)."""
    li.eject(block)
    for w, was in zip(weights(block), w0, strict=True):
        w.copy_(was)
    li.inject(block, list(QKV), r=R, alpha=ALPHA)
    for m, (A, B) in zip(block.children(), factors, strict=True):
        m.lora["default"].A.copy_(A), m.lora["default"].B.copy_(B)


def copies(w0: list[Tensor]) -> Timed:
    """Return the floor: every weight is read once and written once."""
    to = [torch.empty_like(w) for w in w0]
    return Timed(lambda: [a.copy_(b) for a, b in zip(to, w0, strict=True)])


def pair(case: str, times: Times, ours: str, theirs: str, metric: str, call: Timed | None = None) -> Figure:
    """Return the ratio of one of our verbs to PEFT's."""
    shown = ", ".join(f"{who} {times.ms(who):.3g}" for who in times.seconds) + " ms"
    floor = f"{times.ratio('copy', theirs).value:.2g}: W read and written once"
    return Figure(
        case=case,
        metric=metric,
        value=times.ratio(ours, theirs),
        beside=shown,
        limit=floor,
        why=call and partial(profile_functions, call),
    )


def plain(setup: Setup) -> Iterator[Figure]:
    """Measure merges that keep nothing."""
    for (k, n), dtype in [(shape, dtype) for shape in shapes(setup) for dtype in setup.dtypes]:
        yield from figures_in_fresh_process(one_plain, setup, k, n, dtype)


def one_plain(setup: Setup, k: int, n: int, dtype: torch.dtype) -> Iterator[Figure]:
    """Measure the merge that keeps nothing on weights of one shape."""
    model = blocks(k, n, dtype, setup.device)
    variants, ours = bare(model), model.ours
    w0 = [w.detach().clone() for w in weights(model.base)]
    factors = [(m.lora["default"].A.detach().clone(), m.lora["default"].B.detach().clone()) for m in ours.children()]
    calls = {
        "ours": Timed(partial(li.merge, ours, reversible=False), after=partial(anew, ours, w0, factors)),
        "PEFT": Timed(model.theirs.merge_adapter, after=model.theirs.unmerge_adapter),
        "loralib": Timed(variants["loralib"].eval, after=variants["loralib"].train),
        "copy": copies(w0),
    }
    li.merge(ours, reversible=False), model.theirs.merge_adapter()
    theirs = [m.base_layer.weight for m in variants["PEFT"].children()]
    step = 2.0 ** -(
        7 if dtype == torch.bfloat16 else 20
    )  # of each weight: PEFT rounds the delta first, and then the sum
    assert all(torch.allclose(a, b, rtol=step, atol=step / 64) for a, b in zip(weights(ours), theirs, strict=True)), (
        "the merged weights agree"
    )
    anew(ours, w0, factors), model.theirs.unmerge_adapter()
    case, times = f"{dtype_name(dtype)}, {k} x {n}", interleaved(calls, setup, once=not setup.cuda)
    yield pair(case, times, "ours", "PEFT", "T / PEFT's", calls["ours"])
    if not setup.cuda:
        yield pair(case, interleaved(calls, setup), "ours", "PEFT", "T / PEFT's, again and again")
    if setup.cuda:
        yield Figure(
            case=case,
            metric="T / bandwidth floor",
            value=times.ratio("ours", "copy"),
            beside=times.summary("copy"),
            limit="1",
        )
    peaks = {who: float(peak(calls[who], setup)) for who in ("ours", "PEFT", "loralib")}
    where = " on the GPU" * setup.cuda
    yield Figure(
        case=case,
        metric=f"peak{where}, MiB",
        value=exact_value(peaks["ours"] / 2**20),
        beside=mebibytes(peaks),
        limit="a tile",
    )


def exact(setup: Setup) -> Iterator[Figure]:
    """Measure exact merges and unmerges at several sizes of the delta."""
    k, n = shapes(setup)[-1]
    for dtype in setup.dtypes:
        for share in (0.01, 0.03) if setup.quick else (0.003, 0.01, 0.03, 0.1, 0.3):
            yield from figures_in_fresh_process(one_exact, setup, k, n, dtype, share)
    yield cycled(setup)


def one_exact(setup: Setup, k: int, n: int, dtype: torch.dtype, share: float) -> Iterator[Figure]:
    """Measure the exact merge and unmerge at one size of the delta."""
    model = blocks(k, n, dtype, setup.device, share)
    ours, theirs, reports = model.ours, model.theirs, []
    w0 = [w.detach().clone() for w in weights(model.base)]
    calls = {
        "merge": Timed(lambda: reports.append(li.merge(ours)), after=partial(li.unmerge, ours)),
        "unmerge": Timed(partial(li.unmerge, ours), before=partial(li.merge, ours)),
        "PEFT merge": Timed(theirs.merge_adapter, after=theirs.unmerge_adapter),
        "PEFT unmerge": Timed(theirs.unmerge_adapter, before=theirs.merge_adapter),
        "copy": copies(w0),
    }
    times, case = interleaved(calls, setup, once=not setup.cuda), f"{dtype_name(dtype)}, {k} x {n}, delta {share:.1%}"
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), w0, strict=True)), "W0 is back, to the bit"
    for verb in ("merge", "unmerge"):
        yield pair(case, times, verb, f"PEFT {verb}", f"{verb} / PEFT's, {dtype_name(dtype)}", calls[verb])
    report = reports[-1]
    kept = report.journal_bytes / report.weight_bytes
    details = f"survival {report.survival:.3f}, error {report.sites[0].error:.1%}"
    yield Figure(case=case, metric=f"journal at {share:.1%}", value=exact_value(kept), beside=details)


def cycled(setup: Setup) -> Figure:
    """Count the weights whose bits differ when the same weight is merged and unmerged again and again."""
    cycles, wrong = 100 if setup.cuda or setup.quick else CYCLES, 0
    for dtype in setup.dtypes:
        model = blocks(256, 256, dtype, setup.device) if not setup.cuda else blocks(4096, 4096, dtype, setup.device)
        w0, merged = [w.detach().clone() for w in weights(model.base)], None
        for _ in range(cycles):
            li.merge(model.ours)
            merged = merged or [w.detach().clone() for w in weights(model.ours)]
            wrong += sum(not torch.equal(a, b) for a, b in zip(weights(model.ours), merged, strict=True))
            li.unmerge(model.ours)
            wrong += sum(not torch.equal(a, b) for a, b in zip(weights(model.ours), w0, strict=True))
    return Figure(
        case=f"{cycles} cycles, " + ", ".join(map(dtype_name, setup.dtypes)),
        metric="weights that differ",
        value=exact_value(wrong),
        limit="0",
    )


ROWS = (
    Row(
        name="merge",
        what="merge for good",
        limit="max(2 e K N / bandwidth, 2 r K N / FLOP rate); memory: one tile",
        goals={"T / PEFT's": Goal(0.35, 0.15), "peak, MiB": Goal(2 * TILE), "T / bandwidth floor": Goal(4)},
        measure=plain,
        bound="W is read twice, once to see that no sum can overflow (dot, or aminmax: what is not finite would have"
        " to be undone) and once for the sum, and written once; PEFT also writes and reads a delta as large as W. The"
        " column *at best* says how much of PEFT's time the floor of one reading and one writing (copy) takes. The"
        " rest is the product (mm), the calls for each strip of it, in bfloat16 the casts (copy_), and more than half"
        " of the time what is measured on every element: the rounding error (sub, sub_) and three sums (matmul). The"
        " peak is one strip of the delta, one of the rounding error, in bfloat16 one of the sum too, and for the norm"
        " one of A and B in float64: it grows with r, not with the weight.",
        cuda=True,
    ),
    Row(
        name="exact",
        what="merge that can be taken out to the bit, and unmerge",
        limit="as merge, and a journal of 1 to 5 %",
        goals={
            "merge / PEFT's, bf16": Goal(0.7, 0.4),
            "unmerge / PEFT's, bf16": Goal(None, 0.25),
            "journal at 1.0%": Goal(None, 0.03),
            "journal at 3.0%": Goal(0.08),
            "weights that differ": Goal(0, 0),
        },
        measure=exact,
        bound="As merge, with the delta from a product in float64; the way back to W0 once, to find and keep the"
        " elements that rounding would not restore; and a checksum before and after. Unmerge takes the same way back,"
        " and both checksums. The size of the journal is the entropy of what rounding loses: it follows from the size"
        " of the delta.",
        cuda=True,
    ),
)

"""Whole Llama-shaped models: decode, prefill, training step, a batch with many adapters, and generate.

Every linear of every block is adapted. decode is one token after a prompt, with its cache; many adapters are `li.rows` beside PEFT's
`adapter_names=`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import lorainject as li

from .floor import TORCH, least, products
from .layer import SLOW, STEP, has_fast_way_back, rank
from .measure import Setup, Timed, Times, excess, interleaved
from .models import RANKS, SIZES, SMALL, R, Trio, agree, gradients, llama, said, trio
from .row import Figure, Goal, Row

Forward = Callable[..., Tensor]


def sizes(on: Setup) -> list[str]:
    return ["8B's shapes, 2 layers"] if on.cuda else [SMALL] if on.quick else [SMALL, "110M", "340M"]


def dtypes(on: Setup) -> tuple[torch.dtype, ...]:
    """For what has many tokens: not those that this processor multiplies so slowly that nobody would see an adapter (rho: -0.3 to 4.8)."""
    return tuple(dtype for dtype in on.dtypes if on.cuda or has_fast_way_back(dtype))


def tokens(on: Setup, rows: int, length: int) -> Tensor:
    return torch.randint(0, 1000, (rows, length), device=on.device)


def limit(size: str, part: float = 1, r: int = R) -> str:
    """The adapters' share of the linears' products, and of their bytes."""
    h, i = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    more = r * (4 * 2 * h + 3 * (h + i)) / (4 * h * h + 3 * h * i)
    return f"{1 + part * more:.3f} x base by FLOPs"


def ways(model: Trio, names: list[str] | None = None) -> dict[str, Forward]:
    """A forward (or generate) of each, that gives row i of the batch the adapter names[i]; without names, all rows the one that is on."""

    def call(who: str, m: nn.Module, ids: Tensor, verb: str = "forward", **more: object) -> Tensor:
        if names and who == "PEFT":
            more["adapter_names"] = names
        with torch.no_grad(), li.rows(m, names) if names and who == "ours" else nullcontext():
            found = getattr(m, verb)(input_ids=ids, **more)
        return found if verb == "generate" else found.logits

    return {who: partial(call, who, m) for who, m in (*model, *([] if names else [(TORCH, products(model))]))}


def measured(
    calls: dict[str, Timed],
    on: Setup,
    case: str,
    at_best: str,
    differ: float,
    *,
    tell: Callable[[Times], str] = Times.beside,
) -> Figure:
    times = interleaved(calls, on, steady=True)
    if TORCH in calls:
        at_best = f"{at_best}; {least(times)}"
    return Figure(case=case, metric="rho", value=times.rho(), beside=tell(times), limit=at_best, differ=differ,
                  why=partial(excess, calls["ours"], calls["base"], on))  # fmt: skip


def one_token(
    forwards: dict[str, Forward], on: Setup, rows: int = 1, prompt: int = 32
) -> tuple[dict[str, Timed], float]:
    """One token after a prompt, again and again: what it adds to the cache is taken off untimed."""
    ids, calls, first = tokens(on, rows, prompt), {}, {}
    for who, forward in forwards.items():
        cache = DynamicCache()
        first[who] = forward(ids, past_key_values=cache, use_cache=True)
        calls[who] = Timed(
            partial(forward, ids[:, :1], past_key_values=cache, use_cache=True), after=partial(cache.crop, -1)
        )
    return calls, outputs_agree(first)


def decode(on: Setup) -> Iterator[Figure]:
    for size, dtype, r in product(sizes(on), on.dtypes, RANKS):
        calls, differ = one_token(ways(trio(llama(size, dtype, on.device), r=r)), on)
        yield measured(calls, on, f"{said(dtype)}, {size}{rank(r)}", limit(size, r=r), differ)


def at_once(forwards: dict[str, Forward], ids: Tensor) -> tuple[dict[str, Timed], float]:
    """All tokens in one forward."""
    calls = {who: Timed(partial(forward, ids, use_cache=False)) for who, forward in forwards.items()}
    return calls, outputs_agree({who: call.call() for who, call in calls.items()})


def outputs_agree(found: dict[str, Tensor]) -> float:
    """How far ours are from PEFT's; those of torch's calls alone must agree too."""
    if TORCH in found:
        agree([found[TORCH]], [found["PEFT"]], found["PEFT"].dtype)
    return agree([found["ours"]], [found["PEFT"]], found["PEFT"].dtype)


def prefill(on: Setup) -> Iterator[Figure]:
    length = 2048 if on.cuda else 32 if on.quick else 128
    for size, dtype in [(size, dtype) for size in sizes(on) for dtype in dtypes(on)]:
        calls, differ = at_once(ways(trio(llama(size, dtype, on.device))), tokens(on, 1, length))
        yield measured(calls, on, f"{said(dtype)}, {size}, {length} tokens", limit(size), differ)


def step(ids: Tensor, model: nn.Module) -> None:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def train(on: Setup) -> Iterator[Figure]:
    """The base's step is the frozen model's, but for one norm before the first linears, so that its way back goes as far as the adapters'."""
    length = 2048 if on.cuda else 32 if on.quick else 128
    for size, dtype in [(size, dtype) for size in sizes(on) for dtype in dtypes(on)]:
        model, ids = trio(llama(size, dtype, on.device).train()), tokens(on, 1, length)
        differ = gradients(model, partial(step, ids), dtype)
        norm = model.base.model.layers[0].input_layernorm.weight
        norm.requires_grad_(True)
        calls = {who: Timed(partial(step, ids, m), before=m.zero_grad) for who, m in model}
        yield measured(calls, on, f"{said(dtype)}, {size}, {length} tokens", limit(size, 1.5), differ)


def names_of(adapters: int, rows: int) -> list[str]:
    return [f"a{i % adapters}" for i in range(rows)]


def many(on: Setup) -> Iterator[Figure]:
    """Eight rows with an adapter each: a token, and a prompt."""
    size, prompt = sizes(on)[0], 512 if on.cuda else 6 if on.quick else 32
    for dtype in on.dtypes:
        names = names_of(8, 8)
        forwards = ways(trio(llama(size, dtype, on.device), names=names), names)
        calls, differ = one_token(forwards, on, rows=8)
        yield measured(calls, on, f"{said(dtype)}, {size}, decode", limit(size), differ)
        if dtype in dtypes(on):
            calls, differ = at_once(forwards, tokens(on, 8, prompt))
            yield measured(calls, on, f"{said(dtype)}, {size}, prefill of {prompt} tokens", limit(size), differ)


def generate(on: Setup) -> Iterator[Figure]:
    """As many rows whatever the number of adapters, so that only this differs. (`rows` refuses a prompt as long as the batch has rows.)"""
    size, rows, new = (SMALL, 8, 4) if on.quick else (sizes(on)[0] if on.cuda else "110M", 32, 8)
    options = {"verb": "generate", "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    for dtype in dtypes(on):
        for adapters in (1, 8) if on.quick else (1, 8, 32):
            names = names_of(adapters, rows)
            forwards = ways(trio(llama(size, dtype, on.device), names=list(dict.fromkeys(names))), names)
            _, differ = at_once(forwards, ids := tokens(on, rows, 6))
            calls = {who: Timed(partial(forward, ids, **options)) for who, forward in forwards.items()}

            def tell(times: Times) -> str:
                each = ", ".join(f"{who} {rows * new / times.ms(who) * 1e3:.0f}" for who in times.seconds)
                return f"{times.beside()}; tokens/s: {each}"

            s = "s" * (adapters > 1)
            yield measured(
                calls, on, f"{said(dtype)}, {size}, {rows} rows, {adapters} adapter{s}", limit(size), differ, tell=tell
            )


CALLS = (
    "With one token an adapter is two products of a matrix and a vector, the second added into y; in bf16, where a product takes longer, x is cast to"
    " fp32 and the sum is a call of its own. The rest is Python, of which most is to find in memory what the base's product has driven out of the"
    " cache."
)
MANY = (
    "Up to 24 tokens an adapter: two batched products in which each row, or some rows with the same adapter, have their own A and B, which are copied"
    " once for the batch. More: two products for each adapter, on a copy of its rows where they are not one after the other."
)

ROWS = (
    Row(
        name="decode",
        what="one token, whole model",
        limit="bytes e(KN + r(K+N)) of each linear, and the calls",
        goals={"rho": Goal(0.65, 0.45)},
        measure=decode,
        bound=CALLS,
        cuda=True,
    ),
    Row(
        name="prefill",
        what="a prompt, whole model",
        limit="as forward",
        goals={"rho": Goal(None, 0.3)},
        measure=prefill,
        bound=SLOW,
        cuda=True,
    ),
    Row(
        name="step",
        what="training step, whole model",
        limit="as train",
        goals={"rho": Goal(None, 0.5)},
        measure=train,
        bound=STEP,
        cuda=True,
    ),
    Row(
        name="rows",
        what="8 rows with 8 adapters, decode and prefill",
        limit="the base, and each used A and B read once",
        goals={"rho": Goal(0.6, 0.4)},
        measure=many,
        bound=MANY,
        cuda=True,
    ),
    Row(
        name="generate",
        what="generate with 1, 8 and 32 adapters in a batch",
        limit="as rows: whatever the number of adapters",
        goals={"rho": Goal(None, 0.4)},
        measure=generate,
        bound=f"The prompt as prefill, and then tokens as decode. {MANY}",
        cuda=True,
    ),
)

"""Whole Llama-shaped models: decode, prefill, training step, a batch with many adapters, and generate.

Every linear layer of every block is adapted. `decode` is one token after a prompt, with its cache. Many adapters are
`li.rows`, compared with PEFT's `adapter_names=`.
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
from .layer import SLOW, STEP, has_fast_way_back, rank, ranks
from .measure import Setup, Timed, Times, interleaved, profile_excess
from .models import SIZES, SMALL, R, Trio, agree, compare_gradients, dtype_name, llama, trio
from .row import Figure, Goal, Row

Forward = Callable[..., Tensor]


def sizes(setup: Setup) -> list[str]:
    """Return the sizes of models to measure."""
    return ["8B's shapes, 2 layers"] if setup.cuda else [SMALL] if setup.quick else [SMALL, "110M", "340M"]


def dtypes(setup: Setup) -> tuple[torch.dtype, ...]:
    """Return the dtypes for many tokens.

    A dtype that the processor multiplies very slowly is left out: no one would see an adapter beside it (rho was
    -0.3 to 4.8).
    """
    return tuple(dtype for dtype in setup.dtypes if setup.cuda or has_fast_way_back(dtype))


def tokens(setup: Setup, rows: int, length: int) -> Tensor:
    """Return random token ids."""
    return torch.randint(0, 1000, (rows, length), device=setup.device)


def limit(size: str, part: float = 1, r: int = R) -> str:
    """Return the adapters' share of the products and bytes of all linear layers, as text."""
    h, i, *_ = SIZES[size]
    more = r * (4 * 2 * h + 3 * (h + i)) / (4 * h * h + 3 * h * i)
    return f"{1 + part * more:.3f} x base by FLOPs"


def ways(model: Trio, names: list[str] | None = None) -> dict[str, Forward]:
    """Return a forward (or generate) of each model.

    Row i of the batch gets the adapter names[i]; without names, all rows get the active one.
    """

    def call(who: str, m: nn.Module, ids: Tensor, verb: str = "forward", **more: object) -> Tensor:
        if names and who == "PEFT":
            more["adapter_names"] = names
        with torch.no_grad(), li.rows(m, names) if names and who == "ours" else nullcontext():
            output = getattr(m, verb)(input_ids=ids, **more)
        return output if verb == "generate" else output.logits

    return {who: partial(call, who, m) for who, m in (*model, *([] if names else [(TORCH, products(model))]))}


def measured(
    calls: dict[str, Timed],
    setup: Setup,
    case: str,
    at_best: str,
    differ: float,
    *,
    summarize: Callable[[Times], str] = Times.summary,
) -> Figure:
    """Measure rho, and return the figure."""
    times = interleaved(calls, setup, steady=True)
    if TORCH in calls:
        at_best = f"{at_best}; {least(times)}"
    return Figure(
        case=case,
        metric="rho",
        value=times.rho(),
        beside=summarize(times),
        limit=at_best,
        differ=differ,
        why=partial(profile_excess, calls["ours"], calls["base"], setup),
    )


def one_token(
    forwards: dict[str, Forward], setup: Setup, rows: int = 1, prompt: int = 32
) -> tuple[dict[str, Timed], float]:
    """Return calls of one token after a prompt. What a call adds to the cache is taken off untimed."""
    ids, calls, first = tokens(setup, rows, prompt), {}, {}
    for who, forward in forwards.items():
        cache = DynamicCache()
        first[who] = forward(ids, past_key_values=cache, use_cache=True)
        calls[who] = Timed(
            partial(forward, ids[:, :1], past_key_values=cache, use_cache=True), after=partial(cache.crop, -1)
        )
    return calls, outputs_agree(first)


def decode(setup: Setup) -> Iterator[Figure]:
    """Measure one token at every rank."""
    for size, dtype, r in product(sizes(setup), setup.dtypes, ranks(setup)):
        calls, differ = one_token(ways(trio(llama(size, dtype, setup.device), r=r)), setup)
        yield measured(calls, setup, f"{dtype_name(dtype)}, {size}{rank(r)}", limit(size, r=r), differ)


def at_once(forwards: dict[str, Forward], ids: Tensor) -> tuple[dict[str, Timed], float]:
    """Return calls that process all tokens in one forward."""
    calls = {who: Timed(partial(forward, ids, use_cache=False)) for who, forward in forwards.items()}
    return calls, outputs_agree({who: call.call() for who, call in calls.items()})


def outputs_agree(outputs: dict[str, Tensor]) -> float:
    """Return how far our output is from PEFT's, after a check of torch's calls alone."""
    if TORCH in outputs:
        agree([outputs[TORCH]], [outputs["PEFT"]], outputs["PEFT"].dtype)
    return agree([outputs["ours"]], [outputs["PEFT"]], outputs["PEFT"].dtype)


def prefill(setup: Setup) -> Iterator[Figure]:
    """Measure a prompt."""
    length = 2048 if setup.cuda else 32 if setup.quick else 128
    for size, dtype in [(size, dtype) for size in sizes(setup) for dtype in dtypes(setup)]:
        calls, differ = at_once(ways(trio(llama(size, dtype, setup.device))), tokens(setup, 1, length))
        yield measured(calls, setup, f"{dtype_name(dtype)}, {size}, {length} tokens", limit(size), differ)


def step(ids: Tensor, model: nn.Module) -> None:
    """Run one training step."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def train(setup: Setup) -> Iterator[Figure]:
    """Measure a training step of the whole model.

    The base is frozen but for one norm before the first linear layers, so that its backward goes as far as that of the
    adapters.
    """
    length = 2048 if setup.cuda else 32 if setup.quick else 128
    for size, dtype in [(size, dtype) for size in sizes(setup) for dtype in dtypes(setup)]:
        model, ids = trio(llama(size, dtype, setup.device).train()), tokens(setup, 1, length)
        differ = compare_gradients(model, partial(step, ids), dtype)
        norm = model.base.model.layers[0].input_layernorm.weight
        norm.requires_grad_(True)
        calls = {who: Timed(partial(step, ids, m), before=m.zero_grad) for who, m in model}
        yield measured(calls, setup, f"{dtype_name(dtype)}, {size}, {length} tokens", limit(size, 1.5), differ)


def names_of(adapters: int, rows: int) -> list[str]:
    """Return one adapter name per row."""
    return [f"a{i % adapters}" for i in range(rows)]


def many(setup: Setup) -> Iterator[Figure]:
    """Measure eight rows with an adapter each: one token, and a prompt."""
    size, prompt = sizes(setup)[0], 512 if setup.cuda else 6 if setup.quick else 32
    for dtype in setup.dtypes:
        names = names_of(8, 8)
        forwards = ways(trio(llama(size, dtype, setup.device), names=names), names)
        calls, differ = one_token(forwards, setup, rows=8)
        yield measured(calls, setup, f"{dtype_name(dtype)}, {size}, decode", limit(size), differ)
        if dtype in dtypes(setup):
            calls, differ = at_once(forwards, tokens(setup, 8, prompt))
            yield measured(
                calls, setup, f"{dtype_name(dtype)}, {size}, prefill of {prompt} tokens", limit(size), differ
            )


def generate(setup: Setup) -> Iterator[Figure]:
    """Measure generation with as many rows whatever the number of adapters.

    The prompt is not as long as the batch has rows, which `rows` refuses.
    """
    size, rows, new = (SMALL, 8, 4) if setup.quick else (sizes(setup)[0] if setup.cuda else "110M", 32, 8)
    options = {"verb": "generate", "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    for dtype in dtypes(setup):
        for adapters in (1, 8) if setup.quick else (1, 8, 32):
            names = names_of(adapters, rows)
            forwards = ways(trio(llama(size, dtype, setup.device), names=list(dict.fromkeys(names))), names)
            _, differ = at_once(forwards, ids := tokens(setup, rows, 6))
            calls = {who: Timed(partial(forward, ids, **options)) for who, forward in forwards.items()}

            def summarize(times: Times) -> str:
                per_second = ", ".join(f"{who} {rows * new / times.ms(who) * 1e3:.0f}" for who in times.seconds)
                return f"{times.summary()}; tokens/s: {per_second}"

            s = "s" * (adapters > 1)
            yield measured(
                calls,
                setup,
                f"{dtype_name(dtype)}, {size}, {rows} rows, {adapters} adapter{s}",
                limit(size),
                differ,
                summarize=summarize,
            )


CALLS = (
    "With one token an adapter is two products of a matrix and a vector, and a sum; in bfloat16, where a product takes"
    " longer, x is cast to float32. The rest is Python, most of which waits for memory that the product of the base has"
    " driven out of the cache."
)
MANY = (
    "Up to 24 tokens per adapter: two batched products, in which every row has its own A and B, which are copied once"
    " for the batch. More tokens: two products for each adapter, on a copy of its rows where they are not"
    " consecutive."
)

ROWS = (
    Row(
        name="decode",
        what="one token, whole model",
        limit="bytes e(KN + r(K+N)) of each linear, and the calls",
        goals={"rho": Goal(0.75, 0.45)},
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

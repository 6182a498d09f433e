"""The verbs on a whole model of 112 linears: inject, merged, switch, save and load."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import lorainject as li

from .measure import Setup, Timed, Times, interleaved, profile_functions, spread
from .models import ALPHA, SMALL, TARGETS, R, config_of, dtype_name, llama, trio
from .row import Figure, Goal, Row


def against(times: Times, case: str, calls: dict[str, Timed], at_best: str = "") -> Figure:
    """Return ours over PEFT's as a plain ratio: there is no base."""
    beside = ", ".join(f"{who} {times.ms(who):.3g}" for who in times.seconds) + " ms"
    return Figure(
        case=case,
        metric="T / PEFT's",
        value=times.ratio("ours", "PEFT"),
        beside=beside,
        limit=at_best,
        why=partial(profile_functions, calls["ours"]),
    )


class Wrapped:
    """A base model that is wrapped by PEFT and unwrapped again."""

    def __init__(self, base: nn.Module) -> None:
        self.base: nn.Module = base
        self.model: peft.PeftModel | None = None

    def wrap(self, how: Callable[[nn.Module], peft.PeftModel]) -> None:
        self.model = how(self.base)

    def unwrap(self) -> None:
        assert self.model is not None
        self.base = self.model.unload()


def inject(setup: Setup) -> Iterator[Figure]:
    """Measure inject. Taking the adapter off again is not timed."""
    for dtype in setup.dtypes:
        ours, theirs = llama(SMALL, dtype), Wrapped(llama(SMALL, dtype))
        linears = [m for path, m in ours.named_modules() if path.rpartition(".")[2] in TARGETS]

        def draw(linears: list[nn.Module] = linears) -> None:
            for m in linears:
                torch.empty(R, m.in_features).uniform_(), torch.zeros(m.out_features, R)

        calls = {
            "ours": Timed(partial(li.inject, ours, TARGETS, r=R, alpha=ALPHA), after=partial(li.eject, ours)),
            "PEFT": Timed(
                partial(theirs.wrap, lambda base: peft.get_peft_model(base, config_of())), after=theirs.unwrap
            ),
            "A and B alone": Timed(draw),
        }
        times = interleaved(calls, setup)
        yield against(
            times,
            f"{dtype_name(dtype)}, {SMALL}",
            calls,
            f"{times.ratio('A and B alone', 'PEFT').value:.2g}: A and B alone",
        )


def merged(setup: Setup) -> Iterator[Figure]:
    """Measure the merged model, and a second copy of the base, which shows the noise."""
    for dtype in setup.dtypes:
        model, twin, ids = trio(llama(SMALL, dtype), shared=False), llama(SMALL, dtype), torch.randint(0, 1000, (1, 8))
        li.merge(model.ours, reversible=False)
        for path, m in model.base.named_modules():
            assert type(model.ours.get_submodule(path)) is type(m), f"{path} has its original class"
            assert "forward" not in vars(model.ours.get_submodule(path)), f"{path} has its class's forward"
        models = {"base": model.base, "ours": model.ours, "twin": twin}
        calls = {who: Timed(torch.no_grad()(partial(m, ids, use_cache=False))) for who, m in models.items()}
        times = interleaved(calls, replace(setup, rounds=max(setup.rounds, 31)))
        case = f"{dtype_name(dtype)}, {SMALL}"
        yield Figure(
            case=case,
            metric="T / T(base)",
            value=times.ratio("ours", "base"),
            beside=times.summary(),
            limit="1: the base itself",
        )


def switch(setup: Setup) -> Iterator[Figure]:
    """Measure a switch among 17 adapters: a caller's choice, and the model's default beside PEFT's set_adapter."""
    names = [f"a{i}" for i in range(17)]
    model, turn = trio(llama(SMALL, torch.float32), names=names), iter(range(1 << 60))
    model.ours.eval()  # in training, `using` warns of adapters that do not train

    def use() -> None:
        with li.using(model.ours, names[next(turn) % 17]):
            pass

    calls = {
        "using": Timed(use, number=20),
        "activate": Timed(lambda: li.activate(model.ours, names[next(turn) % 17]), number=5),
        "PEFT": Timed(lambda: model.theirs.set_adapter(names[next(turn) % 17])),
    }
    times = interleaved(calls, setup)
    microseconds = [s * 1e6 for s in times.seconds["using"]]
    case = f"17 adapters, {SMALL}"
    beside = f"activate {times.ms('activate') * 1e3:.3g}, PEFT {times.ms('PEFT') * 1e3:.3g}"
    yield Figure(
        case=case,
        metric="microseconds of using",
        value=spread(microseconds),
        beside=beside,
        limit="a look at the modules",
        why=partial(profile_functions, calls["using"]),
    )
    yield Figure(case=case, metric="T(activate) / PEFT's", value=times.ratio("activate", "PEFT"))


def synced(save: partial[object], folder: Path) -> None:
    """Run PEFT's save, and make it as durable as ours."""
    save(folder)
    for file in [*folder.iterdir(), folder]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def save(setup: Setup) -> Iterator[Figure]:
    """Measure save."""
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), trio(llama(SMALL, torch.float32))
        calls = {
            "ours": Timed(partial(li.save, model.ours, folder / "ours")),
            "PEFT": Timed(partial(synced, model.theirs.save_pretrained, folder / "theirs")),
        }
        yield against(interleaved(calls, setup), SMALL, calls, "the bytes of A and B")


def load(setup: Setup) -> Iterator[Figure]:
    """Measure load, with the checks that each library makes. Taking the adapter off again is not timed."""
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), trio(llama(SMALL, torch.float32))
        li.save(model.ours, folder / "ours"), model.theirs.save_pretrained(folder / "theirs")
        ours, theirs = llama(SMALL, torch.float32), Wrapped(llama(SMALL, torch.float32))
        calls = {
            "ours": Timed(partial(li.load, ours, folder / "ours"), after=partial(li.eject, ours)),
            "PEFT": Timed(
                partial(theirs.wrap, lambda base: peft.PeftModel.from_pretrained(base, folder / "theirs")),
                after=theirs.unwrap,
            ),
        }
        li.load(ours, folder / "ours")
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(model.ours), strict=True)), (
            "what was loaded is what was saved"
        )
        li.eject(ours)
        yield against(interleaved(calls, setup), SMALL, calls, "the bytes of A and B")


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Return the factors of the active adapter."""
    return iter(li.parameters(model))


ROWS = (
    Row(
        name="inject",
        what="inject 112 linears, d 512",
        limit="r K random numbers a site",
        goals={"T / PEFT's": Goal(0.30, 0.15)},
        measure=inject,
        bound="Python, spread thin: the walk over all modules, the plan, and the making of modules, which is a third;"
        " the random numbers are a tenth.",
    ),
    Row(
        name="merged",
        what="forward of a merged model",
        limit="the base: its classes and its forward, which are checked",
        goals={"T / T(base)": Goal(1.02)},
        measure=merged,
    ),
    Row(
        name="switch",
        what="switch among 17 adapters, 112 layers",
        limit="O(modules), whatever the number loaded",
        goals={"microseconds of using": Goal(100, 10)},
        measure=switch,
        bound="using looks whether any module was replaced or added, 0.3 us per module. activate also sets which"
        " parameters require a gradient.",
    ),
    Row(
        name="save",
        what="save an adapter; PEFT's with an fsync too",
        limit="the bytes of A and B",
        goals={"T / PEFT's": Goal(0.6, 0.4)},
        measure=save,
        bound="Python, spread thin: what every site is, and its entries in two tables of names. Then the CRC-32s, the"
        " check that all is finite, and two files, synced, that replace the old ones together. PEFT only writes.",
    ),
    Row(
        name="load",
        what="load an adapter",
        limit="the bytes of A and B",
        goals={"T / PEFT's": Goal(0.2, 0.1)},
        measure=load,
        bound="An inject, whose Python is most of it, after the checks of the file; the CRC-32s are a twentieth.",
    ),
)

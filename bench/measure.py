"""How a figure is taken.

All variants run once in every round, in random order. A figure is the median over the rounds of a ratio taken within
the round, with its quartiles. Time is the CPU time of this process with one intra-op thread, because other processes
may share the machine, or CUDA events on a GPU. Memory is what torch's allocator hands out, event by event, or what a
fresh process grows by.
"""

from __future__ import annotations

import cProfile
import ctypes
import gc
import math
import multiprocessing
import pstats
import random
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

WARM, MOST = 1, 201
"""Rounds that are not counted, and rounds at most."""
STEADY, PATIENCE = 0.1, 5
"""The quartiles of a rho shall lie within this share of it, unless that takes longer than so many times `seconds`."""
MATRIX = dict.fromkeys(["aten::mm", "aten::addmm", "aten::addmm_"], "mm and addmm")
"""Operators that count as one: the product of the base may be one in the base and another in ours."""
Call = Callable[[], object]


def do_nothing() -> None:
    """Do nothing before or after a call."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run is done."""

    quick: bool = False
    """True for smaller sizes."""
    device: str = "cpu"
    rounds: int = 11
    """Rounds at least, ..."""
    seconds: float = 5.0
    """... and seconds at least; a rho that is not steady yet takes longer."""

    @property
    def cuda(self) -> bool:
        """True on a GPU, which is measured by events, in bfloat16, with the shapes of an 8B model."""
        return self.device == "cuda"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) if self.cuda else (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Timed:
    """A call, with what runs before and after it untimed. `number` calls are timed as one."""

    call: Call
    before: Call = do_nothing
    after: Call = do_nothing
    number: int = 1


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    value: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Return the median and the quartiles. Infinite values count as large."""
    v = sorted(values)
    return Spread(statistics.median(v), v[len(v) // 4], v[-1 - len(v) // 4])


@dataclass(frozen=True)
class Times:
    """The seconds of every variant in every round."""

    seconds: Mapping[str, Sequence[float]]

    def ms(self, who: str) -> float:
        """Return the median time of a variant in milliseconds."""
        return statistics.median(self.seconds[who]) * 1e3

    def ratio(self, who: str, to: str) -> Spread:
        """Return T(who) / T(to), taken within each round."""
        return spread(a / b for a, b in zip(self.seconds[who], self.seconds[to], strict=True))

    def rho(self, ours: str = "ours", theirs: str = "PEFT", base: str = "base") -> Spread:
        """Return overhead(ours) / overhead(theirs), infinite if theirs shows no overhead.

        Each overhead is the median over the rounds, because a quotient within a round is mostly noise where overheads
        are small. The quartiles are those of 500 draws of the rounds (bootstrap).
        """
        rounds = [
            (a / b - 1, p / b - 1)
            for a, p, b in zip(self.seconds[ours], self.seconds[theirs], self.seconds[base], strict=True)
        ]
        draws, draw = [rounds], random.Random(0)
        draws += [draw.choices(rounds, k=len(rounds)) for _ in range(500)]
        a, p = ([statistics.median(x[i] for x in d) for d in draws] for i in (0, 1))
        quotients = [x / y if y > 0 else math.inf for x, y in zip(a, p, strict=True)]
        around = spread(quotients[1:])
        return Spread(quotients[0], around.low, around.high)

    @property
    def is_steady(self) -> bool:
        """True if more rounds would hardly change rho."""
        rho = self.rho()
        return rho.high - rho.low <= 2 * STEADY * abs(rho.value)

    def summary(self, base: str = "base") -> str:
        """Return every T / T(base), and T(base) itself, as text."""
        ratios = ", ".join(f"{who} {self.ratio(who, base).value:.3g}" for who in self.seconds if who != base)
        return f"{ratios} x {base} {self.ms(base):.3g} ms"


def interleaved(
    calls: Mapping[str, Timed],
    setup: Setup,
    clock: Callable[[Timed], float] | None = None,
    once: bool = False,
    steady: bool = False,
) -> Times:
    """Run every variant once per round, in random order, and return the times without those of the first rounds.

    Args:
        calls: The variants.
        setup: How many rounds and seconds, at least.
        clock: What times a call. None for the clock of the device.
        once: True for what a process does once: freed memory goes back to the system before each call. Otherwise a
            call finds what the last one left, and whether large temporaries have to be mapped anew, which can take
            longer than the work, depends on what ran before.
        steady: True to go on until rho is steady, which its quartiles decide and not its value.
    """
    clock = clock or (_events if setup.cuda else _cpu)
    seconds: dict[str, list[float]] = {who: [] for who in calls}
    n, start = 0, time.perf_counter()

    def counted() -> Times:
        return Times({who: times[WARM:] for who, times in seconds.items()})

    def enough(spent: float) -> bool:
        if n < setup.rounds + WARM or n >= MOST or spent < setup.seconds:
            return n >= MOST
        return not steady or spent >= PATIENCE * setup.seconds or counted().is_steady

    while not enough(time.perf_counter() - start):
        for who in random.sample(list(calls), len(calls)):
            timed = calls[who]
            timed.before()
            gc.collect(0)
            gc.disable()
            if once:
                trim_heap()
            try:
                seconds[who].append(clock(timed) / timed.number)
            finally:
                gc.enable()
            timed.after()
        n += 1
    return counted()


def _cpu(timed: Timed) -> float:
    """Return the CPU seconds of the process."""
    start = time.process_time()
    for _ in range(timed.number):
        timed.call()
    return time.process_time() - start


def _events(timed: Timed) -> float:
    """Return the seconds between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(timed.number):
        timed.call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def allocations(call: Call) -> list[int]:
    """Return the bytes that torch's CPU allocator handed out (positive) and took back (negative), in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        result = call()
    del result
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def peak(timed: Timed, setup: Setup) -> int:
    """Return how many bytes the call adds at most to what was allocated before. Only torch's allocator is seen."""
    timed.before()
    if setup.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        timed.call()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated() - start
    else:
        highest = now = 0
        for n in allocations(timed.call):
            now += n
            highest = max(highest, now)
    timed.after()
    return highest


def saved(call: Call, model: nn.Module) -> int:
    """Return the bytes that the graph of a call keeps for its backward, every storage once, without the model's own."""
    parameters = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # the tensors too, so that no address is used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def process_growth(prepare: Callable[..., Call], *args: object) -> float:
    """Return the MiB by which a fresh process grows at its peak while it runs the call that prepare(*args) returns."""
    return in_fresh_process(_measure_growth, prepare, args)


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Return what the function returns in a fresh process, which has imported what we import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.table"])
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def _measure_growth(prepare: Callable[..., Call], args: tuple[Any, ...]) -> float:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return growth_during(prepare(*args))


def growth_during(call: Call) -> float:
    """Return the MiB by which the resident set of this process grows at its peak during the call."""
    gc.collect()
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1024


def trim_heap() -> None:
    """Give freed memory back to the system (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Return a field of /proc/self/status in KiB."""
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)
    )


def profile_excess(ours: Timed, base: Timed, setup: Setup) -> str:
    """Return the operators that take the time that ours needs beyond the base, as text.

    The figures are medians of several calls under torch's profiler, which knows wall time alone.
    """
    times = 3 if setup.quick else 7
    spent: tuple[list[Counter[str]], list[Counter[str]]] = ([], [])
    for _ in range(times):
        for timed, counts in zip((ours, base), spent, strict=True):
            timed.before()
            with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.cuda else [])]) as p:
                timed.call()
            timed.after()
            counted: Counter[str] = Counter()
            for e in p.key_averages():
                counted[MATRIX.get(e.key, e.key)] += (
                    e.self_device_time_total if setup.cuda else e.self_cpu_time_total
                ) / 1e3
            counts.append(counted)
    keys = set().union(*spent[0], *spent[1])
    more = {
        key: statistics.median(c[key] for c in spent[0]) - statistics.median(c[key] for c in spent[1]) for key in keys
    }
    whole, top = sum(more.values()), sorted(more.items(), key=lambda item: -item[1])[:5]
    if whole <= 0:
        return "the profiler saw nothing beyond the base in the noise of the machine"
    return f"of {whole:.2g} ms in operators beyond the base: " + ", ".join(
        f"{key.removeprefix('aten::')} {ms:+.2g} ms" for key, ms in top
    )


def profile_functions(timed: Timed, times: int = 3) -> str:
    """Return the functions in which the call spends its CPU time by cProfile, as text."""
    profiler = cProfile.Profile(time.process_time)
    for _ in range(times):
        timed.before()
        profiler.enable()
        timed.call()
        profiler.disable()
        timed.after()
    stats: dict[tuple[str, int, str], tuple[Any, ...]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    whole = sum(s[2] for s in stats.values())
    top = sorted(stats.items(), key=lambda item: -item[1][2])[:5]
    return ", ".join(f"{_named(*function)} {s[2] / whole:.0%}" for function, s in top)


def _named(file: str, line: int, name: str) -> str:
    """Return a readable name: <method 'copy_' of 'torch._C.TensorBase' objects> is TensorBase.copy_."""
    if match := re.fullmatch(r"<method '(\w+)' of '([\w.]+)' objects>", name):
        return f"{match[2].rpartition('.')[2]}.{match[1]}"
    return name.strip("<>").removeprefix("built-in method ") if name.startswith("<") else f"{name} ({Path(file).name})"

"""Any sequence of verbs, contexts, copies and changes of a model, against a dense twin (tests/support/dense_twin.py).

Hypothesis draws a model and a sequence of rules. Each rule changes the model by the library, and the books of the twin
by what the documentation says. After each rule, in every caller that lives, the output of the model is that of the
twin, and so are the gradients; the base weights have their bits, the state dict its keys, and exactly the active
adapters train. What is documented to be refused raises a LoraError and changes nothing.

    scripts/test -m long -k any_sequence --hypothesis-profile=fresh        ten minutes of other sequences
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import io
import itertools
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorainject as li

from callers import Caller, Generator, Task, Thread
from dense_twin import ARCHITECTURES, ROWS, DenseTwin, Factors, RowNames, Slot, call, loss_of
from example_count import examples
from interrupts import CALLS, interrupted
from models import bits, state

NAMES = ("fr", "de", "es")
SCALES = st.sampled_from([0.25, 1.0, 3.0])


@dataclass(eq=False)
class Context:
    """A context of the library that a caller has open."""

    model: nn.Module
    opener: Caller
    groups: frozenset[int]
    """The groups of layers that it acts on: those of the model when it was opened."""
    rows: RowNames
    is_rows: bool
    manager: contextlib.AbstractContextManager[None]
    has_ended: bool = False


@dataclass
class File:
    """A saved adapter."""

    path: Path
    name: str
    factors: dict[Slot, Factors]
    base: dict[str, bytes | str]
    """The bits of the weights that the adapter is for."""


@dataclass
class Pending:
    """A forward whose backward has not run yet."""

    loss: Tensor
    gradients: dict[str, Tensor]
    trained: frozenset[str]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of the base, each under all of its names."""
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: t for name, t in tensors if ".lora" not in name}


def pickled(model: nn.Module) -> nn.Module:
    """Return a copy through torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


class AnySequence(RuleBasedStateMachine):
    """An adapted model beside its dense twin."""

    architecture = "layers"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.main = Caller()
        self.callers: list[Caller] = [self.main]
        self.open_contexts: list[Context] = []
        self.files: list[File] = []
        self.remembered: list[tuple[dict[str, Tensor], dict[str, dict[Slot, Factors]]]] = []
        self.is_root = True
        """False in a copy by torch.save, in which a replaced module is not missed."""
        self.copied: set[int] = set()
        """Groups of layers that are a copy of a part of the model, in which a replaced module is not missed."""
        self.reversible = True
        self.pending: Pending | None = None

    def teardown(self) -> None:
        for caller in reversed(self.callers):
            caller.close()
        self.loop.close()
        self.folder.cleanup()

    @initialize(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
                seed=st.integers(0, 99))  # fmt: skip
    def start(self, data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
        """Begin with two adapters, and with one caller of each kind."""
        torch.manual_seed(seed)
        kind = ARCHITECTURES[self.architecture]
        self.kind = kind
        self.model = kind.build().to(dtype).train(seed % 2 == 0)
        self.tolerance = kind.tolerance if dtype == torch.float64 else 3e-4
        for name, p in self.model.named_parameters():
            p.requires_grad_(len(name) * seed % 3 > 0)
        self.flags = {name: t.requires_grad for name, t in base_tensors(self.model).items()}
        self.twin = DenseTwin(self.model, kind.slots)
        self.keys = list(self.model.state_dict())
        self.base = self.bits_of_base()
        for name in NAMES[:2]:
            self.inject_drawn(data, name)
        self.callers += [Thread(self.main), Task(self.main, self.loop), Generator(self.main)]

    # What is drawn

    def name(self, data: st.DataObject) -> str:
        """Draw a name, more often that of an adapter."""
        return data.draw(st.sampled_from([*self.twin.adapters, *self.twin.adapters, *NAMES]), label="name")

    def slots_of(self, data: st.DataObject, slots: Sequence[Slot]) -> list[Slot]:
        chosen: list[Slot] = []
        for slot in data.draw(st.lists(st.sampled_from(slots), min_size=1, max_size=3), label="slots"):
            if not any(slot.overlaps(other) for other in chosen):
                chosen.append(slot)
        return chosen

    def some_names(self, data: st.DataObject, min_size: int = 0) -> tuple[str, ...]:
        known = sorted(self.twin.adapters) or ["fr"]
        names = data.draw(st.lists(st.sampled_from(known), min_size=min_size, unique=True), label="names")
        return tuple(names)

    def interrupt(self, data: st.DataObject, verb: Callable[..., object]) -> tuple[str, int] | None:
        if data.draw(st.sampled_from([False, False, True]), label="interrupt"):
            return data.draw(st.tuples(st.sampled_from(CALLS[verb]), st.integers(0, 6)))
        return None

    def caller(self, data: st.DataObject) -> Caller:
        weighted = [self.main, *self.callers[1:], *self.callers[1:]]
        return weighted[data.draw(st.integers(0, len(weighted) - 1), label="caller")]

    # What the state allows

    def newest(self, caller: Caller, group: int) -> Context | None:
        """Return the context that decides for the caller in a group of layers."""
        for context in reversed(caller.contexts):
            is_running = context.opener.generator in (None, caller.generator)
            if context.model is self.model and group in context.groups and is_running and not context.has_ended:
                return context
        return None

    @property
    def groups(self) -> set[int]:
        """The groups of layers in the model."""
        return {self.twin.groups[slot.child] for slot, _, _ in self.twin.sites()}

    def is_inside(self, caller: Caller) -> bool:
        """True if the caller has a context open."""
        return any(self.newest(caller, group) is not None for group in self.groups)

    def cannot(
        self, *names: str, merged: bool = False, nested: bool = False, lost: bool = False, none: bool = False
    ) -> bool:
        """True if a verb in the main thread is refused. The arguments are what the verb allows, and what it needs."""
        return bool(
            (self.twin.merged and not merged)
            or (self.twin.lost and not lost)
            or (self.is_inside(self.main) and not nested)
            or (not none and not self.groups)
            or set(names) - {name for _, name, _ in self.twin.sites()}
        )  # fmt: skip

    def in_use(self, *names: str) -> bool:
        """True if a verb is refused because any caller has a context open in this model: one that uses any of these
        adapters, or, without names, any context at all."""
        here = (c for c in self.open_contexts if c.model is self.model and c.groups & self.groups)
        return any(not names or any(name in row for row in c.rows for name in names) for c in here)

    def strengths(self, data: st.DataObject, names: Sequence[str]) -> dict[str, float]:
        """Draw a strength for each adapter; often 1 each."""
        if data.draw(st.booleans(), label="at strength 1"):
            return dict.fromkeys(names, 1.0)
        return {name: data.draw(st.sampled_from([0.0, 0.5, -1.5, 1.0]), label="strength") for name in names}

    # How a verb is called

    def attempt(self, verb: Callable[[], object], refused: bool | None, interrupt: tuple[str, int] | None = None,
                finish: bool = False, caller: Caller | None = None) -> bool:  # fmt: skip
        """Call a verb, and return True if it has acted.

        Args:
            verb: The verb.
            refused: True if the documentation says that it raises a LoraError; None if both are right.
            interrupt: Where it is interrupted.
            finish: True if the next call of the verb finishes one that was interrupted; otherwise the interrupted verb
                changes nothing.
            caller: Who calls it.
        """
        self.pending = None
        before = state(self.model)
        run = self.main.run if caller is None else caller.run
        try:
            with interrupted(*interrupt) if interrupt else contextlib.nullcontext():
                run(verb)
        except KeyboardInterrupt:
            if finish:
                self.attempt(verb, refused or None, caller=caller)  # refused if the interrupt came after the last step
                return not refused
            assert state(self.model) == before
            return False
        except li.LoraError:
            if refused is False:
                raise
            assert state(self.model) == before
            return False
        assert not refused, "the verb was not refused"
        return True

    def drawn(self, name: str, slots: Sequence[Slot], scales: dict[Slot, float]) -> dict[Slot, Factors]:
        """Give A and B of a new adapter random values, and return them."""
        factors = {}
        for slot in slots:
            A, B = (self.model.get_parameter(f"{slot.child}.{name}.{letter}") for letter in "AB")
            assert not B.any()
            with torch.no_grad():
                B.normal_(std=0.5)
            factors[slot] = Factors(A, B, scales[slot]).copied()
        return factors

    # Verbs

    @rule(data=st.data())
    def inject(self, data: st.DataObject) -> None:
        free = [name for name in NAMES if name not in self.twin.adapters]
        self.inject_drawn(data, data.draw(st.sampled_from([*free, *free, *NAMES])), self.interrupt(data, li.inject))

    def inject_drawn(self, data: st.DataObject, name: str, interrupt: tuple[str, int] | None = None) -> None:
        slots = self.slots_of(data, self.twin.slots)
        r, other = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)), label="ranks")
        alpha, scaling = data.draw(st.tuples(st.none() | SCALES, st.sampled_from(["standard", "rslora"])))
        overrides = {} if slots[0].label else {slots[0].target: {"r": other}}
        ranks = {slot: other if slot is slots[0] and overrides else r for slot in slots}
        scales = {s: (k if alpha is None else alpha) / (k**0.5 if scaling == "rslora" else k) for s, k in ranks.items()}

        def verb() -> None:
            targets = [slot.target for slot in slots]
            li.inject(self.model, targets, r, name=name, alpha=alpha, scaling=scaling, overrides=overrides)

        if self.attempt(verb, self.cannot(none=True) or name in self.twin.adapters, interrupt):
            y, before = call(self.model), self.output_of(({},) * ROWS)
            assert self.is_close(y, before), "a fresh adapter changes the output"
            self.twin.add(name, self.drawn(name, slots, scales))

    @rule(data=st.data(), all_of_them=st.sampled_from([False, False, True]))
    def eject(self, data: st.DataObject, all_of_them: bool) -> None:
        name = None if all_of_them else self.name(data)
        if name is None:
            refused = self.cannot(merged=True, lost=True) and not (self.twin.lost and not self.groups)
        else:
            refused = self.cannot(name, merged=True) or (bool(self.twin.merged) and not self.reversible)
        gone = [name] if name is not None else list(self.twin.adapters)
        refused = refused or (bool(gone) and self.in_use(*gone))
        if self.attempt(lambda: li.eject(self.model, name), refused, self.interrupt(data, li.eject), finish=True):
            if self.twin.merged and not self.reversible:
                self.keep_merge()
            self.twin.merged, self.reversible = {}, True
            for adapter in gone:
                self.twin.remove(adapter)
            if name is None:
                self.twin.lost = set()

    def keep_merge(self) -> None:
        """Make the merged weights the base."""
        values = dict(self.model.named_parameters(remove_duplicate=False))
        for name in self.twin.weights(lambda group: {}):
            self.twin.set_weight(name, values[name])
        self.base = self.bits_of_base()

    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names, pending = self.strengths(data, self.some_names(data)), self.pending
        if self.attempt(lambda: li.activate(self.model, names), self.cannot(*names)):
            if {*names} <= {*self.twin.default}:  # a checkpointed region would also train what was thawed since
                self.pending = pending
            self.twin.default = names

    @rule(data=st.data(), untie=st.booleans(), reversible=st.sampled_from([True, True, True, False]))
    def merge(self, data: st.DataObject, untie: bool, reversible: bool) -> None:
        twin = self.twin
        names: Any = None if data.draw(st.booleans()) else self.some_names(data, 1)
        used = dict(twin.default) if names is None else {name: twin.default.get(name, 1.0) for name in names}
        if names is not None and data.draw(st.booleans(), label="by strengths"):
            names = used = self.strengths(data, names)
        chosen = {*used}
        refused: bool | None = (
            self.cannot(*names or (), merged=True)
            or self.in_use()
            or not chosen
            or bool(set(twin.merged) & chosen)
            or (bool(twin.merged) and (names is None or not self.reversible))
            or (not twin.merged and not set(twin.default) <= chosen)
        )
        tied = twin.tied()
        if not refused and not untie and any(slot.weight in tied for slot, name, _ in twin.sites() if name in chosen):
            refused = None if twin.merged else True
        # With reversible=False an interrupt waits for the end of the merge.
        interrupt = self.interrupt(data, li.merge) if reversible else None
        if self.attempt(lambda: li.merge(self.model, names, untie=untie, reversible=reversible), refused, interrupt):
            twin.merged = twin.merged | used
            self.reversible = reversible

    @rule(data=st.data(), all_of_them=st.booleans())
    def unmerge(self, data: st.DataObject, all_of_them: bool) -> None:
        names = None if all_of_them else self.some_names(data, 1)
        twin = self.twin
        removed = set(twin.merged if names is None else names)
        refused = self.cannot(merged=True) or self.in_use() or not twin.merged
        refused = refused or not removed <= {*twin.merged} or not self.reversible
        interrupt = self.interrupt(data, li.unmerge)
        if self.attempt(lambda: li.unmerge(self.model, names), refused, interrupt, finish=True):
            twin.merged = {name: t for name, t in twin.merged.items() if name not in removed}
            if twin.merged:
                twin.default = {name: t for name, t in twin.default.items() if name not in removed}

    @rule(data=st.data(), untie=st.booleans())
    def visit_merged(self, data: st.DataObject, untie: bool) -> None:
        """Merge exactly these adapters for the time of a context, and look inside."""
        twin = self.twin
        used = self.strengths(data, self.some_names(data, 1))
        tied = twin.tied()
        refused = (
            self.cannot(*used, merged=True)
            or self.in_use()
            or not self.reversible
            or (not untie and any(slot.weight in tied for slot, name, _ in twin.sites() if name in used))
        )
        manager, before = li.merged(self.model, used, untie=untie), twin.merged
        if self.attempt(manager.__enter__, refused):
            twin.merged = used
            self.every_caller_has_its_choice()
            self.the_base_is_untouched()
            self.main.run(lambda: manager.__exit__(None, None, None))
            twin.merged = before

    @rule(data=st.data(), is_file=st.booleans())
    def save(self, data: st.DataObject, is_file: bool) -> None:
        name = self.name(data)
        path = Path(self.folder.name) / f"{len(self.files)}{'.safetensors' * is_file}"
        refused = self.cannot(name, merged=True, nested=True, lost=True)
        if self.attempt(lambda: li.save(self.model, path, name), refused):
            factors = {slot: f.copied() for slot, other, f in self.twin.sites() if other == name}
            self.files.append(File(path, name, factors, {slot.weight: self.base[slot.weight] for slot in factors}))

    @precondition(lambda self: self.files)
    @rule(data=st.data(), own_name=st.booleans())
    def load(self, data: st.DataObject, own_name: bool) -> None:
        file = data.draw(st.sampled_from(self.files), label="file")
        name = file.name if own_name else data.draw(st.sampled_from(NAMES))
        refused = self.cannot(none=True) or name in self.twin.adapters
        same_base = all(self.base[weight] == old for weight, old in file.base.items())
        argument = None if own_name else name
        if self.attempt(lambda: li.load(self.model, file.path, argument, check_base=same_base), refused):
            self.twin.add(name, {slot: f.copied() for slot, f in file.factors.items()})

    @precondition(lambda self: self.files and self.twin.adapters)
    @rule(data=st.data())
    def hotswap(self, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(self.files), label="file")
        name = data.draw(st.sampled_from(sorted(self.twin.adapters)))
        own = {slot: f for slot, other, f in self.twin.sites() if other == name}
        has_room = all(s in own and f.A.shape[-2] <= own[s].A.shape[-2] for s, f in file.factors.items())
        same_base = all(self.base[weight] == old for weight, old in file.base.items())
        refused = self.cannot(name) or not has_room
        if self.attempt(lambda: li.hotswap(self.model, file.path, name, check_base=same_base), refused):
            for slot, f in own.items():
                new = file.factors.get(slot)
                if new is None:
                    own[slot].B.data.zero_()
                else:
                    missing = f.A.shape[-2] - new.A.shape[-2]
                    A = nn.functional.pad(new.A, (0, 0, 0, missing))
                    self.twin.adapters[name][slot] = Factors(A, nn.functional.pad(new.B, (0, missing)), new.s).copied()

    @rule(data=st.data(), s=SCALES)
    def rescale(self, data: st.DataObject, s: float) -> None:
        name = self.name(data)
        if self.attempt(lambda: li.rescale(self.model, name, scale=s), self.cannot(name)):
            for f in self.twin.adapters[name].values():
                f.s = s

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        name = self.name(data)
        if self.attempt(lambda: li.reset(self.model, name), self.cannot(name)):
            scales = {slot: f.s for slot, f in self.twin.adapters[name].items()}
            self.twin.adapters[name] = self.drawn(name, list(scales), scales)

    @rule(rate=st.sampled_from([0.01, 0.1]))
    def step(self, rate: float) -> None:
        """A step of an optimizer over the active adapters, with the choice of the main thread."""
        twin = self.twin
        if self.refuses_rows(self.main):
            return
        trains = [name for name in twin.default if any(name == other for _, other, _ in twin.sites())]
        refused = self.cannot(*twin.default, nested=True) or not trains
        parameters: list[nn.Parameter] = []
        if not self.attempt(lambda: parameters.extend(li.parameters(self.model)), refused):
            return
        gradients = twin.gradients(self.output_of(self.main))
        norm = 1 + sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        optimizer = torch.optim.SGD(parameters, lr=rate / norm)
        optimizer.zero_grad()
        loss = loss_of(call(self.model))
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for slot, name, f in twin.sites():
            for letter, t in (("A", f.A), ("B", f.B)):
                key = f"{slot.child}.{name}.{letter}"
                p = self.model.get_parameter(key).detach()
                with torch.no_grad():
                    t -= gradients.get(key, torch.zeros_like(t)) * rate / norm
                    assert self.is_close(p, t), f"{key} after a step"
                    t.copy_(p)

    # Contexts and callers

    @precondition(lambda self: len(self.callers) < 5)
    @rule(data=st.data(), kind=st.sampled_from(["thread", "thread with contexts", "task", "generator"]))
    def begin(self, data: st.DataObject, kind: str) -> None:
        starters = [c for c in self.callers if type(c) is Caller or (type(c) is Task and kind == "generator")]
        starter = data.draw(st.sampled_from(starters))
        if kind.startswith("thread"):
            self.callers.append(Thread(starter, inherits=kind != "thread"))
        else:
            self.callers.append(Task(starter, self.loop) if kind == "task" else Generator(starter))

    @precondition(lambda self: len(self.callers) > 1)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from(self.callers[1:]))
        if not any(isinstance(c, Generator) and c.starter is caller for c in self.callers):
            for context in [c for c in self.open_contexts if c.opener is caller]:
                self.close_context(context, caller)
            caller.close()
            self.callers.remove(caller)

    @rule(data=st.data(), verb=st.sampled_from(["using", "disabled", "rows"]))
    def open(self, data: st.DataObject, verb: str) -> None:
        caller, names = self.caller(data), self.some_names(data)
        used = {} if verb == "disabled" else self.strengths(data, names)
        rows: RowNames = (used,) * ROWS
        if verb == "rows":
            row = st.none() | st.sampled_from(sorted(self.twin.adapters) or ["fr"])
            drawn = data.draw(st.lists(row, min_size=ROWS, max_size=ROWS), label="rows")
            rows = tuple({} if name is None else self.strengths(data, [name]) for name in drawn)
            manager = li.rows(self.model, [next(iter(row.items()), None) for row in rows])
        else:
            manager = li.using(self.model, used) if verb == "using" else li.disabled(self.model)
        refused, pending = self.cannot(*{name for row in rows for name in row}, nested=True), self.pending
        if self.attempt(manager.__enter__, refused, caller=caller):
            context = Context(self.model, caller, frozenset(self.groups), rows, verb == "rows", manager)
            caller.contexts.append(context)
            self.open_contexts.append(context)
        self.pending = pending

    @rule(data=st.data(), verb=st.sampled_from(["using", "disabled", "rows"]))
    def visit(self, data: st.DataObject, verb: str) -> None:
        """Open a context, look, and close it again."""
        before = len(self.open_contexts)
        self.open(data, verb)
        for context in self.open_contexts[before:]:
            self.every_caller_has_its_choice()
            self.close_context(context, context.opener)

    @precondition(lambda self: self.open_contexts)
    @rule(data=st.data(), elsewhere=st.booleans())
    def close(self, data: st.DataObject, elsewhere: bool) -> None:
        context = data.draw(st.sampled_from(self.open_contexts))
        self.close_context(context, self.caller(data) if elsewhere else context.opener)

    def close_context(self, context: Context, caller: Caller) -> None:
        caller.run(lambda: context.manager.__exit__(None, None, None))
        self.open_contexts.remove(context)
        context.has_ended = caller.contexts is not context.opener.contexts  # then it has ended for everybody
        if context in caller.contexts:
            caller.contexts.remove(context)

    def rows_of(self, caller: Caller, group: int) -> RowNames:
        """Return the adapters of each row for a caller in a group of layers."""
        context = self.newest(caller, group)
        return (self.twin.default,) * ROWS if context is None else context.rows

    def output_of(self, who: Caller | RowNames) -> Tensor:
        """Return the twin's output for a caller, or for rows."""
        return self.twin.output(lambda group: self.rows_of(who, group) if isinstance(who, Caller) else who)

    def refuses_rows(self, caller: Caller) -> bool:
        """True if a forward of the caller is refused, because a weight with its adapters is read by other code."""
        return not self.twin.merged and any(
            slot.read and (c := self.newest(caller, self.twin.groups[slot.child])) is not None and c.is_rows
            and any(name in row for row in c.rows) for slot, name, _ in self.twin.sites()
        )  # fmt: skip

    # A backward after something else

    @rule(data=st.data(), kind=st.sampled_from(["plain", "reentrant", "not reentrant"]))
    def forward(self, data: st.DataObject, kind: str) -> None:
        """Run a forward with gradients, perhaps as a checkpointed region. Its backward comes later."""
        caller = self.caller(data)
        if self.refuses_rows(caller):
            return

        def run() -> Tensor:
            if kind == "plain":
                return call(self.model)
            x = torch.zeros((), requires_grad=True)
            return checkpoint(lambda x: call(self.model) + 0 * x, x, use_reentrant=kind == "reentrant")  # type: ignore[no-any-return]

        loss = loss_of(caller.run(run))
        expected = self.twin.gradients(self.output_of(caller))
        trained = frozenset(name.split(".")[-2] for name in expected)
        self.pending = Pending(loss, expected, trained) if loss.requires_grad else None

    @precondition(lambda self: self.pending is not None)
    @rule(data=st.data())
    def backward(self, data: st.DataObject) -> None:
        """Run the backward of an earlier forward, in any caller and within any contexts."""
        self.backward_in(self.caller(data))

    @rule(data=st.data(), kind=st.sampled_from(["plain", "reentrant", "not reentrant"]),
          verb=st.sampled_from(["using", "disabled", "rows"]))  # fmt: skip
    def backward_within_a_context(self, data: st.DataObject, kind: str, verb: str) -> None:
        """Run a forward, and its backward within a context that is opened in between."""
        self.forward(data, kind)
        before = len(self.open_contexts)
        self.open(data, verb)
        for context in self.open_contexts[before:]:
            if self.pending is not None:
                self.backward_in(context.opener)
            self.close_context(context, context.opener)

    def backward_in(self, caller: Caller) -> None:
        pending, self.pending = self.pending, None
        assert pending is not None
        self.model.zero_grad()
        try:
            caller.run(pending.loss.backward)
        except li.StateError:
            assert not pending.trained <= {*self.twin.default}, "no gradient would have been lost"
        else:
            assert pending.trained <= {*self.twin.default}, "a gradient was lost in silence"
            parameters = ((n, p) for n, p in self.model.named_parameters() if ".lora" in n)
            grads = {name: p.grad for name, p in parameters if p.grad is not None}
            self.compare_gradients(grads, pending.gradients)
        self.model.zero_grad()

    # Changes of the model

    @rule(is_pickle=st.booleans())
    def go_on_with_a_copy(self, is_pickle: bool) -> None:
        is_pickle = is_pickle and not self.twin.lost  # a pickle does not know what its model has lost
        old, self.pending = self.model, None
        self.model = pickled(old) if is_pickle else copy.deepcopy(old)
        self.is_root = self.is_root and not is_pickle
        assert not {p.data_ptr() for p in old.parameters()} & {p.data_ptr() for p in self.model.parameters()}

    @precondition(lambda self: not self.twin.lost and self.is_root and not self.twin.merged and self.groups)
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        """Replace an adapted linear layer by a new one."""
        slots = {s.name: s for s, _, _ in self.twin.sites() if self.twin.groups[s.child] not in self.copied}
        modules = dict(self.twin.plain.named_modules())
        linear = [
            p for p, s in sorted(slots.items()) if type(modules.get(p)) is nn.Linear and len(self.twin.paths(s)) == 1
        ]
        if linear:
            path = data.draw(st.sampled_from(linear))
            old = self.model.get_submodule(path)
            new = nn.Linear(old.in_features, old.out_features, old.bias is not None)
            self.model.set_submodule(path, new.to(old.weight.dtype).requires_grad_(False))
            self.twin.plain.set_submodule(path, copy.deepcopy(new).double())
            self.pending = None
            self.twin.lost = {
                s for s in self.twin.slots if s.name == path for f in self.twin.adapters.values() if s in f
            }
            self.flags |= {f"{path}.{name}": False for name, _ in new.named_parameters()}
            self.base = self.bits_of_base()

    @precondition(lambda self: self.kind.layers and len(self.twin.plain.get_submodule(self.kind.layers)) < 4)
    @rule()
    def append(self) -> None:
        """Append a copy of the first layer to the list of layers."""
        path = self.kind.layers
        for model in (self.model, self.twin.plain):
            layers: Any = model.get_submodule(path)
            layers.append(copy.deepcopy(layers[0]))
        first, new = f"{path}.0.", f"{path}.{len(layers) - 1}."
        self.pending, group = None, next(self.twin.numbers)
        self.copied.add(group)
        for slot in [s for s in self.twin.slots if s.weight.startswith(first)]:
            moved = slot.moved(first, new)
            self.twin.slots.append(moved)
            if slot.child in self.twin.groups and slot not in self.twin.lost:
                self.twin.groups[moved.child] = group
                for factors in self.twin.adapters.values():
                    if slot in factors:
                        factors[moved] = factors[slot].copied()
        self.flags |= {name.replace(first, new): flag for name, flag in self.flags.items() if name.startswith(first)}
        keys = [k for k in self.model.state_dict() if ".lora" not in k]
        assert {*keys} - {*self.keys} == {k.replace(first, new) for k in self.keys if k.startswith(first)}
        self.keys = keys
        self.base |= {name.replace(first, new): b for name, b in self.base.items() if name.startswith(first)}

    @precondition(lambda self: not self.twin.merged and not self.twin.lost)
    @rule()
    def remember(self) -> None:
        """Keep a state dict for later."""
        values = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        adapters = {name: {slot: f.copied() for slot, f in fs.items()} for name, fs in self.twin.adapters.items()}
        self.remembered.append((values, adapters))

    @precondition(lambda self: self.remembered and not self.twin.lost)
    @rule(data=st.data())
    def load_state_dict(self, data: st.DataObject) -> None:
        """Load a state dict from before. One that does not fit is tried on a copy, since torch loads what fits."""
        values, adapters = data.draw(st.sampled_from(self.remembered))
        shapes = {(slot, name, f.A.shape, f.s) for name, fs in adapters.items() for slot, f in fs.items()}
        now = {(slot, name, f.A.shape, f.s) for slot, name, f in self.twin.sites()}
        fits = (
            {k for k in values if ".lora" not in k} == {*self.keys} and shapes in (now, set()) and not self.twin.merged
        )
        if not fits:
            with pytest.raises(RuntimeError):
                copy.deepcopy(self.model).load_state_dict(values)
            return
        self.pending = None
        self.model.load_state_dict(values)
        for name, p in self.twin.plain.named_parameters(remove_duplicate=False):
            p.data.copy_(self.model.get_parameter(name))
        for name, factors in adapters.items():
            for slot, f in factors.items():
                self.twin.adapters[name][slot] = f.copied()
        self.base = self.bits_of_base()

    # What holds at any time

    def is_close(self, a: Tensor, b: Tensor) -> bool:
        scale = 1 + float(b.detach().abs().max())
        return float((a.detach().double() - b.detach()).abs().max()) <= self.tolerance * scale

    def bits_of_base(self) -> dict[str, bytes | str]:
        return {name: bits(t) for name, t in base_tensors(self.model).items()}

    def compare_gradients(self, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
        assert got.keys() == want.keys()
        largest = max((float(g.abs().max()) for g in want.values()), default=0.0)
        for name, g in want.items():
            assert float((got[name].double() - g).abs().max()) <= 10 * self.tolerance * (1 + largest), name

    @invariant()
    def every_caller_has_its_choice(self) -> None:
        """Output and gradients without any context, and the output of every caller, of the threads at the same time."""
        self.twin.outputs = {}
        self.compare_with_gradients(Caller(), contextvars.Context().run)
        if self.is_inside(self.main) and not self.refuses_rows(self.main):
            self.compare_with_gradients(self.main, self.main.run)
        threads = [c for c in self.callers if isinstance(c, Thread)]
        barrier = threading.Barrier(len(threads) + 1)
        expected = {c: self.output_of(c).detach() for c in self.callers}

        def run(waits: bool) -> Tensor | li.LoraError:
            if waits:
                barrier.wait(60)
            try:
                with torch.no_grad():
                    return call(self.model)
            except li.LoraError as e:
                return e

        futures = {c: c.executor.submit(c.variables.run, run, True) for c in threads}
        outputs = {self.main: run(True)} | {c: future.result() for c, future in futures.items()}
        outputs |= {c: c.run(lambda: run(False)) for c in self.callers if c not in outputs}
        for caller, y in outputs.items():
            if self.refuses_rows(caller):
                assert isinstance(y, li.StateError), "rows reached a weight that other code reads"
            else:
                assert isinstance(y, Tensor), str(y)
                assert self.is_close(y, expected[caller]), f"output in a {type(caller).__name__}"

        self.twin.outputs = {}

    def compare_with_gradients(self, caller: Caller, run: Callable[[Callable[[], Tensor]], Tensor]) -> None:
        y, expected = run(lambda: call(self.model)), self.output_of(caller)
        assert self.is_close(y, expected), "output"
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad and ".lora" in n}
        grads: tuple[Any, ...] = (None,) * len(trained)
        if trained and y.requires_grad:
            grads = torch.autograd.grad(loss_of(y), list(trained.values()), allow_unused=True)
        found = {name: g for name, g in zip(trained, grads, strict=True) if g is not None}
        self.compare_gradients(found, self.twin.gradients(expected))

    @invariant()
    def the_base_is_untouched(self) -> None:
        """Bits, keys and flags of the base. While merged, every other weight has its bits."""
        merged = {slot.weight for slot, name, _ in self.twin.sites() if name in self.twin.merged}
        paths: dict[int, set[str]] = {}
        for name, t in base_tensors(self.model).items():
            paths.setdefault(id(t), set()).add(name)
        written = {other for names in paths.values() if names & merged for other in names}
        base = self.bits_of_base()
        assert {k: v for k, v in base.items() if k not in written} == {
            k: v for k, v in self.base.items() if k not in written
        }
        keys = list(self.model.state_dict())
        assert [key for key in keys if ".lora" not in key] == self.keys
        sites = () if self.twin.merged else self.twin.sites()
        adapters = {
            f"{path}.{name}.{t}" for s, name, _ in sites for path in self.twin.paths(s) for t in ("A", "B", "s")
        }
        assert {key for key in keys if ".lora" in key} == adapters
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if ".lora" in name:
                assert p.requires_grad == (name.split(".")[-2] in self.twin.default), name
            else:
                assert p.requires_grad == (not self.twin.adapters and self.flags[name]), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "steps"), [(8, 25), pytest.param(90, 40, marks=pytest.mark.long)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_sequence_of_verbs_agrees_with_a_dense_twin(architecture, count, steps):
    """Laws 1 to 12: output, gradients, bits, keys and flags are the twin's after every rule of any sequence."""
    machine = type("AnySequence", (AnySequence,), {"architecture": architecture})
    health = list(HealthCheck)
    drawn = settings(
        max_examples=examples(count), stateful_step_count=steps, deadline=None, suppress_health_check=health
    )
    run_state_machine_as_test(machine, settings=drawn)

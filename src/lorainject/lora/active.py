"""Which adapters of a model are active: the model's default, and what a caller has chosen for itself.

All modules of a model refer to one `AdapterState`. It holds the default, which `activate` sets for every caller. The
contexts `using`, `disabled` and `rows` belong to their caller: they are kept in a context variable (contextvars), so
that every thread and every task of asyncio sees its own, and they may end in any order. Whoever needs to know which
adapters are active asks `AdapterState.choice`.

Three cases need more than a context variable:

**Generators** run in the contextvars context of whoever advances them, and of another caller for each item if need be
(web servers advance them in a pool of threads). A context that a generator opens would therefore stay open for its
caller between two items, or be lost at the second one. Such a context counts while the generator runs, and for nobody
else. A generator that serves as a context manager (contextlib) hands its contexts to the with statement.

**Gradient checkpointing** runs a forward again during the backward, when the caller may have chosen otherwise, or in a
thread that has no context. The second run takes the choice of the first one (checkpoint_region.py).

**torch.compile** cannot trace `ContextVar.get`, but it reads a property whose getter is written in C as an attribute,
and guards its value. `Contexts.callers` is such a property, so that compiled code makes the caller's choice as well.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from .checkpoint_region import (
    check_before_second_run,
    choices_in,
    region_being_run,
    region_being_run_again,
    regions_being_run,
)
from .guards import changed_forward, lost_gradient
from .kernels.per_row import RowAssignment
from .strength import Strengths


@dataclass(frozen=True)
class Choice:
    """The adapters that a forward uses."""

    active: tuple[str, ...] = ()
    """The adapters whose terms are added, in this order."""
    rows: RowAssignment | None = None
    """Which row of the batch uses which adapter. Overrides `active`."""
    strengths: Strengths = field(default_factory=Strengths, compare=False)
    """What the terms of the active adapters are multiplied with, in the same order (`choose`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters that the forward uses."""
        return self.active if self.rows is None else self.rows.used

    @property
    def by_name(self) -> dict[str, float]:
        """The strength of each active adapter."""
        return dict(zip(self.active, self.strengths, strict=True))


def choose(strengths: Mapping[str, float]) -> Choice:
    """Return the choice of adapters with these strengths."""
    return Choice(tuple(strengths), strengths=Strengths(strengths.values()))


@dataclass(eq=False)
class OpenContext:
    """A `using`, `disabled` or `rows` context that a caller has open."""

    states: tuple[AdapterState, ...]
    """The states for which the choice is made: one, unless the parts of the model were injected one by one."""
    choice: Choice
    verb: str
    """The name of the context, for messages."""
    generator: FrameType | None
    """The frame of the generator that opened the context; None if none did."""
    regions: tuple[object, ...]
    """The checkpointed regions in which the context was opened."""
    number: int = field(default_factory=itertools.count().__next__)
    """Contexts are counted in the order in which they were opened."""
    has_ended: bool = False
    """True if the context has ended in another thread or task than it began in."""

    @property
    def is_merge(self) -> bool:
        """True for a `merged` context, which makes no choice: the weights hold the adapters for every caller."""
        return self.verb == "merged"

    @property
    def counts(self) -> bool:
        """True unless the context has ended, or was opened by a generator that does not run now."""
        return not self.has_ended and (self.generator is None or self.generator.f_back is not None)


CONTEXTS: ContextVar[tuple[OpenContext, ...]] = ContextVar("lorainject.contexts")
"""The open contexts of the caller, the newest last. NO_CONTEXTS if there are none, or if it was never set."""


class Contexts(tuple[OpenContext, ...]):
    """Lets torch.compile read CONTEXTS: the getter of the property is a function in C, which is not traced."""

    callers = property(CONTEXTS.get)
    """The open contexts of the caller. `ContextVar.get` takes self as its default value."""


NO_CONTEXTS = Contexts()


ALL_CONTEXTS: set[OpenContext] = set()
"""The open contexts of everybody in the process."""
GENERATOR_CONTEXTS: set[OpenContext] = set()
"""The open contexts of all generators in the process. Forwards ask for these, and there are mostly none."""


def open_contexts() -> tuple[OpenContext, ...]:
    """Return the open contexts of the caller, the newest last: its own, and those of the generators on its stack."""
    contexts = CONTEXTS.get(NO_CONTEXTS)
    if not GENERATOR_CONTEXTS or not (others := GENERATOR_CONTEXTS - {*contexts}):
        return contexts
    frame: FrameType | None = sys._getframe(1)
    stack = set()
    while frame is not None:
        stack.add(frame)
        frame = frame.f_back
    others = {context for context in others if context.generator in stack}
    return tuple(sorted((*contexts, *others), key=lambda context: context.number)) if others else contexts


@dataclass(eq=False)
class AdapterState:
    """Which adapters of a model are active by default, and which are merged.

    The state belongs to the model, whatever thread uses it. It is copied and pickled along with the modules. Open
    contexts are not, because they belong to the caller.
    """

    default: Choice = field(default_factory=Choice)
    """The adapters that are active where the caller has not chosen otherwise."""
    merged: Mapping[str, float] = field(default_factory=dict)
    """The adapters that are merged into the weights, with their strengths. While there are any, every module has its
    original class."""
    revision: int = 0
    """How often adapters were taken off, rescaled, reset or swapped."""
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """For every adapter on the model, which adapters were active when it was added, with their strengths. `eject`
    activates them again."""
    root: weakref.ref[nn.Module] | None = None
    """The model that was injected. None in a pickle, and in a copy of a part."""
    members: dict[str, weakref.ref[Any]] = field(default_factory=dict)
    """The AdapterDict of every weight that was injected, by the name of the site. A module that was replaced since is
    missing in the model, and missed by its name."""
    loading: StateDictLoad | None = None
    """The latest call of load_state_dict."""

    structure: ModuleStructure | None = None
    """The modules of the model when it was last found to be complete."""

    def __post_init__(self) -> None:
        STATES.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        STATES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # The copies of the members register themselves (AdapterDict.__setstate__).
        return vars(self) | {"root": None, "loading": None, "members": {}, "structure": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterState:
        copy = memo[id(self)] = AdapterState()
        vars(copy).update(self.__getstate__())
        copy.before = dict(self.before)
        root = self.root and self.root()
        if root is not None and id(root) in memo:  # the whole model is being copied
            # Copied members take the places of these. What is missing in the model stays missing in its copy.
            copy.root, copy.members = weakref.ref(memo[id(root)]), dict(self.members)
        return copy

    def set_default(self, strengths: Mapping[str, float]) -> None:
        """Make adapters with these strengths the default, and let exactly their parameters require a gradient.

        An adapter that is not active gets no gradient, and DistributedDataParallel waits for the gradient of every
        parameter that requires one. Parameters that were frozen by hand stay frozen.
        """
        before, self.default = self.default.active, choose(strengths)
        changed = [(name, name in strengths) for name in {*before} ^ {*strengths}]
        for adapters in filter(None, (member() for member in self.members.values())):
            for name, trainable in changed:
                if name in adapters._modules:
                    adapters[name].set_trainable(trainable)

    @property
    def choice(self) -> Choice:
        """The choice that holds for the caller: that of the newest open context, or else the default."""
        if is_compiling():
            contexts: tuple[OpenContext, ...] = NO_CONTEXTS.callers
            return self.default if contexts is NO_CONTEXTS else self._choice_among(contexts)
        contexts = open_contexts()
        again, run = region_being_run_again(), region_being_run()
        if again is None and run is None:
            return self._choice_among(contexts) if contexts else self.default
        return self._choice_in_regions(contexts, again, run)

    def _choice_among(self, contexts: Sequence[OpenContext]) -> Choice:
        """Return the choice of the newest of these contexts that counts for this state, or else the default."""
        context = self.newest(contexts)
        return self.default if context is None else context.choice

    def newest(self, contexts: Sequence[OpenContext]) -> OpenContext | None:
        """Return the newest of these contexts that counts for this state; None if there is none."""
        for context in reversed(contexts):
            if self in context.states and context.counts and not context.is_merge:
                return context
        return None

    def _choice_in_regions(self, contexts: tuple[OpenContext, ...], again: object | None, run: object | None) -> Choice:
        """Return the choice within checkpointed regions.

        A region that runs for the first time notes the choice with which it began, and which of its adapters train.
        When it runs again, that choice takes the place of the contexts that are open then, unless they were opened
        within the region itself.

        Args:
            contexts: The open contexts of the caller.
            again: The region that is being run again, in a backward.
            run: The region that runs for the first time; in another one's second run if regions are nested.

        Raises:
            StateError: An adapter that trained in the first run was deactivated since.
        """
        noted, trained = (None, ()) if again is None else choices_in(again).get(self, (None, ()))
        if noted is not None:
            contexts = tuple(context for context in contexts if again in context.regions)
            if not set(trained) <= set(self.default.active):
                raise lost_gradient()

        def newest(contexts: Sequence[OpenContext]) -> Choice:
            context = self.newest(contexts)
            return context.choice if context is not None else noted or self.default

        if run is not None and self not in choices_in(run):
            for region in regions_being_run():
                first = newest([context for context in contexts if region not in context.regions])
                trained = [name for name in first.names if name in self.default.active]
                if choices_in(region).setdefault(self, (first, trained))[1] is trained:
                    check_before_second_run(region, partial(self._require_revision, self.revision))
        return newest(contexts)

    def _require_revision(self, revision: int) -> None:
        """Raise StateError if the adapters are merged, or not those of this revision any more."""
        if self.merged or self.revision != revision:
            raise changed_forward()


@contextmanager
def choosing(states: Sequence[AdapterState], choice: Choice, verb: str) -> Iterator[None]:
    """Make a choice for these states and for the caller within this context.

    Contexts may end in another order than they began. One that ends in another thread or task than it began in ends for
    everybody who sees it.
    """
    again = region_being_run_again()
    regions = () if again is None and region_being_run() is None else (again, *regions_being_run())
    context = OpenContext(tuple(states), choice, verb, _generator_frame(), regions)
    token = CONTEXTS.set((*CONTEXTS.get(NO_CONTEXTS), context))
    ALL_CONTEXTS.add(context)
    if context.generator is not None:
        GENERATOR_CONTEXTS.add(context)
    try:
        yield
    finally:
        ALL_CONTEXTS.discard(context)
        GENERATOR_CONTEXTS.discard(context)
        contexts = CONTEXTS.get(NO_CONTEXTS)
        try:
            CONTEXTS.reset(token)
        except ValueError:  # the token is of another thread or task
            context.has_ended = True
        CONTEXTS.set(tuple(c for c in contexts if c is not context and not c.has_ended) or NO_CONTEXTS)


def open_context(state: AdapterState) -> OpenContext | None:
    """Return the newest context that the caller has open for this state; None if there is none."""
    return state.newest(open_contexts())


def _generator_frame() -> FrameType | None:
    """Return the frame of the generator on whose behalf a context is opened now; None if there is none.

    Generators that contextlib runs as context managers are passed over: their contexts belong to the with statement.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        is_generator = frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)
        if is_generator and not (frame.f_back and frame.f_back.f_globals.get("__name__") == "contextlib"):
            return frame
        frame = frame.f_back
    return None


class ModuleStructure:
    """The children of every module of a model, by which a change of its modules is noticed without a walk.

    Args:
        modules: All modules of the model, without those of adapters.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.children = [(weakref.ref(m), tuple(map(id, m._modules.values()))) for m in modules]

    def is_current(self) -> bool:
        """True if no module was added, replaced or removed since."""
        for member, children in self.children:
            module = member()  # None if it was removed, so that no other module can have its id
            if module is None or tuple(map(id, module._modules.values())) != children:
                return False
        return True


STATES: weakref.WeakSet[AdapterState] = weakref.WeakSet()
"""The states of all models in the process, copies included."""
ROOTS: weakref.WeakKeyDictionary[nn.Module, AdapterState] = weakref.WeakKeyDictionary()
"""The state of every model that was injected as a whole."""


@dataclass
class StateDictLoad:
    """One call of load_state_dict. A checkpoint may have all keys of an adapter or none, but not some of them."""

    missing_keys: list[str]
    """torch's own list of missing keys, by whose identity one call is told from the next."""
    absent: list[str] = field(default_factory=list)
    """Keys of adapters that the checkpoint does not have, as long as it has none at all."""
    has_adapter_keys: bool = False
    """True once a key of an adapter was found."""

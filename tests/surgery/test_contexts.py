"""Law 11: which adapter is on belongs to the caller, whatever other threads, tasks and generators do."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

import lorainject as li
from lorainject.lora.active import GENERATOR_CONTEXTS
from lorainject.lora.model_index import ModelIndex

import moe_models
from models import bits, ids, llama, randomize

TARGETS = ["q_proj", "v_proj", "down_proj"]
X = ids(rows=3)
Choice = str | None | tuple[str | None, ...]
"""An adapter, None for the base, or one of these per row."""


def two_adapters(model: nn.Module, targets: Any = TARGETS) -> nn.Module:
    for seed, name in enumerate(("fr", "de")):
        li.inject(model, targets, r=4, name=name)
        randomize(model, name, seed=seed)
    li.activate(model, "fr")
    return model.eval()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return two_adapters(llama())


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(input_ids=X).logits


def expected(model: nn.Module) -> dict[Choice, Tensor]:
    """Return what each choice computes, alone in the process."""
    outputs: dict[Choice, Tensor] = {}
    for name in ("fr", "de", None):
        li.activate(model, *filter(None, [name]))
        outputs[name] = run(model)
    li.activate(model, "fr")
    outputs["fr", None, "de"] = torch.stack([outputs[name][i] for i, name in enumerate(("fr", None, "de"))])
    return outputs


def choosing(model: nn.Module, choice: Choice) -> contextlib.AbstractContextManager[None]:
    if isinstance(choice, tuple):
        return li.rows(model, choice)
    return li.disabled(model) if choice is None else li.using(model, choice)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


CHOICES: list[Choice] = ["fr", "de", None, ("fr", None, "de")]


def wrong_forwards(model: nn.Module, want: dict[Choice, Tensor], times: int = 12) -> list[Choice]:
    """Let four threads, each with a choice of its own, run the model at once; return the choices of wrong outputs."""
    wrong: list[Choice] = []
    barrier = threading.Barrier(len(CHOICES))

    def work(choice: Choice) -> None:
        for _ in range(times):
            barrier.wait()
            with choosing(model, choice):
                if not same(run(model), want[choice]):
                    wrong.append(choice)

    threads = [threading.Thread(target=work, args=(choice,)) for choice in CHOICES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_threads_make_their_separate_choices(model):
    """Four threads within using, disabled and rows each get what they chose, and the default is as before."""
    want = expected(model)
    assert wrong_forwards(model, want) == []
    assert same(run(model), want["fr"])


def test_threads_on_experts_make_their_separate_choices():
    """rows runs the experts of a mixture once per adapter, which no other thread sees."""
    torch.manual_seed(0)
    model = two_adapters(
        MixtralForCausalLM(MixtralConfig(**moe_models.SIZES, num_local_experts=8)), ["experts.gate_up_proj", "q_proj"]
    )
    assert wrong_forwards(model, expected(model)) == []


def test_activate_is_the_default_of_every_thread(model):
    """A thread without a context sees what another one activates; a thread within a context does not."""
    want = expected(model)
    seen: list[Tensor] = []
    with li.using(model, "fr"):
        thread = threading.Thread(target=lambda: (li.activate(model, "de"), seen.append(run(model))))
        thread.start()
        thread.join()
        assert same(run(model), want["fr"])
    assert same(seen[0], want["de"])
    assert same(run(model), want["de"])


def test_tasks_make_their_separate_choices(model):
    """Tasks of asyncio that wait within their contexts each get what they chose."""
    want = expected(model)

    async def work(choice: Choice) -> list[bool]:
        right = []
        for _ in range(3):
            with choosing(model, choice):
                await asyncio.sleep(0)
                right.append(same(run(model), want[choice]))
                await asyncio.sleep(0)
        return right

    async def main() -> list[list[bool]]:
        return await asyncio.gather(*map(work, CHOICES))

    assert all(all(right) for right in asyncio.run(main()))
    assert same(run(model), want["fr"])


def test_a_task_that_is_started_within_a_context_inherits_it(model):
    """A child task and asyncio.to_thread keep the choice of the caller that started them, even after it has ended."""
    want = expected(model)

    async def main() -> tuple[Tensor, Tensor]:
        started = asyncio.Event()

        async def child() -> Tensor:
            await started.wait()
            return run(model)

        with li.using(model, "de"):
            task = asyncio.create_task(child())
            in_thread = await asyncio.to_thread(run, model)
        started.set()
        return await task, in_thread

    child, in_thread = asyncio.run(main())
    assert same(child, want["de"])
    assert same(in_thread, want["de"])


def stream(model: nn.Module, choice: Choice) -> Iterator[Tensor]:
    with choosing(model, choice):
        for _ in range(3):
            yield run(model)


def test_a_suspended_generator_switches_nothing(model):
    """Between two items of a generator its consumer, other generators and a nested context make their choices."""
    want = expected(model)
    streams = {choice: stream(model, choice) for choice in CHOICES}
    for _ in range(3):
        for choice, items in streams.items():
            assert same(next(items), want[choice])
            assert same(run(model), want["fr"])
            with li.disabled(model):
                assert same(run(model), want[None])
    for items in streams.values():
        items.close()
    assert same(run(model), want["fr"])
    li.eject(model)  # no context is left open


def test_a_generator_keeps_its_choice_whoever_advances_it(model):
    """A web server advances a generator in a pool of threads, each time in a fresh copy of its contextvars."""
    want = expected(model)
    streams = {choice: stream(model, choice) for choice in CHOICES}
    for _ in range(3):
        for choice, items in streams.items():
            seen: list[Tensor] = []
            advance = contextvars.copy_context().run
            thread = threading.Thread(target=lambda i=items, s=seen, run=advance: s.append(run(next, i)))
            thread.start()
            thread.join()
            assert same(seen[0], want[choice])
            assert same(run(model), want["fr"])
    for items in streams.values():
        items.close()
    assert not GENERATOR_CONTEXTS


def test_generators_end_in_any_order(model):
    """Two generators within disabled, closed in the order in which they began, leave nothing switched off."""
    want = expected(model)
    a, b = stream(model, None), stream(model, None)
    next(a), next(b)
    a.close()
    assert same(run(model), want["fr"])
    b.close()
    assert same(run(model), want["fr"])
    li.activate(model, "de")


def test_a_suspended_async_generator_switches_nothing(model):
    """Between two items of an asynchronous generator its consumer sees the default."""
    want = expected(model)

    async def items() -> AsyncIterator[Tensor]:
        with li.using(model, "de"):
            for _ in range(2):
                await asyncio.sleep(0)
                yield run(model)

    async def main() -> None:
        async for item in items():
            assert same(item, want["de"])
            assert same(run(model), want["fr"])

    asyncio.run(main())


def test_a_generator_as_context_manager_hands_its_context_on(model):
    """A context within a function of contextlib.contextmanager holds in the with statement, however deep."""
    want = expected(model)

    @contextlib.contextmanager
    def outer() -> Iterator[None]:
        with inner():
            yield

    @contextlib.contextmanager
    def inner() -> Iterator[None]:
        with li.disabled(model):
            yield

    @contextlib.asynccontextmanager
    async def asynchronous() -> AsyncIterator[None]:
        with li.using(model, "de"):
            yield

    async def main() -> Tensor:
        async with asynchronous():
            await asyncio.sleep(0)
            return run(model)

    def through_generator() -> Iterator[Tensor]:
        with outer():
            yield run(model)

    with outer():
        assert same(run(model), want[None])
    assert same(asyncio.run(main()), want["de"])
    items = through_generator()
    assert same(next(items), want[None])
    assert same(run(model), want["fr"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(outer())
        assert same(run(model), want[None])
    assert same(run(model), want["fr"])


def test_contexts_nest_and_overlap(model):
    """The newest open context holds. A context that ends early leaves the others as they are."""
    want = expected(model)
    first, second, third = li.using(model, "de"), li.rows(model, ["fr", None, "de"]), li.disabled(model)
    for context in (first, second, third):
        context.__enter__()
    assert same(run(model), want[None])
    second.__exit__(None, None, None)
    assert same(run(model), want[None])
    third.__exit__(None, None, None)
    assert same(run(model), want["de"])
    first.__exit__(None, None, None)
    assert same(run(model), want["fr"])


def test_a_context_that_ends_elsewhere_has_ended(model):
    """A context that is closed in another contextvars context than it was opened in ends for its caller as well."""
    want = expected(model)
    context = li.disabled(model)
    context.__enter__()
    contextvars.copy_context().run(context.__exit__, None, None, None)
    assert same(run(model), want["fr"])


def test_contexts_of_two_models_are_apart(model):
    """A context changes its own model alone, and a copy is another model."""
    want = expected(model)
    other = copy.deepcopy(model)
    with li.disabled(model):
        assert same(run(other), want["fr"])
        with li.using(other, "de"):
            assert same(run(other), want["de"])
            assert same(run(model), want[None])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_carries_no_context_along(model, duplicate):
    """A copy or a pickle that is made within a context has the default of its original."""
    want = expected(model)
    with li.disabled(model):
        twin = duplicate(model)
        assert same(run(twin), want["fr"])
    assert same(run(twin), want["fr"])
    li.activate(twin, "de")


def test_a_replica_of_data_parallel_takes_the_choice_of_its_caller(model):
    """DataParallel runs replicas in threads that have none of the caller's contexts."""
    choices: list[Any] = []
    with li.using(model, "de"):
        replica = model.model.layers[0].self_attn.q_proj.lora._replicate_for_data_parallel()
    thread = threading.Thread(target=lambda: choices.append(replica.state.choice.active))
    thread.start()
    thread.join()
    assert choices == [("de",)]


# Gradient checkpointing


def gradients(model: nn.Module, context: Callable[[], Any], between: Callable[[], Any]) -> dict[str, Tensor]:
    """Run a forward within a context, and the backward within another one; return the gradients of A and B."""
    model.train()
    model.zero_grad()
    with context():
        loss = model(input_ids=X, labels=X, use_cache=False).loss
    with between():
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["reentrant", "not reentrant"])
def checkpointed(request, model) -> nn.Module:
    li.activate(model, "fr", "de")
    model.enable_input_require_grads()
    reentrant = request.param == "reentrant"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("choice", ["fr", "de", ("fr", None, "de"), "default"])
@pytest.mark.parametrize("later", ["de", None, ("de", "de", "fr"), "nothing"])
def test_a_recomputation_makes_the_choice_of_its_forward(checkpointed, choice, later):
    """The second run of a checkpointed forward uses the adapters of the first run, whatever is on at the backward."""

    def context() -> Any:
        return contextlib.nullcontext() if choice == "default" else choosing(checkpointed, choice)

    def between() -> Any:
        return contextlib.nullcontext() if later == "nothing" else choosing(checkpointed, later)

    again = gradients(checkpointed, context, between)
    checkpointed.gradient_checkpointing_disable()
    once = gradients(checkpointed, context, contextlib.nullcontext)
    assert again.keys() == once.keys()
    assert all(torch.allclose(again[name], once[name], atol=1e-6) for name in once)


def test_a_gradient_is_not_lost_in_silence(model, checkpointed):
    """A backward raises if its adapter was frozen since the forward, by another activate or inject."""
    for verb in (lambda: li.activate(model, "de"), lambda: li.inject(model, ["o_proj"], name="es")):
        for is_checkpointed in (True, False):
            if not is_checkpointed:
                model.gradient_checkpointing_disable()
            li.activate(model, "fr")
            model.train()
            loss = model(input_ids=X, labels=X, use_cache=False).loss
            verb()
            with pytest.raises(li.StateError, match=r"between a forward and its backward.*\n=> run the backward first"):
                loss.backward()
            if "es" in ModelIndex(model).adapter_names:
                li.eject(model, "es")
            li.activate(model, "fr")
            model(input_ids=X, labels=X, use_cache=False).loss.backward()


@pytest.mark.parametrize(
    "change",
    [li.merge, lambda m: li.eject(m, "fr"), li.eject, lambda m: li.rescale(m, "fr", alpha=2), li.reset],
    ids=["merge", "eject one", "eject all", "rescale", "reset"],
)
def test_a_checkpointed_backward_refuses_other_adapters(checkpointed, change):
    """A backward that can no longer compute its forward again raises, and loses or alters no gradient in silence."""
    checkpointed.train()
    loss = checkpointed(input_ids=X, labels=X, use_cache=False).loss
    change(checkpointed)
    with pytest.raises(li.StateError, match="between a forward with gradient checkpointing and its backward"):
        loss.backward()


def test_a_checkpointed_backward_works_after_unmerge(checkpointed):
    """The weights are those of the forward again."""
    checkpointed.train()
    grads = []
    for detour in (False, True):
        loss = checkpointed(input_ids=X, labels=X, use_cache=False).loss
        if detour:
            li.merge(checkpointed)
            li.unmerge(checkpointed)
        checkpointed.zero_grad()
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in checkpointed.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_a_recomputation_in_another_thread_makes_the_choice_of_its_forward(checkpointed):
    """Autograd runs the backward of CUDA tensors in a thread that has no context."""

    def backward(loss: Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    checkpointed.train()
    with li.using(checkpointed, "de"):
        backward(checkpointed(input_ids=X, labels=X, use_cache=False).loss)
    grads = {name for name, p in checkpointed.named_parameters() if p.grad is not None}
    assert all(".de." in name for name in grads)
    assert len(grads) == len(list(li.parameters(checkpointed, "de")))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_context_within_a_checkpointed_region_is_opened_again(reentrant):
    """A region that switches adapters itself, and a region within a region, compute the gradients of a plain run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    li.inject(model, ["0", "1"], r=2, name="a")
    li.inject(model, ["0", "1"], r=2, name="b")
    li.activate(model, "a", "b")
    randomize(model, "a", seed=1)
    randomize(model, "b", seed=2)

    def plain(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        return function(x)

    def again(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=reentrant)

    def region(x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        with li.using(model, "b"):
            x = run(model[0], x).tanh()
        x = run(model[1], x).tanh()
        with li.disabled(model):
            return run(model[0], x)

    def grads(run: Callable[..., Tensor]) -> list[Tensor | None]:
        model.zero_grad()
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).requires_grad_()
        with li.using(model, "a"):
            y = run(lambda x: region(x, run), x)
        with li.disabled(model):
            y.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    for a, b in zip(grads(again), grads(plain), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


# torch.compile


@pytest.mark.parametrize("compiled", [pytest.param("model", marks=pytest.mark.long), "layers"])
def test_compiled_code_makes_the_choice_of_its_caller(model, compiled):
    """A compiled forward sees contexts of threads, tasks and generators, without a break in its graph."""
    want = expected(model)
    torch._dynamo.reset()
    if compiled == "model":
        function: Callable[..., Any] = torch.compile(model, backend="eager", fullgraph=True)
    else:
        for layer in model.model.layers:
            layer.self_attn.q_proj.compile(backend="eager", fullgraph=True)
        function = model

    @torch.no_grad()
    def run_compiled() -> Tensor:
        return function(input_ids=X, use_cache=False).logits

    for choice in (*CHOICES, *CHOICES):
        with choosing(model, choice):
            assert same(run_compiled(), want[choice])
        assert same(run_compiled(), want["fr"])

    async def work(choice: Choice) -> bool:
        with choosing(model, choice):
            await asyncio.sleep(0)
            return same(run_compiled(), want[choice]) and same(await asyncio.to_thread(run_compiled), want[choice])

    async def main() -> list[bool]:
        return [await task for task in [asyncio.create_task(work(choice)) for choice in CHOICES]]

    assert all(asyncio.run(main()))

    def items() -> Iterator[Tensor]:
        with li.disabled(model):
            yield run_compiled()
            yield run_compiled()

    for item in items():
        assert same(item, want[None])
        assert same(run_compiled(), want["fr"])


# What trains


def trainable(model: nn.Module) -> set[str]:
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    return {name.split(".lora.")[1].split(".")[0] for name in names}


def test_exactly_the_active_adapters_train(model):
    """inject, load, activate and eject let the active adapters require a gradient, and no other parameter."""
    assert trainable(model) == {"fr"}
    li.activate(model, "fr", "de")
    assert trainable(model) == {"fr", "de"}
    li.activate(model)
    assert trainable(model) == set()
    li.inject(model, ["o_proj"], name="es")
    assert trainable(model) == {"es"}
    li.activate(model, "fr")
    li.eject(model, "fr")
    li.activate(model, "de")
    assert trainable(model) == {"de"}
    twin = copy.deepcopy(model)
    li.activate(twin, "es")
    assert trainable(twin) == {"es"}
    assert trainable(model) == {"de"}


def test_what_was_frozen_by_hand_stays_frozen(model):
    """activate freezes and thaws an adapter, but not a parameter that the user froze."""
    li.activate(model, "fr")
    for name, p in model.named_parameters():
        if name.endswith("fr.A"):
            p.requires_grad_(False)
    li.activate(model, "de")
    li.activate(model, "fr")
    assert {name[-4:] for name, p in model.named_parameters() if p.requires_grad} == {"fr.B"}


def test_parameters_say_whose_they_are(model):
    """parameters warns if other adapters do not train, and raises where nothing of an adapter would."""
    with pytest.warns(UserWarning, match=r"these are the parameters of 'fr' alone; 'de' is not active"):
        alone = list(li.parameters(model))
    assert [id(p) for p in alone] == [id(p) for p in li.parameters(model, "fr")]
    with pytest.raises(li.StateError, match=r"nothing of 'de' requires a gradient.*\n=> call activate"):
        li.parameters(model, "de")
    with pytest.raises(li.StateError, match="no adapter named 'es'"):
        li.parameters(model, ["fr", "es"])
    li.activate(model, "fr", "de")
    assert len(list(li.parameters(model, ["fr", "de"]))) == len(list(li.parameters(model))) == 2 * len(alone)


@pytest.mark.parametrize("context", [lambda m: li.using(m, "de"), lambda m: li.rows(m, ["fr", "de", None])])
def test_a_context_warns_of_adapters_that_do_not_train(model, context):
    """Within using and rows, in training with gradients, an adapter that is not active by default does not train."""
    model.train()
    with pytest.warns(UserWarning, match=r"'de' is not active by default, so that it does not train"), context(model):
        pass
    with torch.no_grad(), context(model):
        pass
    li.activate(model, "fr", "de")
    with context(model):
        pass


@pytest.mark.usefixtures("process_group")
def test_an_inactive_adapter_does_not_break_ddp(model):
    """DistributedDataParallel trains one adapter beside a frozen one, and gives the gradients of a plain step."""
    reference = bits(torch.stack([p.detach().sum() for p in model.parameters()]))
    plain = gradients(model, contextlib.nullcontext, contextlib.nullcontext)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        parallel(input_ids=X, labels=X, use_cache=False).loss.backward()
        assert all(torch.allclose(p.grad, plain[name]) for name, p in model.named_parameters() if name in plain)
        assert plain.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    assert bits(torch.stack([p.detach().sum() for p in model.parameters()])) == reference


def test_using_takes_the_arguments_of_activate(model):
    """using takes names, a list, or nothing; unknown names and merged adapters are refused."""
    want = expected(model)
    arguments: list[tuple[Sequence[Any], Choice]] = [
        ((), None),
        (("de",), "de"),
        ((["de"],), "de"),
        (("de", "de"), "de"),
    ]
    for names, choice in arguments:
        with li.using(model, *names):
            assert same(run(model), want[choice])
    with pytest.raises(li.StateError, match="no adapter named 'es'"), li.using(model, "es"):
        pass
    with li.using(model, "fr", "de"):
        both = run(model)
    li.activate(model, "fr", "de")
    assert same(run(model), both)
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot use adapters while"), li.using(model, "fr"):
        pass


@pytest.mark.parametrize("verb", [li.merge, lambda m: li.eject(m, "fr"), li.eject])
def test_nobody_changes_the_weights_under_an_open_context(model, verb):
    """merge, and an eject of its adapter, are refused while a generator or a thread is within a context."""
    want = expected(model)
    items = stream(model, "fr")
    next(items)
    with pytest.raises(li.StateError, match=r"while another thread, task or generator is inside using\(\.\.\.\)"):
        verb(model)
    assert same(next(items), want["fr"])
    li.inject(model, ["o_proj"], name="es")  # a new adapter changes nothing for others
    assert same(next(items), want["fr"])
    items.close()
    verb(model)


def test_an_optimizer_of_an_inactive_adapter_is_named(model):
    """Its steps would train nothing, in silence."""
    model.train()
    optimizer = torch.optim.SGD(li.parameters(model, "fr"), lr=0.1)
    li.activate(model, "de")
    model(input_ids=X, labels=X, use_cache=False).loss.backward()
    with pytest.warns(UserWarning, match="the optimizer has parameters of 'fr', which is not active"):
        optimizer.step()

"""`merged`: adapters are in the weights for the time of a context, and W0 is back to the bit after it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lorainject as li
from lorainject.lora.model_index import ModelIndex
from lorainject.merging.merged import _OPEN

from interrupts import CALLS, interrupted
from models import bits, ids, llama, randomize, state

NAMES = ("fr", "de", "es")
X = ids()


def build(dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = ("q_proj", "down_proj")) -> nn.Module:
    torch.manual_seed(0)
    model = llama().to(dtype)
    for seed, name in enumerate(NAMES):
        li.inject(model, targets, r=4, name=name)
        randomize(model, name, std=0.2, seed=seed)
    return model.eval()


@pytest.fixture
def model() -> nn.Module:
    return build()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=X).logits  # type: ignore[no-any-return]


def base_bits(model: nn.Module) -> dict[str, bytes | str]:
    return {name: bits(p) for name, p in model.named_parameters() if ".lora" not in name}


def merged_bits(model: nn.Module, *names: object) -> dict[str, bytes | str]:
    """Return the bits of one merge into a copy."""
    twin = copy.deepcopy(model)
    li.activate(twin)
    li.merge(twin, *names)
    return base_bits(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore::lorainject.errors.SurvivalWarning")
def test_exactly_the_named_adapters_are_merged_inside(dtype):
    """Inside the weights are W0 + t s B A, whatever was active; afterwards nothing of the model has changed."""
    model = build(dtype)
    before = state(model)
    for names in ("fr", ["fr", "de"], {"fr": 0.7, "de": -0.5}, {"es": 0}):
        want = merged_bits(model, names)
        with li.merged(model, names) as report:
            assert base_bits(model) == want
            assert isinstance(report, li.MergeReport)
            assert dict(zip(report.names, report.strengths, strict=True)) == (
                names if isinstance(names, dict) else dict.fromkeys([names] if isinstance(names, str) else names, 1)
            )
            assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
        assert state(model) == before
    li.activate(model, {"es": 0.3})
    with li.merged(model) as report:
        assert (report.names, report.strengths) == (("es",), (0.3,))
    assert not _OPEN[model.model.layers[0].mlp.down_proj.lora.state]


def test_one_context_within_another_replaces_its_adapters(model):
    """Inside there is the newest choice alone, and each end brings back what was merged before it."""
    before = state(model)
    fr, de = merged_bits(model, "fr"), merged_bits(model, {"de": 0.5})
    with li.merged(model, "fr"):
        with li.merged(model, {"de": 0.5}):
            assert base_bits(model) == de
            with li.merged(model, "fr"):
                assert base_bits(model) == fr
            assert base_bits(model) == de
        assert base_bits(model) == fr
    assert state(model) == before


def test_what_was_merged_before_is_merged_afterwards(model):
    """A context within a merge gives back the weights of the merge, and unmerge then gives back W0."""
    li.activate(model, {"fr": 0.7})
    before = base_bits(model)
    li.merge(model)
    merged, output = base_bits(model), run(model)
    with torch.no_grad():  # A and B may change while they are merged
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    with li.merged(model, "de"):
        assert base_bits(model) != merged
    assert base_bits(model) == merged
    assert torch.equal(run(model), output)
    li.unmerge(model)
    assert base_bits(model) == before


def test_contexts_end_in_any_order(model):
    """A server begins the next context before it ends the last one: that goes from one adapter to the other."""
    before, want = state(model), {name: merged_bits(model, name) for name in NAMES}
    last = contextlib.ExitStack()
    last.enter_context(li.merged(model, "fr"))
    for name in ("de", "es", "fr", "es"):
        following = contextlib.ExitStack()
        following.enter_context(li.merged(model, name))
        last.close()
        assert base_bits(model) == want[name]
        last = following
    last.close()
    assert state(model) == before


class Stop(BaseException):
    """An exception that nobody expects."""


@pytest.mark.parametrize("inside", ["raise", "merge", "unmerge", "eject", "eject one", "train", "activate", "break"])
def test_w0_is_back_whatever_happens_inside(model, inside):
    """Exceptions, other verbs and other A and B leave W0 to the bit."""
    before = base_bits(model)
    li.activate(model, "fr")
    try:
        for _ in range(2):
            with li.merged(model, "fr"):
                if inside == "raise":
                    raise Stop
                if inside == "merge":
                    li.merge(model, {"de": 2})
                elif inside == "unmerge":
                    li.unmerge(model)
                    li.activate(model, "de")
                elif inside == "eject":
                    li.eject(model)
                elif inside == "eject one":
                    li.eject(model, "fr")
                elif inside == "train":
                    with torch.no_grad():
                        [p.zero_() for p in model.parameters() if p.requires_grad]
                elif inside == "activate":
                    with pytest.raises(li.StateError, match="cannot activate while 'fr' is merged"):
                        li.activate(model, "de")
                if inside in ("break", "eject", "eject one"):
                    break
    except Stop:
        pass
    assert base_bits(model) == before
    assert not ModelIndex(model).merged


def test_an_adapter_that_was_ejected_inside_is_not_merged_again(model):
    """What was merged before comes back as far as it is on the model."""
    li.activate(model, "fr", "de")
    want = merged_bits(model, "de")
    li.merge(model)
    with li.merged(model, "es"):
        li.eject(model, "fr")
    assert base_bits(model) == want


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("function", sorted({*CALLS[li.merge], *CALLS[li.unmerge], "merging.merge.unmerge_weights"}))
def test_an_interrupt_leaves_w0(function, step):
    """Ctrl-C at the beginning, inside or at the end of a context leaves the weights as they were."""
    model = build(targets=("q_proj",))
    before = base_bits(model)
    with contextlib.suppress(KeyboardInterrupt), interrupted(function, step):
        for name in ("fr", "de"):
            with li.merged(model, name), li.merged(model, "es"):
                pass
    if ModelIndex(model).merged:  # interrupted at the end of a context, which the next unmerge finishes
        li.unmerge(model)
    assert base_bits(model) == before


def test_a_merge_that_fails_leaves_what_was_merged(model):
    """A context that cannot begin changes nothing, not even within another one."""
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.lora.de.B").fill_(float("nan"))
    before = state(model)
    with pytest.raises(li.MergeError, match="nothing was merged"), li.merged(model, "de"):
        raise AssertionError
    assert state(model) == before
    with li.merged(model, "fr"):
        merged = base_bits(model)
        with pytest.raises(li.MergeError, match="nothing was merged"), li.merged(model, "de"):
            raise AssertionError
        assert base_bits(model) == merged
        with pytest.raises(li.StateError, match="no adapter named 'x'"), li.merged(model, "x"):
            raise AssertionError
        assert base_bits(model) == merged
    assert state(model) == before


def test_an_edit_inside_is_named_at_the_end(model):
    """Weights that were edited inside are not overwritten: the end of the context raises, by name."""

    def edit() -> None:
        with li.merged(model, "fr"), torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[3, 5] += 1

    with pytest.raises(li.MergeError, match=r"nothing was unmerged:\n  - model\.layers\.0\.mlp\.down_proj"):
        edit()


def test_merges_that_keep_nothing_are_refused_inside(model):
    """reversible=False has no place in a context that restores W0, nor around it."""
    with li.merged(model, "fr"), pytest.raises(li.StateError, match=r"reversible=False inside merged\(\.\.\.\)"):
        li.merge(model, "de", reversible=False)
    li.activate(model, "fr")
    li.merge(model, reversible=False)
    with pytest.raises(li.MergeError, match="was merged with reversible=False"), li.merged(model, "de"):
        raise AssertionError


def test_other_threads_and_tasks_neither_merge_nor_unmerge(model):
    """The weights are everybody's: while a context is open, only its caller changes what is merged."""
    errors: list[str] = []

    def try_all() -> None:
        for verb in (
            lambda: li.merged(model, "de").__enter__(),
            lambda: li.merge(model, "de"),
            lambda: li.unmerge(model),
        ):
            try:
                verb()
            except li.StateError as e:
                errors.append(str(e))

    with li.merged(model, "fr"):
        merged = base_bits(model)
        thread = threading.Thread(target=try_all)
        thread.start()
        thread.join()
        assert base_bits(model) == merged
    assert len(errors) == 3
    assert all("while another thread, task or generator is inside merged(...)" in e for e in errors)

    async def hold(entered: asyncio.Event, done: asyncio.Event) -> None:
        with li.merged(model, "fr"):
            entered.set()
            await done.wait()

    async def main() -> None:
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(entered, done))
        await entered.wait()
        with pytest.raises(li.StateError, match="inside merged"), li.merged(model, "de"):
            raise AssertionError
        done.set()
        await task

    asyncio.run(main())


def test_contexts_of_switching_and_of_merging_refuse_each_other(model):
    """No context begins inside one that it would make wrong."""
    for context in (li.using(model, "fr"), li.rows(model, ["fr"]), li.disabled(model)):
        with context, pytest.raises(li.StateError, match="cannot merge inside"), li.merged(model, "de"):
            raise AssertionError
    with li.merged(model, "fr"), pytest.raises(li.StateError, match="'fr' is merged"), li.using(model, "de"):
        raise AssertionError


def test_a_generator_ends_its_context(model):
    """A context in a generator ends with the generator; until then nobody else merges."""
    before = base_bits(model)

    def items() -> Iterator[int]:
        with li.merged(model, "fr"):
            yield 1
            yield 2

    generator = items()
    assert next(generator) == 1
    with pytest.raises(li.StateError, match="inside merged"):
        li.merge(model, "de")
    generator.close()
    assert base_bits(model) == before


@pytest.mark.filterwarnings("ignore::lorainject.errors.SurvivalWarning")
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_switches_leave_w0_to_the_bit(count):
    """In bfloat16, among three adapters, at small and large strengths, however many switches there are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 20), nn.Linear(20, 9)).to(torch.bfloat16)
    before = base_bits(model)
    for name in NAMES:
        li.inject(model, ["0", "1"], r=3, name=name)
    with torch.no_grad():
        [p.normal_() for name, p in model.named_parameters() if ".lora" in name]
    want = {name: merged_bits(model, {name: 0.3}) for name in NAMES}
    last = contextlib.ExitStack()
    for i in range(count):
        following, name = contextlib.ExitStack(), NAMES[i % 3]
        following.enter_context(li.merged(model, {name: 0.3 if i % 10 else 30.0}))
        last.close()
        last = following
        if i % 20 == 1:
            assert base_bits(model) == want[name]
    last.close()
    assert base_bits(model) == before


def test_no_second_copy_of_the_weights_is_kept():
    """In a switch of a weight in place, the memory that is kept is the journal and the factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.bfloat16)
    weight = model[0].weight
    for name in NAMES:
        li.inject(model, ["0"], r=4, name=name)
    with torch.no_grad():
        [p.normal_(std=0.02) for name, p in model.named_parameters() if ".lora" in name]
    pointer = weight.data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with li.merged(model, "fr"), li.merged(model, "de") as report:
            assert model[0].weight is weight
            assert weight.data_ptr() == pointer
            assert report.journal_bytes < 0.2 * weight.nbytes
            kept = sum(
                t.nbytes
                for before in _OPEN[model[0].lora.state]
                for _, deltas in before.deltas.values()
                for parts in deltas.values()
                for f in parts
                for t in (f.P, f.Q)
            )
            assert kept < 0.1 * weight.nbytes


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_are_refused_by_name(offload, tmp_path):
    """Weights that accelerate has offloaded are named, and stay where they are."""
    from accelerate import cpu_offload, disk_offload

    model = build()
    want = run(model)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    for verb in (lambda: li.merged(model, "es").__enter__(), lambda: li.merge(model)):
        with pytest.raises(
            li.MergeError, match=r"model\.layers\.\*\.mlp\.down_proj: is on the meta device \(offloaded"
        ):
            verb()
    assert torch.allclose(run(model), want, atol=1e-5)


@pytest.mark.filterwarnings("ignore::lorainject.errors.SurvivalWarning")
def test_tied_and_quantized_weights_go_from_one_adapter_to_the_next():
    """Weights that get a new parameter, rather than being overwritten, are given back as objects."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    for seed, name in enumerate(NAMES):
        li.inject(model, ["embed_tokens", "q_proj"], r=4, name=name)
        randomize(model, name, seed=seed)
    before, weight = state(model), model.lm_head.weight
    with pytest.raises(li.MergeError, match="is tied to"), li.merged(model, "fr"):
        raise AssertionError
    with li.merged(model, "fr", untie=True):
        with pytest.raises(li.MergeError, match="is tied to"), li.merged(model, "de"):
            raise AssertionError
        with li.merged(model, {"de": 0.5}, untie=True):
            assert model.model.embed_tokens.weight is not weight
            assert model.lm_head.weight is weight
    assert state(model) == before
    assert model.model.embed_tokens.weight is weight


def test_the_warning_of_survival_names_the_caller():
    """The warning of a merge points at the line that merges, in a context as well."""
    model = build(torch.bfloat16)
    with torch.no_grad():
        [p.mul_(0.01) for name, p in model.named_parameters() if ".lora" in name]
    with pytest.warns(li.SurvivalWarning) as caught, li.merged(model, "fr"):
        pass
    li.activate(model, "fr")
    with pytest.warns(li.SurvivalWarning) as caught_by_merge:
        li.merge(model)
    assert {w.filename for w in (*caught, *caught_by_merge)} == {__file__}

"""The laws of docs/laws.md, over random module trees, and over real architectures in three dtypes."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorainject as li
from lorainject.lora.graft import Graft
from lorainject.lora.model_index import adapted_sites

from example_count import examples
from interrupts import CALLS, interrupted
from models import TINY, bits, randomize, run, state, weight_at
from strategies import DTYPES, Case, cases

on_random_trees = settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

RANDOM_TREES = "random trees"
ARCHITECTURES = [
    pytest.param((name, dtype), id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, tiny in TINY.items()
    for dtype in tiny.dtypes
]


def on_every_model(check: Callable[[Case], None]) -> Callable[[object], None]:
    """Make a test of a check: it runs on random trees, and on each real architecture in each dtype."""
    check_trees = on_random_trees(given(cases())(check))

    @pytest.mark.parametrize("model", [RANDOM_TREES, *ARCHITECTURES])
    def test(model: object) -> None:
        if model == RANDOM_TREES:
            check_trees()
        else:
            check(real_case(*model))

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


def real_case(name: str, dtype: torch.dtype) -> Case:
    """Return a tiny real architecture as a Case."""
    torch.manual_seed(0)
    tiny = TINY[name]
    model = tiny.build().to(dtype)
    case = Case(model, torch.empty(0), {"targets": list(tiny.targets), "r": 4, "alpha": 8})
    inputs = tiny.inputs()
    case.output = lambda m=None: run(model if m is None else m, inputs).detach()  # type: ignore[method-assign]
    return case


def is_adapter_key(key: str) -> bool:
    """True if a key of a state dict belongs to an adapter."""
    return ".lora" in f".{key}"


def is_close(a: Tensor, b: Tensor) -> bool:
    """True if two tensors agree within the rounding of their dtype, relative to the largest value."""
    tolerance = ROUNDING[a.dtype] * max(1.0, float(b.abs().max()))
    return torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance)


# --- inject and eject -------------------------------------------------------------------------------------------------


@on_every_model
def test_output_is_unchanged_after_inject(case):
    """Law 1: right after inject, every adapter returns the base layer's output to the bit.

    The model's output is compared within rounding: a BLAS library may round by how an activation is aligned in memory.
    """
    y = case.output()
    li.inject(case.model, **case.settings)
    for site in adapted_sites(case.model).values():
        site.adapters.register_forward_hook(assert_returns_base_output)
    assert is_close(case.output(), y)


def assert_returns_base_output(adapters: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    assert torch.equal(args[1], output)


@on_every_model
def test_eject_restores_the_model(case):
    """Law 2: eject gives back every class, attribute, key, flag and bit, also after A and B were trained."""
    before = state(case.model)
    assert li.inject(case.model, **case.settings) is case.model
    randomize(case.model)
    assert li.eject(case.model) is case.model
    assert state(case.model) == before


@on_every_model
def test_inject_keeps_the_keys_of_the_base(case):
    """Law 3: the base's keys stay, in their order; the adapters' keys are new, and only they require gradients."""
    keys = list(case.model.state_dict())
    li.inject(case.model, **case.settings)
    assert [key for key in case.model.state_dict() if not is_adapter_key(key)] == keys
    parameters = dict(case.model.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if is_adapter_key(n)}


@on_random_trees
@given(cases(dtypes=(torch.float32,)))
def test_adapted_layer_computes_the_formula(case):
    """A model with adapters equals a float64 model whose weights are W0 + s B A."""
    plain = copy.deepcopy(case.model).double()
    li.inject(case.model, **case.settings)
    randomize(case.model)
    for path, w, d in li.deltas(case.model):
        weight_at(plain, path).data = w.double() + d.double()
    x = case.x.double() if case.x.is_floating_point() else case.x
    with torch.no_grad():
        assert torch.allclose(case.output(case.model.eval()).double(), plain.eval()(x), rtol=1e-4, atol=1e-4)


# --- all or nothing ---------------------------------------------------------------------------------------------------


@on_random_trees
@given(cases(), st.data())
def test_error_changes_nothing(case, data):
    """Law 4: a verb that raises leaves the model as it was, to the bit, whichever site is at fault."""
    li.inject(case.model, **case.settings)
    randomize(case.model)
    sites = adapted_sites(case.model)
    site = sites[data.draw(st.sampled_from(sorted(sites)))]
    with torch.no_grad():
        site.adapters["default"].B.flatten()[0] = data.draw(st.sampled_from([float("nan"), float("inf")]))
    before = state(case.model)
    with pytest.raises(li.MergeError, match="A or B holds NaN or infinity"):
        li.merge(case.model)
    assert state(case.model) == before
    with pytest.raises(li.TargetError):
        li.inject(case.model, **case.settings)
    with tempfile.TemporaryDirectory() as folder, pytest.raises(li.FileError):
        li.save(case.model, folder)
    assert state(case.model) == before


def calls_of(verb: Callable[..., object]) -> st.SearchStrategy[str]:
    return st.sampled_from(CALLS[verb])


@on_random_trees
@given(cases(), calls_of(li.inject), st.integers(0, 3))
def test_interrupted_inject_changes_nothing(case, function, calls):
    """Law 4: an interrupt in the middle of inject leaves no trace."""
    before = state(case.model)
    try:
        with interrupted(function, calls):
            li.inject(case.model, **case.settings)
    except KeyboardInterrupt:
        assert state(case.model) == before


@on_random_trees
@given(cases(), calls_of(li.eject), st.integers(0, 4))
def test_next_eject_finishes_an_interrupted_one(case, function, calls):
    """Law 4: after an interrupted eject, the next one leaves no graft, no child and no frozen parameter."""
    before = state(case.model)
    li.inject(case.model, **case.settings)
    with contextlib.suppress(KeyboardInterrupt), interrupted(function, calls):
        li.eject(case.model)
    with contextlib.suppress(li.StateError):  # raised if the interrupt came after the last step
        li.eject(case.model)
    assert state(case.model) == before


@on_random_trees
@given(cases(), calls_of(li.merge), st.integers(0, 8), st.booleans())
def test_interrupted_merge_changes_nothing(case, function, calls, strict):
    """Law 4: an interrupt in the middle of merge leaves the model unmerged, and it can be merged afterwards."""
    li.inject(case.model, **case.settings)
    randomize(case.model, std=0.5)
    before = state(case.model)
    try:
        with interrupted(function, calls):
            li.merge(case.model, strict=strict)
    except (KeyboardInterrupt, li.MergeError):  # MergeError: in half precision, too little of the delta survives
        assert state(case.model) == before
        li.merge(case.model, strict=False)
    li.unmerge(case.model)
    assert state(case.model) == before


@on_random_trees
@given(cases(), calls_of(li.unmerge), st.integers(0, 8))
def test_interrupted_unmerge_changes_nothing_or_is_finished_by_the_next(case, function, calls):
    """Law 4: an interrupted unmerge leaves the merged weights, or W0; the next unmerge leaves the model as it was."""
    li.inject(case.model, **case.settings)
    randomize(case.model, std=0.5)
    before = state(case.model)
    li.merge(case.model, strict=False)
    merged = [bits(p) for p in case.model.parameters()]
    try:
        with interrupted(function, calls):
            li.unmerge(case.model)
    except KeyboardInterrupt:
        weights = [bits(p) for p in case.model.parameters()]
        assert weights in (merged, [bits(p) for p in li.unmerge(copy.deepcopy(case.model)).parameters()])
        li.unmerge(case.model)
    assert state(case.model) == before


@pytest.mark.parametrize(("verb", "function"), [(verb, function) for verb in CALLS for function in CALLS[verb]])
def test_every_interrupt_can_happen(verb, function):
    """Each verb calls the functions in CALLS: otherwise the tests above would pass without an interrupt."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if verb is not li.inject:
        li.inject(model, ["0", "1"], r=2)
    if verb is li.unmerge:
        li.merge(model)
    with pytest.raises(KeyboardInterrupt), interrupted(function, 0):
        verb(model, **({"targets": ["0", "1"]} if verb is li.inject else {"strict": True} if verb is li.merge else {}))


# --- merge and unmerge ------------------------------------------------------------------------------------------------


@on_every_model
def test_merge_rounds_once(case):
    """Law 5: a merged weight is W0 + s B A, rounded once to the dtype of W0."""
    li.inject(case.model, **case.settings)
    randomize(case.model, std=0.3)
    weight_bytes = sum({site.key: site.weight.nbytes for site in adapted_sites(case.model).values()}.values())
    expected = {path: (w.double() + d.double()).to(w.dtype) for path, w, d in li.deltas(case.model)}
    report = li.merge(case.model)
    for path, w in expected.items():
        merged = weight_at(case.model, path)
        # The sum in float32 may fall on the other side of a tie between two neighbors than the exact sum.
        assert torch.allclose(merged.float(), w.float(), rtol=torch.finfo(w.dtype).eps, atol=1e-7)
        assert w.dtype is torch.float32 or (merged != w).float().mean() < 0.02 or merged.numel() < 60
    assert report.weight_bytes == weight_bytes


@on_every_model
def test_merged_module_has_its_original_class(case):
    """Law 6: after merge no module is grafted, so that each forward is the base's."""
    classes = {path: type(module) for path, module in case.model.named_modules()}
    li.inject(case.model, **case.settings)
    randomize(case.model, std=0.3)
    li.merge(case.model)
    assert not any(isinstance(module, Graft) for module in case.model.modules())
    assert {path: type(case.model.get_submodule(path)) for path in classes} == classes


@on_every_model
def test_unmerge_restores_every_bit(case):
    """Law 7: unmerge gives back the adapted model to the bit, and with it the output."""
    li.inject(case.model, **case.settings)
    randomize(case.model, std=0.3)
    case.model.eval()
    before, y = state(case.model), case.output()
    li.merge(case.model)
    li.unmerge(case.model)
    assert state(case.model) == before
    assert torch.equal(case.output().nan_to_num(), y.nan_to_num())


@pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merges", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_unmerge_restores_every_bit_after_many_merges(merges, dtype):
    """Law 7: W0 comes back to the bit after a thousand merges, each of another A and B, small or large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(dtype)
    info = torch.finfo(dtype)
    with torch.no_grad():
        model[0].weight.view(-1)[:4] = torch.tensor([-0.0, 0.0, info.tiny, info.smallest_normal / 4], dtype=dtype)
    before = state(model)
    li.inject(model, ["0", "1"], r=3)
    for cycle in range(merges):
        randomize(model, std=10.0 ** (cycle % 7 - 5), seed=cycle)
        li.merge(model)
        li.unmerge(model)
    assert state(li.eject(model)) == before


@on_every_model
def test_merged_output_agrees(case):
    """Law 10: the merged model is as close to the exact output (float32) as the unmerged one, within rounding."""
    li.inject(case.model, **case.settings)
    randomize(case.model, std=0.3)
    case.model.eval()
    y, exact = case.output(), case.output(copy.deepcopy(case.model).float())
    li.merge(case.model)
    if not (y.isfinite().all() and exact.isfinite().all()):
        assert y.dtype is torch.float16  # the products of an attention overflow, with adapters and merged
        return
    error, merged_error = (float((output.float() - exact).abs().max()) for output in (y, case.output()))
    # In half precision the error with adapters is large on T5: merging must not make it much larger.
    assert merged_error <= max(4 * error, ROUNDING[y.dtype] * max(1.0, float(exact.abs().max())))


# --- files ------------------------------------------------------------------------------------------------------------


@on_every_model
def test_load_restores_what_save_wrote(case):
    """Laws 8 and 10: loading a saved adapter gives the same factors, settings and output, to the bit."""
    fresh = copy.deepcopy(case.model)
    li.inject(case.model, **case.settings)
    randomize(case.model)
    with tempfile.TemporaryDirectory() as folder:
        li.load(fresh, li.save(case.model, Path(folder) / "a.safetensors"))
    assert contents(fresh) == contents(case.model)
    assert torch.equal(case.output(fresh.eval()), case.output(case.model.eval()))


@on_every_model
def test_same_adapter_gives_the_same_bytes(case):
    """Law 8: an adapter that was saved, loaded and saved again gives the same file."""
    fresh = copy.deepcopy(case.model)
    li.inject(case.model, **case.settings)
    randomize(case.model)
    with tempfile.TemporaryDirectory() as folder:
        first = li.save(case.model, Path(folder) / "a.safetensors")
        second = li.save(li.load(fresh, first), Path(folder) / "b.safetensors")
        assert first.read_bytes() == second.read_bytes()


def contents(model: nn.Module) -> dict[str, object]:
    """Return rank, settings and bits of the adapter on each site."""
    adapters = {name: site.adapters["default"] for name, site in adapted_sites(model).items()}
    return {name: (a.r, a.alpha, a.scaling, bits(a.A), bits(a.B)) for name, a in adapters.items()}

"""Many adapters in one batch: each is trained as if it were alone."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorainject as li
from lorainject import training

from models import TINY, bits, llama, state
from moe_models import mixtral

STEPS = 10
RUNS = {
    "r2": training.Run(spec=li.LoraSpec(targets=["q_proj", "v_proj"], r=2), lr=1e-2, seed=1),
    "r4": training.Run(spec=li.LoraSpec(targets="all-linear", r=4), lr=1e-3, seed=2),
    "r8": training.Run(spec=li.LoraSpec(targets=["mlp"], r=8, alpha=16), lr=1e-2, seed=3),
    "r4-again": training.Run(spec=li.LoraSpec(targets=["down_proj", "embed_tokens"], r=4), lr=1e-3, seed=3),
}


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return llama().to(dtype)


def texts(name: str, step: int, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Return a batch that no other run or step has."""
    g = torch.Generator().manual_seed(hash_of(name) + step)
    return {"input_ids": torch.randint(1, 99, (rows, length), generator=g)}


def hash_of(name: str) -> int:
    return 1000 * sum(map(ord, name))


def next_token(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    targets = batch["input_ids"][:, 1:].masked_fill(batch["input_ids"][:, 1:] == 0, -100)
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


def trained_alone(
    model: nn.Module,
    run: training.Run,
    batches: Any,
    loss: Any = next_token,
    clip: float | None = None,
    schedule: Any = None,
) -> tuple[nn.Module, list[float]]:
    """Train one run by the textbook, and return the model and the losses."""
    torch.manual_seed(run.seed)
    li.inject(model, spec=run.spec)
    optimizer = torch.optim.AdamW(li.parameters(model), lr=run.lr)
    scheduler = schedule and schedule(optimizer)
    losses = []
    for batch in batches:
        value = loss(model(**batch), batch)
        losses.append(value.item())
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(list(li.parameters(model)), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return model, losses


def gap(model: nn.Module, name: str, other: nn.Module, other_name: str = "default") -> float:
    """Return the largest difference between the parameters of two adapters."""
    ours, theirs = (
        {path.replace(f".{n}.", "."): p for path, p in m.named_parameters() if f".{n}." in path}
        for m, n in ((model, name), (other, other_name))
    )
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).detach().abs().max()) for key in ours)


@pytest.mark.parametrize(("dtype", "tolerance", "factor"), [(torch.float32, 1e-6, 0.1), (torch.float64, 1e-10, 1)])
@pytest.mark.parametrize("mode", ["batch", "alternate"])
def test_every_run_is_trained_as_if_alone(dtype, tolerance, factor, mode):
    """Ranks, rates, seeds, targets and data differ; parameters and losses are those of separate trainings.

    Adam divides by the size of a gradient, so that it makes large steps of the rounding of small ones. With a learning
    rate of 1e-2 in float32, one run is 1.8e-6 from its separate training, which itself is 2.6e-6 from the same in
    float64; the run of the sweep is 0.8e-6 from it. So the rates of float32 are a tenth of those of float64.
    """
    runs = {name: replace(run, lr=run.lr * factor) for name, run in RUNS.items()}
    model = base(dtype)
    results = training.sweep(model, runs, texts, next_token, steps=STEPS, mode=mode)
    assert results.mode == mode
    for name, run in runs.items():
        alone, losses = trained_alone(base(dtype), run, [texts(name, step) for step in range(STEPS)])
        assert gap(model, name, alone) <= tolerance
        assert results[name].losses == pytest.approx(losses, abs=10 * tolerance)
        assert results[name].parameters == sum(p.numel() for p in li.parameters(alone))
        assert results[name].losses[-1] != results[name].losses[0]


def test_clipping_and_schedules_belong_to_each_run():
    """The gradient of each run is clipped by its norm alone, and each run has a scheduler."""
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    model = base(torch.float64)
    training.sweep(model, RUNS, texts, next_token, steps=4, max_grad_norm=0.05, schedule=schedule, mode="batch")
    for name, run in RUNS.items():
        batches = [texts(name, step) for step in range(4)]
        clipped, _ = trained_alone(base(torch.float64), run, batches, clip=0.05, schedule=schedule)
        free, _ = trained_alone(base(torch.float64), run, batches, schedule=schedule)
        assert gap(model, name, clipped) <= 1e-10
        assert gap(model, name, free) > 1e-6


@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
def test_any_runs_are_trained_as_if_alone(ranks, data):
    """Any ranks, targets, seeds, rates and numbers of rows."""
    targets = st.lists(
        st.sampled_from(["q_proj", "k_proj", "o_proj", "up_proj", "embed_tokens"]), min_size=1, unique=True
    )
    runs = {
        f"run{i}": training.Run(
            spec=li.LoraSpec(targets=data.draw(targets), r=r), lr=data.draw(st.sampled_from([1e-3, 1e-2])),
            seed=data.draw(st.integers(0, 9)),
        )
        for i, r in enumerate(ranks)
    }  # fmt: skip
    sizes = {name: data.draw(st.integers(1, 4), label=name) for name in runs}
    length = data.draw(st.integers(13, 15))

    def batches(name: str, step: int) -> dict[str, Tensor]:
        return texts(name, step, sizes[name], length)

    model = base(torch.float64)
    training.sweep(model, runs, batches, next_token, steps=2, mode="batch")
    for name, run in runs.items():
        alone, _ = trained_alone(base(torch.float64), run, [batches(name, step) for step in range(2)])
        assert gap(model, name, alone) <= 1e-10


def test_batches_are_functions_iterables_or_one_for_all():
    """A mapping of iterables is the same as a function; of one iterable, every run sees each batch."""
    runs = dict(itertools.islice(RUNS.items(), 2))
    listed = {name: [texts(name, step) for step in range(3)] for name in runs}
    a = training.sweep(base(), runs, texts, next_token, steps=3)
    b = training.sweep(base(), runs, listed, next_token, steps=3)
    assert [r.losses for r in a.values()] == [r.losses for r in b.values()]
    shared = training.sweep(base(), runs, (texts("all", step) for step in range(3)), next_token, steps=3)
    for name, run in runs.items():
        _, losses = trained_alone(base(), run, [texts("all", step) for step in range(3)])
        assert shared[name].losses == pytest.approx(losses, abs=1e-5)


def test_sequences_are_padded():
    """Batches of several lengths are padded with the values of `pad`, and each run is as without padding."""

    def batches(name: str, step: int) -> dict[str, Tensor]:
        ids = texts(name, step, length=5 + hash_of(name) // 1000 % 3 + step)["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    model = base(torch.float64)
    pad = {"input_ids": 0, "attention_mask": 0}
    results = training.sweep(model, RUNS, batches, next_token, steps=3, pad=pad, mode="batch")
    for name, run in RUNS.items():
        alone, losses = trained_alone(base(torch.float64), run, [batches(name, step) for step in range(3)])
        assert gap(model, name, alone) <= 1e-10
        assert results[name].losses == pytest.approx(losses, abs=1e-9)


def test_a_batch_as_long_as_it_has_rows():
    """`rows` takes such a batch for transposed: with `pad` it is made one longer, else its step is taken in turns."""
    runs = dict(itertools.islice(RUNS.items(), 2))
    batches = partial(texts, rows=4, length=8)
    padded = training.sweep(base(), runs, batches, next_token, steps=2, pad={"input_ids": 0}, mode="batch")

    def once(name: str, step: int) -> dict[str, Tensor]:
        return texts(name, step, rows=4, length=8 if step == 1 else 9)

    mixed = training.sweep(base(), runs, once, next_token, steps=3)
    assert (mixed.mode, mixed.turns) == ("batch", 1)
    with pytest.raises(li.StateError, match="first axis is not certain"):
        training.sweep(base(), runs, once, next_token, steps=3, mode="batch")
    for name, run in runs.items():
        for results, source in ((padded, batches), (mixed, once)):
            losses = trained_alone(base(), run, [source(name, step) for step in range(results.mode == "batch" and 2)])[
                1
            ]
            assert results[name].losses[:2] == pytest.approx(losses, abs=1e-5)


def test_batches_that_do_not_fit_are_named():
    """Every entry that cannot be put together is listed; mode="auto" takes turns and says why."""
    runs = dict(itertools.islice(RUNS.items(), 2))

    def batches(name: str, step: int) -> dict[str, Any]:
        first = name == "r2"
        return (
            texts(name, step, length=7 if first else 8)
            | {"use_cache": first}
            | ({"position_ids": None} if first else {})
        )

    with pytest.raises(
        li.StateError, match=r"(?s)input_ids: \(3, 7\).*\(3, 8\).*use_cache: .*position_ids: .*'r4'.*=>"
    ):
        training.sweep(base(), runs, batches, next_token, steps=1, mode="batch")
    results = training.sweep(base(), runs, batches, next_token, steps=2)
    assert (results.mode, results.turns) == ("alternate", 2)
    assert "input_ids" in results.reason
    for name, run in runs.items():
        losses = trained_alone(base(), run, [batches(name, step) for step in range(2)])[1]
        assert results[name].losses == pytest.approx(losses, abs=1e-5)


def test_adapters_that_see_no_rows_are_refused_by_name():
    """Layers on pooled outputs are named, all of them, before anything trains; mode="auto" takes turns."""
    from transformers import BertConfig, BertForSequenceClassification

    def classifier() -> nn.Module:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
        )
        return BertForSequenceClassification(config).eval()

    spec = li.LoraSpec(targets=["query", "pooler.dense", "classifier"], r=2)
    runs = {name: training.Run(spec=spec, lr=1e-2, seed=i) for i, name in enumerate("ab")}

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.logits, batch["input_ids"][:, 0] % 2)

    model = classifier()
    before = state(model)
    with pytest.raises(li.StateError, match=r"(?s)pooler\.dense.*classifier.*=> pass mode=\"alternate\"") as error:
        training.sweep(model, runs, texts, loss, steps=2, mode="batch")
    assert "query" not in str(error.value)
    assert state(model) == before
    results = training.sweep(model, runs, texts, loss, steps=2)
    assert results.mode == "alternate"
    assert "pooler.dense" in results.reason
    for name, run in runs.items():
        alone, _ = trained_alone(classifier(), run, [texts(name, step) for step in range(2)], loss)
        assert gap(model, name, alone) == 0


def test_experts_are_trained_in_one_batch():
    """Stacked experts see the tokens of each run by themselves."""
    spec = li.LoraSpec(targets=["experts", "q_proj"], r=2)
    runs = {name: training.Run(spec=spec, lr=1e-2, seed=i) for i, name in enumerate("ab")}
    torch.manual_seed(0)
    model = mixtral()
    pristine = copy.deepcopy(model)

    def loss(outputs: Any, batch: Any) -> Tensor:
        y = outputs.last_hidden_state
        return (y * torch.linspace(-1, 1, y.shape[-1])).pow(2).mean()

    training.sweep(model, runs, texts, loss, steps=2, mode="batch")
    for name, run in runs.items():
        alone, _ = trained_alone(copy.deepcopy(pristine), run, [texts(name, step) for step in range(2)], loss)
        assert gap(model, name, alone) <= 1e-5


def test_dora_takes_turns():
    """Adapters that must be alone on their weights cannot be active together: the runs take turns."""
    spec = li.LoraSpec(targets=["q_proj"], r=2, dora=True, bias="none")
    runs = {name: training.Run(spec=spec, lr=1e-2, seed=i) for i, name in enumerate("ab")}
    model = base(torch.float64)
    results = training.sweep(model, runs, texts, next_token, steps=3)
    assert (results.mode, results.turns) == ("alternate", 3)
    assert "DoRA" in results.reason
    for name, run in runs.items():
        alone, _ = trained_alone(base(torch.float64), run, [texts(name, step) for step in range(3)])
        assert gap(model, name, alone) == 0


def test_each_run_has_a_file(tmp_path):
    """Each run is saved under its name, and loads with the outputs that it had; the model is bare again."""
    model, outputs = base(), []
    before = state(model)
    x = texts("x", 0)["input_ids"]

    def score(m: nn.Module) -> float:
        outputs.append(m(input_ids=x).logits)
        return float(outputs[-1].sum())

    results = training.sweep(model, RUNS, texts, next_token, steps=3, save_to=tmp_path / "runs", score=score)
    assert state(model) == before
    for (name, result), output in zip(results.items(), outputs, strict=True):
        assert result.path == tmp_path / "runs" / name
        with torch.no_grad():
            loaded = li.load(base(), result.path)(input_ids=x).logits
        assert bits(loaded) == bits(output)
        assert result.score == float(output.sum())


def test_adapters_are_kept_inactive_without_a_folder(tmp_path):
    """Without save_to the adapters stay, and what was active before is active; `keep` decides otherwise."""
    model = li.inject(base(), ["q_proj"], r=2, name="sft")
    x = texts("x", 0)["input_ids"]
    before = bits(model(input_ids=x).logits)
    training.sweep(model, RUNS, texts, next_token, steps=1)
    assert bits(model(input_ids=x).logits) == before
    li.activate(model, *RUNS)
    assert list(li.parameters(model, "r2"))
    li.activate(model, "sft")
    for name in RUNS:
        li.eject(model, name)
    described = state(model)
    training.sweep(model, RUNS, texts, next_token, steps=1, keep=False)
    assert state(model) == described
    training.sweep(model, RUNS, texts, next_token, steps=1, save_to=tmp_path, keep=True)
    li.activate(model, "r4")


def test_modes_and_generators_stay(tmp_path):
    """Train and eval flags, and the random generator, are after a sweep without dropout as they were before."""
    model = base().train()
    model.model.norm.eval()
    flags, generator = [m.training for m in model.modules()], torch.get_rng_state()
    results = training.sweep(
        model, RUNS, texts, next_token, steps=1, score=lambda m: sum(x.training for x in m.modules()), save_to=tmp_path
    )
    assert {result.score for result in results.values()} == {0}
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("mode", ["batch", "alternate"])
def test_a_run_that_diverges_is_stopped_alone(mode, tmp_path):
    """A loss that is not finite stops its run, with the parameters that it had; the others are not touched by it."""

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        value = next_token(outputs, batch)
        return value * (math.nan if torch.equal(batch["input_ids"], texts("r4", 2)["input_ids"]) else 1)

    model = base(torch.float64)
    results = training.sweep(
        model, RUNS, texts, loss, steps=5, mode=mode, save_to=tmp_path, keep=True, score=lambda m: 1.0
    )
    assert [len(result.losses) for result in results.values()] == [5, 2, 5, 5]
    assert "step 2" in results["r4"].stopped
    assert (results["r4"].path, results["r4"].score) == (None, None)
    assert "diverged" in str(results)
    for name, run in RUNS.items():
        alone, _ = trained_alone(
            base(torch.float64), run, [texts(name, step) for step in range(len(results[name].losses))]
        )
        assert gap(model, name, alone) <= 1e-10


@pytest.mark.parametrize("mode", ["batch", "alternate"])
def test_a_run_that_overflows_is_stopped_alone(mode):
    """A rate that makes activations infinite or NaN stops its run, and leaves no trace in the gradients of others."""
    runs = {**RUNS, "wild": training.Run(spec=li.LoraSpec(targets="all-linear", r=2), lr=1e30)}
    model = base(torch.float64)
    results = training.sweep(model, runs, texts, next_token, steps=4, mode=mode)
    assert "not finite" in results["wild"].stopped
    assert all(p.isfinite().all() for p in model.parameters())
    for name, run in RUNS.items():
        alone, _ = trained_alone(base(torch.float64), run, [texts(name, step) for step in range(4)])
        assert gap(model, name, alone) <= 1e-10


@pytest.mark.parametrize("mode", ["batch", "alternate"])
def test_a_gradient_that_is_not_finite_stops_its_run(mode):
    """The loss may be finite where the gradient is not: no parameter becomes NaN."""

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        value = next_token(outputs, batch)
        is_bad = torch.equal(batch["input_ids"], texts("r4", 1)["input_ids"])
        return value + (value * 0).sqrt() if is_bad else value

    model = base()
    results = training.sweep(model, RUNS, texts, loss, steps=3, mode=mode)
    assert [len(result.losses) for result in results.values()] == [3, 1, 3, 3]
    assert "gradient of step 1" in results["r4"].stopped
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_trial_draws_nothing():
    """The forward by which rows are tried draws masks of dropout, and leaves the generator as it was."""
    run = training.Run(spec=li.LoraSpec(targets=["q_proj", "down_proj"], r=4, dropout=0.3), lr=1e-2)
    before, after = [], []

    def forward(model: nn.Module, batch: Any) -> Any:
        before.append(torch.get_rng_state())
        outputs = model(**batch)
        after.append(torch.get_rng_state())
        return outputs

    training.sweep(base().train(), {"a": run, "b": run}, texts, next_token, steps=1, forward=forward, mode="batch")
    trial, step = before
    assert not torch.equal(after[0], trial)
    assert torch.equal(step, trial)


def test_a_run_whose_batches_end_is_finished():
    """A function may return None: the run ends there, and the others go on."""
    results = training.sweep(
        base(), RUNS, lambda name, step: None if name == "r8" and step == 2 else texts(name, step), next_token, steps=4
    )
    assert [len(result.losses) for result in results.values()] == [4, 4, 2, 4]
    assert results["r8"].stopped == "its batches ended after 2 steps"


@pytest.mark.parametrize("mode", ["batch", "alternate"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_the_model_as_it_was(mode, error):
    """Whatever is raised in the middle of a sweep, the model is bare again."""
    model = base()
    before = state(model)

    def interrupt(step: int, losses: Mapping[str, float]) -> None:
        if step == 1:
            raise error

    with pytest.raises(error):
        training.sweep(model, RUNS, texts, next_token, steps=3, mode=mode, on_step=interrupt)
    assert state(model) == before
    training.sweep(model, RUNS, texts, next_token, steps=1, mode=mode)


def test_all_mistakes_are_listed_and_nothing_is_changed(tmp_path):
    """Targets without a match, names in use, batches that are too few and wrong settings are one error."""
    model = li.inject(base(), ["q_proj"], r=2, name="r2")
    before = state(model)
    runs = {"r2": RUNS["r2"], "b": training.Run(spec=li.LoraSpec(targets=["q_porj"]), lr=1e-3)}
    batches = {"r2": [texts("r2", 0)], "c": [texts("c", 0)]}
    expected = r"(?s)steps must.*mode must.*run 'r2': .*already carries.*run 'b': .*q_porj.*names 'r2', 'c'"
    with pytest.raises(li.SpecError, match=expected):
        training.sweep(model, runs, batches, next_token, steps=0, mode="rows", save_to=tmp_path / "x")
    with pytest.raises(li.SpecError, match=r"batches of r4 are 1, too few for 2 steps"):
        training.sweep(model, {"r4": RUNS["r4"]}, {"r4": [texts("r4", 0)]}, next_token, steps=2)
    with pytest.raises(li.SpecError, match="runs must be a mapping"):
        training.sweep(model, {}, texts, next_token, steps=1)
    with pytest.raises(li.SpecError, match=r"(?s)spec must.*lr must.*seed must"):
        training.Run(spec="q_proj", lr=0, seed=0.5)
    assert state(model) == before
    assert not (tmp_path / "x").exists()


def test_losses_that_are_not_of_one_run_are_refused():
    """The loss that the model computes over the batch is hidden from the runs, and the way out is said."""
    batches = lambda name, step: texts(name, step) | {"labels": texts(name, step)["input_ids"]}  # noqa: E731
    model = base()
    before = state(model)
    with pytest.raises(li.StateError, match=r"(?s)'r2' is None, .*=> compute the loss from outputs"):
        training.sweep(model, RUNS, batches, lambda outputs, batch: outputs.loss, steps=2, mode="batch")
    with pytest.raises(li.StateError, match="a tensor of the shape"):
        training.sweep(model, RUNS, batches, lambda outputs, batch: outputs.logits, steps=2)
    with pytest.raises(li.StateError, match="without a gradient"):
        training.sweep(model, RUNS, batches, lambda outputs, batch: outputs.logits.detach().sum(), steps=2)
    assert state(model) == before
    results = training.sweep(model, RUNS, batches, lambda outputs, batch: outputs.loss, steps=2)
    assert (results.mode, results.turns) == ("alternate", 2)


def test_batch_norm_is_refused():
    """Statistics of the batch would make one run depend on the others."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    runs = {"a": training.Run(spec=li.LoraSpec(targets=["0"], r=2), lr=1e-2)}
    with pytest.raises(li.StateError, match=r"(?s)statistics of the batch.*- 1.*=> call eval"):
        training.sweep(model, runs, [{"input": torch.ones(2, 4)}], lambda y, batch: y.mean(), steps=1)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "whisper"])
def test_other_architectures(name):
    """Encoders, decoders, images and sound."""
    tiny = TINY[name]
    torch.manual_seed(0)
    model = tiny.build()
    pristine, inputs = copy.deepcopy(model), tiny.inputs()
    specs = [li.LoraSpec(targets=[t for t in tiny.targets if t not in ("wte", "wpe")], r=r) for r in (2, 4)]
    runs = {f"r{spec.r}": training.Run(spec=spec, lr=1e-2, seed=spec.r) for spec in specs}

    def loss(outputs: Any, batch: Any) -> Tensor:
        y = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
        return (y * torch.linspace(-1, 1, y.shape[-1])).pow(2).mean()

    training.sweep(model, runs, [inputs, inputs], loss, steps=2, mode="batch")
    for key, run in runs.items():
        alone, _ = trained_alone(copy.deepcopy(pristine), run, [inputs, inputs], loss)
        assert gap(model, key, alone) <= 1e-5


def test_gradient_checkpointing():
    """Regions that run again in the backward use the rows of their forward."""
    model = base(torch.float64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    training.sweep(model, RUNS, texts, next_token, steps=2, mode="batch")
    for name, run in RUNS.items():
        alone, _ = trained_alone(base(torch.float64), run, [texts(name, step) for step in range(2)])
        assert gap(model, name, alone) <= 1e-10


def test_results_print_as_a_table():
    """A line for each run, and how they were trained."""
    results = training.sweep(base(), RUNS, texts, next_token, steps=2, score=lambda model: 0.25)
    header, *lines, how = str(results).splitlines()
    assert header.split()[:5] == ["run", "r", "lr", "seed", "parameters"]
    assert [line.split()[:4] for line in lines] == [
        [name, str(run.spec.r), f"{run.lr:g}", str(run.seed)] for name, run in RUNS.items()
    ]
    assert all("0.25" in line for line in lines)
    assert how.startswith("batch, 0 steps in turns")

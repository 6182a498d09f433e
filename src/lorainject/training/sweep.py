"""Train many adapters at once, on one base in memory: ranks, targets, seeds and learning rates to compare.

    x = cat(x_1, ..., x_N)      y_n = x_n W0^T + s_n (x_n A_n^T) B_n^T      loss = loss_1(y_1) + ... + loss_N(y_N)

The batches of all runs are one batch, in which every row has the adapter of its run (`li.rows`). The loss of a run
depends on its rows alone, so that one backward of the sum gives every adapter the gradient that it would have alone.
Each run has an optimizer, and is clipped and stopped by itself. Parameters agree with those of a separate training
within rounding, which differs because products of more rows add up in another order. Masks of dropout are drawn for the
whole batch, and therefore differ.

Where rows cannot be told apart (`rows` says where, and `training.sweep` before it changes a parameter), the runs take
turns on the one base in every step, which is what separate trainings compute, and as fast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import LoraError, SpecError, StateError, system_errors
from ..files.save_load import save
from ..lora.model_index import ModelIndex
from ..surgery import eject, inject
from ..switching import activate, parameters, rows, using
from ..targets.resolve import find
from .joint_batch import Batch, JointBatch, require_rows
from .runs import Run, RunResult, SweepResult

MODES = ("auto", "batch", "alternate")


def sweep(
    model: nn.Module,
    runs: Mapping[str, Run],
    batches: Callable[[str, int], Batch | None] | Iterable[Batch] | Mapping[str, Iterable[Batch]],
    loss: Callable[[Any, Batch], Tensor],
    *,
    steps: int,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    max_grad_norm: float | None = None,
    forward: Callable[[nn.Module, Batch], Any] = lambda model, batch: model(**batch),
    pad: Mapping[str, float] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    save_to: str | Path | None = None,
    keep: bool | None = None,
    mode: str = "auto",
) -> SweepResult:
    """Train several adapters on one base, all in one forward and backward per step, each as if it were alone.

    The runs begin on the bare base: adapters that the model carries are off during the sweep, and as before after it.
    Train and eval flags of the modules stay as they are. Without dropout, the parameters of each run are those of a
    separate training, within rounding. A run whose loss or gradient is not finite is stopped before its parameters
    change, and the others go on.

    Args:
        model: The base model.
        runs: The runs by the names that the adapters get.
        batches: A function of the name of the run and the number of the step, or an iterable of batches for each name,
            or one iterable, whose batches all runs see. The function may return None to end the run. Tensors are on the
            model's device.
        loss: A function of the outputs and the batch of one run, which returns a mean over the batch. In one batch with
            others, outputs that belong to no row, such as the loss that the model computes from labels, are None.
        steps: The number of steps.
        optimizer: Called as optimizer(parameters, lr=lr) for each run.
        schedule: Returns a scheduler for an optimizer. It steps once per step.
        max_grad_norm: The norm to which the gradient of each run is clipped.
        forward: A function that runs the model on a batch. It may call the model several times, with all rows in each
            call, and must treat each row by itself.
        pad: The value by which each entry with a sequence on axis 1 is continued on the right, where the sequences of
            the runs differ in length: {"input_ids": 0, "attention_mask": 0, "labels": -100}. `loss` gets the padded
            batch. Without it, all shapes but the number of rows must be equal.
        score: Returns the score of the model with the adapter of one run, in eval mode and without gradients.
        on_step: Called after each step with its number and the losses of the runs.
        save_to: A folder, in which each run is saved in a folder of its name.
        keep: True to leave the adapters on the model, inactive. None means True unless `save_to` is passed.
        mode: "batch" for all runs in one batch; "alternate" for one run after the other in every step, which needs
            memory for the activations of one run; "auto" for "batch" where it is possible.

    Returns:
        The results by the names of the runs. They print as a table.

    Raises:
        SpecError: A setting is invalid, a target matches nothing, or a name is in use. All runs are checked first.
        StateError: A module computes over the batch (batch norm in training mode), a loss is not one number with a
            gradient, or, with mode="batch", the rows of the runs cannot be told apart or do not fit together.

    If an error or an interrupt is raised, the adapters of the sweep are taken off, and the model is as before.
    """
    start, index = time.perf_counter(), ModelIndex(model)
    _require_valid(index, runs, batches, steps, mode)
    if save_to is not None:
        with system_errors(f"{save_to} cannot be written"):
            Path(save_to).mkdir(parents=True, exist_ok=True)
    before, is_kept, reason, turns = index.default_strengths, False, "", 0
    next_batch = _feed(batches)
    try:
        states = {name: _begin(model, name, run, optimizer, schedule) for name, run in runs.items()}
        for step in range(steps):
            step_batches: dict[str, Batch] = {}
            for name in [name for name, state in states.items() if state.stopped is None]:
                if (batch := next_batch(name, step)) is None:
                    states[name].stopped = f"its batches ended after {step} steps"
                else:
                    step_batches[name] = batch
            if not step_batches:
                break
            is_joint = mode != "alternate"
            if is_joint:
                try:
                    joint = JointBatch(step_batches, pad or {})
                    if step == 0:
                        activate(model, *step_batches)
                        require_rows(model, joint, forward)
                    _backward_jointly(model, states, joint, forward, loss)
                except StateError as e:
                    if mode == "batch":
                        raise
                    is_joint, reason = False, reason or str(e)
                    mode = "alternate" if step == 0 else mode
            turns += not is_joint
            losses = {}
            for name, batch in step_batches.items():
                if not is_joint:
                    _backward_alone(model, name, states[name], batch, forward, loss)
                losses[name] = states[name].step(step, max_grad_norm)
            if on_step is not None:
                on_step(step, losses)
        results = {name: _finish(model, name, state, score, save_to) for name, state in states.items()}
        is_kept = save_to is None if keep is None else keep
    finally:
        _restore(model, runs, before, is_kept)
    return SweepResult(
        results=results, mode="alternate" if mode == "alternate" else "batch", reason=reason, turns=turns,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


@dataclass
class _State:
    """A run while it trains."""

    run: Run
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    scheduler: LRScheduler | None
    losses: list[float] = field(default_factory=list)
    loss: float = math.nan
    """The loss of the step that is being taken."""
    stopped: str | None = None
    has_diverged: bool = False

    def step(self, step: int, max_grad_norm: float | None) -> float:
        """Take the step to which `loss` and the gradients belong, unless they are not finite; return the loss."""
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if max_grad_norm is None else max_grad_norm)
        if not (math.isfinite(self.loss) and norm.isfinite()):
            what = "gradient" if math.isfinite(self.loss) else f"loss ({self.loss})"
            self.stopped, self.has_diverged = f"diverged: the {what} of step {step} is not finite", True
        else:
            self.losses.append(self.loss)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        self.optimizer.zero_grad()
        return self.loss


def _begin(
    model: nn.Module, name: str, run: Run, optimizer: Callable[..., Optimizer],
    schedule: Callable[[Optimizer], LRScheduler] | None,
) -> _State:  # fmt: skip
    """Inject the adapter of a run, whose A does not depend on what was drawn before, and make its optimizer."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(run.seed)
        inject(model, spec=run.spec, name=name)
    trained = list(parameters(model, name))
    optim = optimizer(trained, lr=run.lr)
    return _State(run, trained, optim, schedule and schedule(optim))


def _backward_jointly(
    model: nn.Module, states: Mapping[str, _State], joint: JointBatch, forward: Callable[[nn.Module, Batch], Any],
    loss: Callable[[Any, Batch], Tensor],
) -> None:  # fmt: skip
    """Run all batches through the model as one, and give each run its loss and its gradients."""
    activate(model, *joint.parts)  # exactly the adapters that are active by default train
    with rows(model, joint.rows):
        outputs = joint.split(forward(model, joint.inputs))
        losses = {name: _loss(loss, name, outputs[name], part) for name, part in joint.parts.items()}
        for name, value in losses.items():
            states[name].loss = value.item()
        torch.stack([*losses.values()]).sum().backward()  # one that is not finite reaches its run alone


def _backward_alone(
    model: nn.Module, name: str, state: _State, batch: Batch, forward: Callable[[nn.Module, Batch], Any],
    loss: Callable[[Any, Batch], Tensor],
) -> None:  # fmt: skip
    """Run the batch of one run through the model by itself, and give the run its loss and its gradients."""
    state.optimizer.zero_grad()  # a joint backward may have failed in the middle
    activate(model, name)
    value = _loss(loss, name, forward(model, batch), batch)
    state.loss = value.item()
    value.backward()


def _loss(loss: Callable[[Any, Batch], Tensor], name: str, outputs: Any, batch: Batch) -> Tensor:
    """Return the loss of one run as a 0-d tensor."""
    value = loss(outputs, batch)
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        what = f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        without = " without a gradient" if isinstance(value, Tensor) and not value.requires_grad else ""
        raise StateError(
            f"the loss of the run {name!r} is {what}{without}, and not one number with a gradient",
            way_out="compute the loss from outputs that have one row per example, as in cross_entropy(outputs.logits,"
            " ...): the loss that the model itself returns is one for all runs in the batch",
        )
    return value.reshape(())


def _finish(
    model: nn.Module, name: str, state: _State, score: Callable[[nn.Module], float] | None, save_to: str | Path | None
) -> RunResult:
    """Score and save the adapter of a run, unless it diverged."""
    number = path = None
    if score is not None and not state.has_diverged:
        with _in_eval_mode(model), torch.no_grad(), using(model, name):
            number = float(score(model))
    if save_to is not None and not state.has_diverged:
        path = save(model, Path(save_to) / name, name)
    return RunResult(
        run=state.run, parameters=sum(p.numel() for p in state.parameters), losses=tuple(state.losses),
        stopped=state.stopped, score=number, path=path,
    )  # fmt: skip


def _restore(model: nn.Module, runs: Iterable[str], before: Mapping[str, float], is_kept: bool) -> None:
    """Activate what was active before the sweep, and take the adapters of the runs off unless they are kept."""
    injected = [name for name in runs if name in ModelIndex(model).adapter_names]
    if injected:
        activate(model, before)
    for name in () if is_kept else reversed(injected):
        eject(model, name)


def _feed(batches: Any) -> Callable[[str, int], Batch | None]:
    """Return the function of the name of a run and the number of a step that returns a batch, or None at the end."""
    if callable(batches):
        return batches
    if isinstance(batches, Mapping):
        sources = {name: iter(source) for name, source in batches.items()}
        return lambda name, step: next(sources[name], None)
    source, drawn = iter(batches), dict[int, Batch | None]()

    def shared(name: str, step: int) -> Batch | None:
        if step not in drawn:
            drawn.clear()
            drawn[step] = next(source, None)
        return drawn[step]

    return shared


def _require_valid(index: ModelIndex, runs: Any, batches: Any, steps: Any, mode: Any) -> None:
    """Raise an error with everything that is wrong before anything is changed."""
    index.require_ready("sweep")
    problems = []
    if not (isinstance(runs, Mapping) and runs and all(isinstance(run, Run) for run in runs.values())):
        problems.append(f"runs must be a mapping from names to training.Run, not {runs!r}")
        runs = {}
    if not isinstance(steps, int) or steps < 1:
        problems.append(f"steps must be a whole number of at least 1, not {steps!r}")
    if mode not in MODES:
        problems.append(f"mode must be one of {MODES}, not {mode!r}")
    for name, run in runs.items():
        try:
            find(index.model, spec=run.spec, name=name)
        except LoraError as e:
            problems += [f"run {name!r}: {problem}" for problem in e.problems or [str(e)]]
    sources = {} if callable(batches) else batches if isinstance(batches, Mapping) else {"all runs": batches}
    if isinstance(batches, Mapping) and runs and batches.keys() != runs.keys():
        problems.append(f"batches has the names {', '.join(map(repr, batches))}, and runs {', '.join(map(repr, runs))}")
    for name, source in sources.items():
        if not isinstance(source, Iterable):
            problems.append(f"the batches of {name} must be a function or an iterable, not {source!r}")
        elif isinstance(source, Sized) and isinstance(steps, int) and len(source) < steps:
            problems.append(f"the batches of {name} are {len(source)}, too few for {steps} steps")
    if problems:
        raise SpecError("no sweep was begun:", problems, "correct the arguments and call again; nothing was changed")
    norms = {path: m for path, m in index.modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if mixing := [path for path, norm in norms.items() if norm.training]:
        raise StateError(
            "these modules compute with statistics of the batch, and keep them, so that no run would be as if alone:",
            mixing,
            "call eval() on them, so that they take the statistics of the base",
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; afterwards every module is in its mode of before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training

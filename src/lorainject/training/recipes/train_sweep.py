"""Train the adapters of a recipe's sweep at once, on one base and on the same batches.

DIRECTORY/r4-fast/...    each adapter, in a folder of its name
DIRECTORY/report.md      the table of results, with loss.png
DIRECTORY/recipe.yaml    the recipe

The optimizer, its schedule and the clipping of gradients are those that the Trainer would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...errors import SpecError
from ..joint_batch import Batch
from ..runs import SweepResult
from ..sweep import sweep
from .contrastive import embed, info_nce
from .data import ROLES, Examples, encoder, require_counted_tokens
from .recipe import Recipe
from .train import RECIPE, align_padding, load_model, load_processing, plot_losses

SEPARATOR = "/"  # between the role and the name of an input, in a batch of pairs


def train_sweep(recipe: Recipe, *, progress: bool = True) -> SweepResult:
    """Train the adapters of a recipe's sweep, and write them, a report with the loss curves, and the recipe.

    Args:
        recipe: A recipe with the section `sweep`.
        progress: Show a progress bar.

    Returns:
        The results by the names of the runs. The score is the accuracy on the rows to evaluate on, where the data have
        labels, and otherwise the loss on them.

    Raises:
        SpecError: With everything that is wrong with the recipe, before anything is loaded.
    """
    if not recipe.sweep.root:
        raise SpecError("this recipe has no section sweep", way_out="call training.train(recipe)")
    ready, folder = recipe.prepare(), recipe.output.directory
    args = ready.arguments
    transformers.set_seed(args.seed)
    processing, model = load_processing(recipe), load_model(recipe, ready)
    align_padding(model, processing)
    encode, collate = encoder(recipe.data.format, processing, recipe.data.max_length, ready.labels)
    if recipe.data.format == "prompt-completion":
        require_counted_tokens(ready.rows, encode, recipe.data.max_length)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write(folder / RECIPE)
    trainer = transformers.Trainer(  # for its data, in the order in which it would train on them
        model, args, collate if recipe.data.format != "pair" else _flat(collate),
        train_dataset=Examples(ready.rows, encode), eval_dataset=Examples(ready.eval_rows, encode),
    )  # fmt: skip
    cls, settings = trainer.get_optimizer_cls_and_kwargs(args, model)
    settings = {key: value for key, value in settings.items() if key != "lr"}

    def optimizer(parameters: Iterable[nn.Parameter], lr: float) -> Any:
        decayed = {*trainer.get_decay_parameter_names(model)}
        names = {id(p): name for name, p in model.named_parameters()}
        groups: dict[float, list[nn.Parameter]] = {args.weight_decay: [], 0.0: []}
        for p in parameters:
            groups[args.weight_decay if names[id(p)] in decayed else 0.0].append(p)
        options = [{"params": group, "weight_decay": decay} for decay, group in groups.items() if group]
        return cls(options, lr=lr, **settings)

    with tqdm(total=ready.steps, disable=not progress) as bar:
        result = sweep(
            model.train(), ready.runs, _batches(trainer.get_train_dataloader()), _loss, steps=ready.steps,
            optimizer=optimizer,
            schedule=lambda optimizer: transformers.get_scheduler(
                args.lr_scheduler_type, optimizer, args.get_warmup_steps(ready.steps), ready.steps,
                args.lr_scheduler_kwargs or {}),
            max_grad_norm=args.max_grad_norm or None, forward=_forward,
            score=partial(_score, trainer.get_eval_dataloader, bool(ready.labels)) if ready.eval_rows else None,
            save_to=folder, on_step=lambda *_: bar.update(),
        )  # fmt: skip
    curves = {name: list(enumerate(run.losses, 1)) for name, run in result.items()}
    plot_losses(curves, folder / "loss.png")
    settings_text = (folder / RECIPE).read_text(encoding="utf-8")
    (folder / "report.md").write_text(
        f"# Sweep\n\n```\n{result}\n```\n\n![loss](loss.png)\n\n## Recipe\n\n```yaml\n{settings_text}```\n\n"
        f"## Plan\n\n```\n{ready}\n```\n",
        encoding="utf-8",
    )
    return result


def _batches(loader: Any) -> Iterator[Batch]:
    """Yield batches without an end, epoch by epoch."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def _flat(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Return a function whose batches of pairs have no levels: {"query/input_ids": ..., "positive/input_ids": ...}."""

    def joined(rows: list[Any]) -> dict[str, Tensor]:
        batch = collate(rows)
        return {f"{role}{SEPARATOR}{key}": value for role in ROLES["pair"] for key, value in batch[role].items()}

    return joined


def _roles(batch: Batch) -> dict[str, dict[str, Any]]:
    """Return the inputs of each role of a batch of pairs; empty for other batches."""
    roles: dict[str, dict[str, Any]] = {}
    for key, value in batch.items():
        role, separator, name = key.partition(SEPARATOR)
        if separator:
            roles.setdefault(role, {})[name] = value
    return roles


def _forward(model: Any, batch: Batch) -> Any:
    """Return the logits of a batch, or the embeddings of its pairs."""
    if roles := _roles(batch):
        return tuple(embed(model, roles[role]) for role in ROLES["pair"])
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def _loss(outputs: Any, batch: Batch) -> Tensor:
    """Return the loss of the Trainer: InfoNCE for pairs, else the mean cross entropy; of the next token for texts."""
    if "labels" not in batch:
        return info_nce(*outputs)
    labels = batch["labels"]
    if labels.ndim == 1:
        return F.cross_entropy(outputs.float(), labels)
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _score(loader: Callable[[], Iterable[Batch]], has_labels: bool, model: Any) -> float:
    """Return the accuracy for data with labels, else the mean loss of the batches."""
    total, rows = 0.0, 0
    for batch in loader():
        outputs, size = _forward(model, batch), len(next(iter(batch.values())))
        total += float((outputs.argmax(-1) == batch["labels"]).sum() if has_labels else size * _loss(outputs, batch))
        rows += size
    return total / rows

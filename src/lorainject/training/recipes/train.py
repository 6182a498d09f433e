"""Train a recipe: load the base, inject, train with `adapter_checkpoints`, and write what a reader needs afterwards.

DIRECTORY/checkpoint-8/...   adapters and the state of the training, from which it can be resumed
DIRECTORY/adapter/           the adapter, as `li.save` writes it
DIRECTORY/merged/            the merged model, if the recipe asks for it
DIRECTORY/report.md          the plan, the losses, the metrics and the time, with loss.png
DIRECTORY/recipe.yaml        the recipe
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from ...errors import LoraError, SpecError
from ...files.save_load import save
from ...merging.merge import merge
from ...surgery import eject, inject
from ..model_card import recipe as adapter_table
from ..optimizers import parameter_groups
from ..reference import reference
from ..trainer import adapter_checkpoints
from .data import ROLES, Examples, encoder, require_counted_tokens
from .prepare import Preparation, load_config
from .recipe import Recipe
from .sections import CLASSES

RECIPE = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training measured and wrote."""

    losses: tuple[float, ...]
    """The losses, as they were logged."""
    metrics: Mapping[str, float]
    """The metrics of the whole training, and those of the evaluation (eval_loss, eval_accuracy)."""
    steps: int
    """The number of steps, with those before a resume."""
    seconds: float
    """The time of training and evaluation."""
    adapter: Path
    """The adapter."""
    merged: Path | None
    """The merged model."""
    report: Path
    """The report; loss.png and recipe.yaml are in the same folder."""

    def as_json(self) -> dict[str, Any]:
        """Return the result as values of JSON."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}

    def __str__(self) -> str:
        losses = f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}" if self.losses else "no loss was logged"
        lines = [f"{self.steps:,} steps in {self.seconds:.1f} s; {losses}"]
        lines += [f"  {name:12} {value:.4g}" for name, value in self.metrics.items() if name.startswith("eval_")
                  and not name.endswith(("_runtime", "_second"))]  # fmt: skip
        paths = {"adapter": self.adapter, "merged": self.merged, "report": self.report}
        return "\n".join([*lines, *(f"{name}: {path}" for name, path in paths.items() if path is not None)])


def train(recipe: Recipe, *, progress: bool = True) -> TrainingResult:
    """Train a recipe, and write the adapter, a report with the loss curve, and the recipe.

    Args:
        recipe: The recipe. With `output.resume`, its training goes on from the last checkpoint in its folder.
        progress: Show the trainer's progress bar.

    Returns:
        The losses, the metrics and the paths of what was written.

    Raises:
        SpecError: With everything that is wrong with the recipe, before anything is loaded; or the base lacks weights,
            such as those of a new head, that the recipe does not train.
    """
    if recipe.sweep.root:
        raise SpecError("this recipe is a sweep of several adapters", way_out="call training.train_sweep(recipe)")
    ready, folder = recipe.prepare(), recipe.output.directory
    checkpoint = get_last_checkpoint(str(folder)) if recipe.output.resume and folder.is_dir() else None
    if checkpoint is not None:
        _require_resumable(recipe, Path(checkpoint), ready.steps)
    ready.arguments.disable_tqdm |= not progress
    transformers.set_seed(ready.arguments.seed)
    processing = load_processing(recipe)
    model = load_model(recipe, ready)
    transformers.set_seed(ready.arguments.seed)  # so that A does not depend on what loading drew
    align_padding(model, processing)
    inject(model, spec=ready.spec)
    trainer = _trainer(recipe, ready, model, processing)
    if not progress:
        trainer.remove_callback(transformers.PrinterCallback)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write(folder / RECIPE)
    start = time.perf_counter()
    metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if ready.eval_rows:
        metrics |= trainer.evaluate()
    seconds, history = time.perf_counter() - start, trainer.state.log_history
    adapter, merged = save(model, folder / "adapter"), folder / "merged" if recipe.output.merged else None
    table = adapter_table(model, recipe.model.path, ready.arguments, history)
    if merged is not None:
        merge(model, reversible=False)
        eject(model)
        model.save_pretrained(merged)
        processing.save_pretrained(merged)
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    result = TrainingResult(
        losses=tuple(loss for _, loss in points), metrics=metrics, steps=trainer.state.global_step, seconds=seconds,
        adapter=adapter, merged=merged, report=folder / "report.md",
    )  # fmt: skip
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    plot_losses({"training": points, "evaluation": evaluated}, folder / "loss.png")
    settings = (folder / RECIPE).read_text(encoding="utf-8")
    result.report.write_text(
        f"# Training\n\n```\n{result}\n```\n\n![loss](loss.png)\n\n## Recipe\n\n```yaml\n{settings}```\n\n"
        f"## Plan\n\n```\n{ready}\n```\n\n{table}",
        encoding="utf-8",
    )
    return result


def _require_resumable(recipe: Recipe, checkpoint: Path, steps: int) -> None:
    """Raise SpecError if the recipe is not the one of the checkpoint, or has no steps left."""
    path = checkpoint.parent / RECIPE
    if path.is_file() and (problems := recipe.differences(Recipe.read(path, check=False))):
        way_out = "take these settings back, or train into another output.directory"
        raise SpecError(f"{checkpoint} belongs to a training with other settings:", problems, way_out)
    taken = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
    if taken >= steps:
        what = f"{checkpoint} has taken {taken} steps, and the recipe asks for {steps}: there is nothing left to train"
        raise SpecError(what, way_out="raise trainer.max_steps or trainer.num_train_epochs to train on")


def load_processing(recipe: Recipe) -> Any:
    """Return the image processor or the tokenizer of the base."""
    source, is_image = recipe.model.source, recipe.data.format == "image"
    auto = transformers.AutoImageProcessor if is_image else transformers.AutoTokenizer
    try:
        processing = auto.from_pretrained(source)
    except (OSError, ValueError) as e:
        what = f"{recipe.model.path} has no {'image processor' if is_image else 'tokenizer'}: {str(e).splitlines()[0]}"
        raise LoraError(what, way_out="save it into the folder of the model with its save_pretrained") from e
    if not is_image and processing.pad_token is None:
        processing.pad_token = processing.eos_token
    if recipe.data.format == "chat" and processing.chat_template is None:
        raise LoraError(f"the tokenizer of {recipe.model.path} has no chat template",
                        way_out="take a model for chats, or the format prompt-completion")  # fmt: skip
    return processing


def load_model(recipe: Recipe, ready: Preparation) -> Any:
    """Load the base. A weight that it lacks has to train, or else the model would keep random numbers."""
    section, labels = recipe.model, ready.labels
    config = load_config(section, list(labels))
    auto = getattr(transformers, CLASSES[section.class_])
    dtype = "auto" if section.dtype == "auto" else getattr(torch, section.dtype)
    model, loading = auto.from_pretrained(
        section.source, config=config, dtype=dtype, ignore_mismatched_sizes=bool(labels), output_loading_info=True
    )
    absent = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    trained = {f"{tensor.path}.{tensor.parameter}" for tensor in ready.plan.tensors}
    if section.class_ != "embeddings" and (random := sorted(absent - trained)):  # poolers are of no use for embeddings
        raise SpecError(
            f"{section.path} lacks weights, which would stay random:", random,
            "add the modules to lora.modules_to_save, so that they train and belong to the adapter",
        )  # fmt: skip
    return model


def align_padding(model: Any, processing: Any) -> None:
    """Let a model know the token that pads, which classifiers on the last token look for."""
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = getattr(processing, "pad_token_id", None)


def _trainer(recipe: Recipe, ready: Preparation, model: Any, processing: Any) -> Any:
    """Return the trainer of the recipe's kind."""
    args, kind, data = ready.arguments, recipe.trainer.kind, recipe.data
    options: dict[str, Any] = {"args": args, "processing_class": processing}
    if recipe.lora.optimizer is not None:
        cls, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        ratio = recipe.lora.optimizer.lr_ratio_b
        groups = parameter_groups(model, args.learning_rate, ratio, weight_decay=args.weight_decay)
        options["optimizers"] = (cls(groups, **settings), None)
    if kind in ("sft", "dpo"):
        import trl
        from datasets import Dataset

        def rows(part: tuple[Any, ...]) -> Any:
            return Dataset.from_list([{role: row[role] for role in ROLES[data.format]} for row in part])

        trainer = trl.SFTTrainer if kind == "sft" else trl.DPOTrainer
        options |= {} if kind == "sft" else {"ref_model": reference(model)}
    else:
        from .contrastive import PairsTrainer

        encode, options["data_collator"] = encoder(data.format, processing, data.max_length, ready.labels)
        if data.format == "prompt-completion":
            require_counted_tokens(ready.rows, encode, data.max_length)

        def rows(part: tuple[Any, ...]) -> Any:
            return Examples(part, encode)

        trainer = PairsTrainer if kind == "pairs" else transformers.Trainer
        if ready.labels:
            options["compute_metrics"] = _accuracy
    evaluated = rows(ready.eval_rows) if ready.eval_rows else None
    try:
        return adapter_checkpoints(trainer)(model, train_dataset=rows(ready.rows), eval_dataset=evaluated, **options)
    except (ValueError, ImportError) as e:
        raise SpecError(f"trainer: {str(e).splitlines()[0]}", way_out="correct the arguments") from e


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # some classifiers return hidden states as well
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def plot_losses(curves: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw curves of losses by step, each with its label. A curve of up to five points has marks."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), "o-" if len(points) <= 5 else "-", label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    if any(curves.values()):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)

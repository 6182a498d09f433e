"""Train adapters as people train: optimizers, the Trainer of transformers, the trainers of TRL, and recipes.

from lorainject import training

groups = training.parameter_groups(model, lr=2e-4)          # LoRA+: a higher learning rate for B
trainer = training.adapter_checkpoints(Trainer(model, ...)) # checkpoints that hold the adapter and not the base
reference = training.reference(model)                       # the base as a reference model, without a second copy
results = training.sweep(model, runs, batches, loss, steps=100) # many adapters at once, on one base
result = training.train(training.Recipe.read("recipe.yaml"))    # a training as a file

Nothing here is imported by `import lorainject`. transformers is imported where a trainer is changed, TRL where a recipe
asks for it, and pydantic, which the extra `train` brings, where a recipe is used.
"""

from typing import TYPE_CHECKING, Any

from .optimizers import parameter_groups
from .reference import reference
from .runs import Run, RunResult, SweepResult
from .sweep import sweep
from .trainer import adapter_checkpoints

if TYPE_CHECKING:
    from .recipes.prepare import Preparation
    from .recipes.recipe import Recipe
    from .recipes.train import TrainingResult, train
    from .recipes.train_sweep import train_sweep

__all__ = [
    "Preparation", "Recipe", "Run", "RunResult", "SweepResult", "TrainingResult", "adapter_checkpoints",
    "parameter_groups", "reference", "sweep", "train", "train_sweep",
]  # fmt: skip
MODULES = {
    "Preparation": "recipes.prepare", "Recipe": "recipes.recipe", "TrainingResult": "recipes.train",
    "train": "recipes.train", "train_sweep": "recipes.train_sweep",
}  # fmt: skip
"""The modules of names that are imported when they are used."""


def __getattr__(name: str) -> Any:
    """Import what recipes need when it is used."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{MODULES[name]}", __name__), name)

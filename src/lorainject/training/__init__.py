"""Train adapters as people train: optimizers, the Trainer of transformers, the trainers of TRL, and recipes.

from lorainject import training

groups = training.parameter_groups(model, lr=2e-4)          # LoRA+: a higher learning rate for B
trainer = training.adapter_checkpoints(Trainer(model, ...)) # checkpoints that hold the adapter and not the base
reference = training.reference(model)                       # the base as a reference model, without a second copy
result = training.train(training.Recipe.read("recipe.yaml"))    # a training as a file

Nothing here is imported by `import lorainject`. transformers is imported where a trainer is changed, TRL where a recipe
asks for it, and pydantic, which the extra `train` brings, where a recipe is used.
"""

from typing import TYPE_CHECKING, Any

from .optimizers import parameter_groups
from .reference import reference
from .trainer import adapter_checkpoints

if TYPE_CHECKING:
    from .prepare import Preparation
    from .recipe import Recipe
    from .run import TrainingResult, train

__all__ = [
    "Preparation", "Recipe", "TrainingResult", "adapter_checkpoints", "parameter_groups", "reference", "train",
]  # fmt: skip
MODULES = {"Preparation": "prepare", "Recipe": "recipe", "TrainingResult": "run", "train": "run"}
"""The modules of names that are imported when they are used."""


def __getattr__(name: str) -> Any:
    """Import what recipes need when it is used."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{MODULES[name]}", __name__), name)

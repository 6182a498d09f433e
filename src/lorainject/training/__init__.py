"""Train adapters as people train: optimizers, the Trainer of transformers, and the trainers of TRL.

from lorainject import training

groups = training.parameter_groups(model, lr=2e-4)          # LoRA+: a higher learning rate for B
trainer = training.adapter_checkpoints(Trainer(model, ...)) # checkpoints that hold the adapter and not the base
reference = training.reference(model)                       # the base as a reference model, without a second copy
results = training.sweep(model, runs, batches, loss, steps=100) # many adapters at once, on one base

Nothing here is imported by `import lorainject`. transformers is imported where a trainer is changed, and TRL nowhere.
"""

from .optimizers import parameter_groups
from .reference import reference
from .runs import Run, RunResult, SweepResult
from .sweep import sweep
from .trainer import adapter_checkpoints

__all__ = ["Run", "RunResult", "SweepResult", "adapter_checkpoints", "parameter_groups", "reference", "sweep"]

"""The recipe of a training, as a part of the model card that the Trainer writes (README.md on the hub)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import SETTINGS, describe

ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "bf16", "fp16",
    "seed",
)  # fmt: skip
"""The arguments of the trainer that the recipe lists."""


def add_recipe(path: Path, model: nn.Module, args: Any, history: list[dict[str, Any]]) -> None:
    """Add the base model, the settings of the adapters, the trainer's arguments and its last metrics to a model card.

    Args:
        path: The README.md that the Trainer has just written.
        model: The model with its adapters.
        args: The TrainingArguments.
        history: What the Trainer has logged.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    base = getattr(getattr(model, "config", None), "_name_or_path", "")
    if base and not Path(base).is_dir():
        card.data.base_model = base
    card.data.library_name = "lorainject"
    card.data.tags = sorted({*(card.data.tags or ()), "lora", "lorainject"})
    card.text = f"{card.text.rstrip()}\n\n{recipe(model, base or type(model).__name__, args, history)}"
    card.save(path)


def recipe(model: nn.Module, base: str, args: Any, history: list[dict[str, Any]]) -> str:
    """Return the recipe as Markdown."""
    manifest = describe(model)
    rows = Counter(
        (name, re.sub(r"(?<=\.)\d+(?=\.)", "*", site), *(settings.get(key, "") for key in SETTINGS))
        for name, sites in manifest["adapters"].items()
        for site, settings in sites.items()
    )
    arguments = {key: getattr(args, key) for key in ARGUMENTS if hasattr(args, key)}
    metrics: dict[str, Any] = {}
    for entry in history:
        metrics |= {key: v for key, v in entry.items() if key.startswith("eval_") or key in ("loss", "train_loss")}
    lines = [
        "## Adapter",
        "",
        f"LoRA for `{base}`, trained with lorainject: load the base, then call `lorainject.load(model, path)`.",
        "",
        *_table(("adapter", "weights", "number", *SETTINGS),
                [(*row[:2], count, *row[2:]) for row, count in rows.items()]),
        "",
        f"Active: {', '.join(manifest['active'])}.",
        "",
        *_table(("argument", "value"), [(key, getattr(value, "value", value)) for key, value in arguments.items()]),
        "",
    ]  # fmt: skip
    if metrics:
        lines += [*_table(("metric", "last value"), list(metrics.items())), ""]
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (header, ("---",) * len(header), *rows)]

"""What a recipe comes to, before any weight is loaded: the plan on the meta device, the data, the steps, the memory.

`prepare` takes the sections that are valid and lists what is wrong with them all at once, so that one run of a recipe
shows every mistake in it. Of the model it reads the config, and of the data everything.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...errors import LoraError, SpecError
from ...plan import Plan
from ...spec import LoraSpec
from ...targets.resolve import find
from ..runs import Run
from .data import Row, label_names, read_rows, with_roles
from .sections import CLASSES, FORMATS, Data, Model, Output

NOT_IN_SWEEPS = {
    "gradient_accumulation_steps": 1, "label_smoothing_factor": 0, "neftune_noise_alpha": None, "bf16": False,
    "fp16": False, "torch_compile": False, "eval_strategy": "no", "load_best_model_at_end": False,
}  # fmt: skip
"""Arguments of the trainer that change a training, and that a sweep does not carry out, with the values that do not."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a recipe comes to. It prints as a plan, a table of memory and the number of steps."""

    plans: tuple[Plan, ...]
    """The sites, and what trains besides A and B: one plan, or one for each run of a sweep."""
    spec: LoraSpec
    """The settings of the adapter."""
    runs: Mapping[str, Run]
    """The runs of a sweep. Empty if one adapter is trained."""
    rows: tuple[Row, ...]
    """The rows that are trained on, by role."""
    eval_rows: tuple[Row, ...]
    """The rows that are evaluated on."""
    labels: tuple[str, ...]
    """The names of the classes, for classification."""
    arguments: Any
    """The trainer's arguments, a dataclass of transformers or TRL."""
    base_bytes: int
    """The memory of the base weights."""

    @property
    def plan(self) -> Plan:
        """The first plan."""
        return self.plans[0]

    @property
    def steps(self) -> int:
        """The number of steps of the optimizer on one device. TRL's packing makes them fewer."""
        args = self.arguments
        if args.max_steps > 0:
            return int(args.max_steps)
        size = args.per_device_train_batch_size
        batches = len(self.rows) // size if args.dataloader_drop_last else math.ceil(len(self.rows) / size)
        return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))

    @property
    def memory(self) -> dict[str, int | None]:
        """The memory in bytes, without activations. The optimizer's is None unless it is one of torch's Adam or SGD."""
        optimizer = str(getattr(self.arguments.optim, "value", self.arguments.optim))
        states = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}.get(optimizer)
        sites = sum(site.trainable * site.dtype.itemsize for plan in self.plans for site in plan)
        trained = sum(plan.bytes for plan in self.plans)
        return {
            "base weights": self.base_bytes, "A and B": sites, "other trained tensors": trained - sites,
            "gradients": trained, "optimizer state": None if states is None else states * trained,
        }  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return the figures as values of JSON."""
        counts = {"steps": self.steps, "rows": len(self.rows), "eval_rows": len(self.eval_rows)}
        trainable = sum(plan.trainable for plan in self.plans)
        plan = {"sites": sum(map(len, self.plans)), "trainable": trainable, "total": self.plan.total}
        return {**plan, **counts, "memory": {key.replace(" ", "_"): size for key, size in self.memory.items()}}

    def __str__(self) -> str:
        rows = [f"  {name:22}{'not known' if size is None else f'{size / 1024:,.1f} KiB':>18}"
                for name, size in self.memory.items()]  # fmt: skip
        classes = [f"classes: {', '.join(f'{n} = {name}' for n, name in enumerate(self.labels))}"] * bool(self.labels)
        counts = f"{self.steps:,} steps; {len(self.rows):,} rows to train on, {len(self.eval_rows):,} to evaluate on"
        plans = [f"run {name}: r {run.spec.r}, learning rate {run.lr:g}\n{plan}"
                 for (name, run), plan in zip(self.runs.items(), self.plans, strict=False)]  # fmt: skip
        return "\n".join([*(plans or [str(self.plan)]), "memory without activations:", *rows, *classes, counts])


def prepare(sections: Mapping[str, Any]) -> Preparation:
    """Return what a recipe comes to.

    Args:
        sections: The sections by name. One that is missing is left out of the checks.

    Raises:
        SpecError: With everything that is wrong.
    """
    problems = list(setting_problems(sections))
    sweep = sections.get("sweep")
    is_sweep = sweep is not None and bool(sweep.root)
    model, lora, data, trainer, output = map(sections.get, ("model", "lora", "data", "trainer", "output"))
    spec = meta = arguments = None
    plans: list[Plan] = []
    runs: dict[str, Run] = {}
    rows: list[Row] = []
    eval_rows: list[Row] = []
    if output is not None:
        problems += _folder_problems(output)
    if trainer is not None:
        with _listed(problems):
            directory, length = (output and output.directory) or Path("."), data.max_length if data else 512
            arguments = trainer.arguments(directory, length)
    if data is not None:
        with _listed(problems):
            seed = getattr(arguments, "seed", 42)
            rows, eval_rows = _split(data, seed)
    if arguments is not None and data is not None:
        problems += _row_problems(arguments, rows, eval_rows)
    labels = label_names([*rows, *eval_rows]) if data is not None and data.format in ("label", "image") else []
    if len(labels) == 1 and (model is None or model.num_labels in (None, 1)):
        problems.append(f"data: every label is {labels[0]!r}, and a classifier needs two classes")
    if model is not None:
        if model.num_labels is not None and model.num_labels < len(labels):
            problems.append(f"model.num_labels is {model.num_labels}, and the data have {len(labels)} classes")
        with _listed(problems):
            meta = meta_model(model, labels)
    if meta is not None and lora is not None:
        with suppress(SpecError):  # whose problems are listed already
            spec = lora.spec()
    if meta is not None and spec is not None:
        labels = class_names(meta.config, labels)
        if not is_sweep:
            with _listed(problems, "lora: "):
                plans = [find(meta, spec=spec)]
        elif arguments is not None:
            with _listed(problems):
                runs = sections["sweep"].runs(lora, arguments)
            for name, run in runs.items():
                with _listed(problems, f"sweep.{name}: "):
                    plans.append(find(meta, spec=run.spec, name=name))
        if plans and model is not None and model.class_.endswith("classification"):
            problems += _new_head(model, meta, plans)
    if problems or spec is None or meta is None:
        raise SpecError("the recipe cannot be trained:", problems, "correct it and run it again; nothing was loaded")
    base_bytes = sum(p.numel() * p.element_size() for p in meta.parameters())
    return Preparation(
        plans=tuple(plans), spec=spec, runs=runs,
        rows=tuple(rows), eval_rows=tuple(eval_rows), labels=tuple(labels), arguments=arguments,
        base_bytes=base_bytes,
    )  # fmt: skip


def setting_problems(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with settings as far as the recipe alone tells."""
    model, lora, data, trainer = map(sections.get, ("model", "lora", "data", "trainer"))
    if lora is not None:
        try:
            lora.spec()
        except SpecError as e:
            yield from (f"lora: {problem}" for problem in e.problems)
    if data is not None:
        if (data.path is None) == (data.dataset is None):
            yield "data: name either a path or a dataset"
        evaluations = [key for key in ("eval_path", "eval_split", "eval_fraction") if getattr(data, key)]
        if len(evaluations) > 1:
            yield f"data: only one of {', '.join(evaluations)} can say what is evaluated on"
        if data.dataset is None and (data.subset or data.eval_split):
            yield "data: subset and eval_split go with dataset, not with path"
    if (sweep := sections.get("sweep")) is not None and sweep.root:
        yield from _sweep_problems(sections)
    if model is not None and trainer is not None:
        by_class = FORMATS[trainer.kind]
        if model.class_ not in by_class:
            yield f"trainer.kind {trainer.kind!r} trains {' or '.join(by_class)}, not model.class {model.class_!r}"
        elif data is not None and data.format not in by_class[model.class_]:
            expected = " or ".join(map(repr, by_class[model.class_]))
            yield f"data.format: {trainer.kind!r} for {model.class_} takes {expected}, not {data.format!r}"


def _row_problems(arguments: Any, rows: list[Row], eval_rows: list[Row]) -> Iterator[str]:
    """Yield what the trainer's arguments and the number of rows cannot do together."""
    size = arguments.per_device_train_batch_size
    if rows and arguments.dataloader_drop_last and len(rows) < size:
        yield f"trainer.dataloader_drop_last: {len(rows)} rows do not fill one batch of {size}"
    if not eval_rows and str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no":
        yield "trainer.eval_strategy: there is nothing to evaluate on: set data.eval_path, eval_split or eval_fraction"


def _sweep_problems(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a sweep cannot do."""
    lora, trainer, output = map(sections.get, ("lora", "trainer", "output"))
    if trainer is not None and trainer.kind not in ("trainer", "pairs"):
        yield f"sweep goes with trainer.kind 'trainer' or 'pairs', not {trainer.kind!r}"
    if trainer is not None:
        settings = {"gradient_accumulation_steps": 1} | trainer.settings
        unknown = [key for key in NOT_IN_SWEEPS if settings.get(key) not in (None, False, 0, "no", NOT_IN_SWEEPS[key])]
        yield from (f"sweep: trainer.{key} must be left out" for key in unknown)
    if lora is not None and lora.optimizer is not None:
        yield "sweep: every run has one learning rate; leave lora.optimizer out"
    if output is not None and (output.merged or output.resume):
        yield "sweep: output.merged and output.resume go with one adapter"


def meta_model(model: Model, labels: list[str]) -> Any:
    """Build the model of a recipe on the meta device, from its config.

    Args:
        model: The section.
        labels: The classes of the data.
    """
    import transformers

    try:
        config = load_config(model, labels)
        dtype = getattr(config, "dtype", None) if model.dtype == "auto" else getattr(torch, model.dtype)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # some classes draw random numbers on the CPU
            return getattr(transformers, CLASSES[model.class_]).from_config(config, dtype=dtype or torch.float32)
    except (OSError, ValueError) as e:
        what = f"model.path: {model.path} cannot be loaded as {model.class_}: {str(e).strip().splitlines()[0]}"
        raise SpecError(what, way_out="give a directory with config.json, or a name on the hub") from e


def _new_head(model: Model, meta: Any, plans: Sequence[Plan]) -> Iterator[str]:
    """Yield the parameters of a classifier's head that the base lacks and that do not train: they would stay random."""
    stored = _stored_names(Path(model.source))
    trained = {f"{t.path}.{t.parameter}" for t in plans[0].tensors}
    head = [name for name, _ in meta.named_parameters() if not name.startswith(f"{meta.base_model_prefix}.")]
    if stored and (new := [name for name in head if name not in stored | trained]):
        modules = sorted({name.rpartition(".")[0] for name in new})
        yield (f"model.path: {model.path} lacks {', '.join(new)}, which would stay random: write lora.modules_to_save:"
               f" [{', '.join(modules)}]")  # fmt: skip


def _stored_names(folder: Path) -> set[str]:
    """Return the names of the weights in a local checkpoint; none for a name on the hub and other files."""
    if (index := folder / "model.safetensors.index.json").is_file():
        return {*json.loads(index.read_text(encoding="utf-8"))["weight_map"]}
    if not (file := folder / "model.safetensors").is_file():
        return set()
    with safe_open(file, "pt") as tensors:
        return {*tensors.keys()}


def load_config(model: Model, labels: list[str]) -> Any:
    """Return the config of the base, with the classes of the data unless they are among those that it knows.

    Args:
        model: The section.
        labels: The classes of the data.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.source)
    if labels and class_names(config, labels) is labels:
        config.num_labels = model.num_labels or len(labels)
        if config.num_labels == len(labels):
            config.id2label = dict(enumerate(labels))
            config.label2id = {name: n for n, name in enumerate(labels)}
    return config


def class_names(config: Any, labels: list[str]) -> list[str]:
    """Return the classes that a config knows by name, in its order, if the data have no others; else those of the data.

    The classes of a config without names (LABEL_0, LABEL_1) are not known. Labels that are numbers are in order anyhow.
    """
    if not labels:
        return labels
    known = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    is_named = bool(known) and not all(name == f"LABEL_{n}" for n, name in enumerate(known))
    if is_named and labels == [str(n) for n in range(len(labels))] and len(labels) <= len(known):
        return [str(n) for n in range(len(known))]
    return known if {*labels} <= {*known} else labels


def _split(data: Data, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the rows to evaluate on."""
    problems: list[str] = []
    parts: list[list[Row]] = []
    for source in ((data.path, data.split), (data.eval_path, data.eval_split)):
        rows: list[Row] = []
        if source[0] or (data.dataset and source[1]):
            with _listed(problems):
                rows = _load(data, *source)
        parts.append(rows)
    if problems:
        raise SpecError("data:", problems, "correct the data")
    if data.eval_fraction:
        rows = parts[0]
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        held_out = max(1, round(data.eval_fraction * len(rows)))
        parts = [[rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]]
    if not parts[0]:
        raise SpecError(f"data: {data.path or data.dataset} leaves no rows to train on", way_out="add rows")
    return parts[0], parts[1]


def _load(data: Data, path: Path | None, split: str | None) -> list[Row]:
    if path is not None:
        return with_roles(read_rows(path), data.format, data.columns, str(path), path.parent)
    try:
        import datasets

        rows = list(datasets.load_dataset(data.dataset, data.subset, split=split))
    except ModuleNotFoundError as e:
        raise LoraError("data.dataset needs the package datasets", way_out="pip install datasets") from e
    except (OSError, ValueError, RuntimeError) as e:
        what = f"data.dataset: {data.dataset} cannot be loaded: {str(e).strip().splitlines()[0]}"
        raise LoraError(what, way_out="check the name and the connection") from e
    return with_roles(rows, data.format, data.columns, f"{data.dataset} ({split})", Path("."))


def _folder_problems(output: Output) -> Iterator[str]:
    """Yield what speaks against writing into the folder: a file in its place, and files of other origin in it."""
    folder = output.directory
    if folder.exists() and not folder.is_dir():
        yield f"output.directory: {folder} is a file"
    elif not output.resume and folder.is_dir() and any(folder.iterdir()):
        is_training = (folder / "recipe.yaml").exists() or any(folder.glob("checkpoint-*"))
        go_on = "set output.resume=true to go on from its last checkpoint, or " if is_training else ""
        what = "holds an earlier training" if is_training else "is not empty"
        yield f"output.directory: {folder} {what}: {go_on}name another folder"


@contextmanager
def _listed(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Add the problems of a LoraError within the context to the list, instead of raising it."""
    try:
        yield
    except LoraError as e:
        what = [line for line in str(e).splitlines()[:1] if not e.problems]
        problems += [prefix + line for line in (*e.problems, *what)]

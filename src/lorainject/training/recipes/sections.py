"""The sections of a recipe, as pydantic models that refuse unknown keys.

Settings of LoRA are checked by LoraSpec and arguments of the trainer by the trainer's own dataclass, so that neither is
described a second time here.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError

from ...errors import LoraError, SpecError
from ...spec import PEFT_SETTINGS, LoraSpec
from ...spec.yaml_file import from_plain
from ..runs import Run

CLASSES = {
    "causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification",
    "embeddings": "AutoModel", "vision-classification": "AutoModelForImageClassification",
}  # fmt: skip
"""Classes of models, with the class of transformers that loads them."""
FORMATS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "trainer": {
        "causal-lm": ("text", "chat", "prompt-completion"), "sequence-classification": ("label",),
        "vision-classification": ("image",),
    },
    "sft": {"causal-lm": ("text", "chat", "prompt-completion")},
    "dpo": {"causal-lm": ("preference",)},
    "pairs": {"embeddings": ("pair",)},
}  # fmt: skip
"""The formats of data that go with each kind of trainer and class of model."""
CONFIGS = {
    "trainer": ("transformers", "TrainingArguments"), "pairs": ("transformers", "TrainingArguments"),
    "sft": ("trl", "SFTConfig"), "dpo": ("trl", "DPOConfig"),
}  # fmt: skip
"""The dataclass of each trainer's arguments, with its package."""
SET_ELSEWHERE = {"output_dir": "output.directory", "max_length": "data.max_length",
                 "resume_from_checkpoint": "output.resume", "remove_unused_columns": ""}  # fmt: skip
"""Arguments of the trainer that the recipe sets, with the keys that they come from."""
BOUNDS: Mapping[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 2**20), "per_device_eval_batch_size": (1, 2**20),
    "gradient_accumulation_steps": (1, 2**20), "dataloader_num_workers": (0, 2**10), "learning_rate": (0, 1e6),
    "weight_decay": (0, 1e6), "max_grad_norm": (0, 1e30), "seed": (0, 2**32 - 1), "num_train_epochs": (0, 1e9),
}  # fmt: skip
"""The least and the most of arguments that the trainers take unseen, and fail with later."""
PACKAGE = "package:"
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)


class Model(Section):
    """The base model."""

    path: str
    """A directory, a name on the Hugging Face hub, or `package:NAME` for a Python package that holds a model."""
    class_: Literal["causal-lm", "sequence-classification", "embeddings", "vision-classification"] = Field(
        "causal-lm", alias="class"
    )
    """What the model computes."""
    dtype: Dtype | Literal["auto"] = "float32"
    """The dtype of the base weights; `auto` is that of the checkpoint."""
    num_labels: int | None = Field(None, ge=1)
    """The number of classes. None means as many as the data have."""

    @property
    def source(self) -> str:
        """The directory or the name on the hub. Raise SpecError if the package does not hold a model."""
        if not self.path.startswith(PACKAGE):
            return self.path
        name = self.path.removeprefix(PACKAGE)
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        folders = spec.submodule_search_locations if spec is not None else None
        configs = [path for folder in folders or () for path in Path(folder).glob("**/config.json")]
        if not configs:
            what = f"{self.path}: there is no package {name!r}, or it holds no model"
            raise SpecError(what, way_out=f"pip install {name.replace('_', '-')}")
        return str(min(configs, key=lambda path: len(path.parts)).parent)


class Optimizer(Section):
    """What the optimizer does differently for A and B."""

    lr_ratio_b: float = Field(16.0, gt=0)
    """The learning rate of B, divided by that of A (LoRA+)."""


class Lora(Section):
    """The settings of LoraSpec, and the optimizer's for A and B."""

    targets: list[str] | str
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    exclude: list[str] = []
    layers: list[int] | None = None
    scaling: str = "standard"
    init: str = "kaiming"
    dtype: Dtype | None = None
    overrides: dict[str, dict[str, int | float]] = {}
    dora: bool = False
    modules_to_save: list[str] = []
    bias: str = "none"
    trainable_tokens: dict[str, list[int]] = {}
    optimizer: Optimizer | None = None

    def spec(self) -> LoraSpec:
        """Return the LoraSpec. Raise SpecError with every invalid value."""
        return LoraSpec(**from_plain(self.model_dump(exclude={"optimizer"}, exclude_unset=True)))


class Data(Section):
    """What the model is trained with: a file, or a data set of the package `datasets`."""

    path: Path | None = None
    """A file: .jsonl, .json, .csv, .parquet, or .txt with one text per line."""
    dataset: str | None = None
    """A name or directory that `datasets.load_dataset` loads, instead of `path`."""
    subset: str | None = None
    """The configuration of `dataset`."""
    split: str = "train"
    """The split of `dataset` that is trained on."""
    format: Literal["text", "chat", "prompt-completion", "pair", "label", "preference", "image"]
    """What a row is."""
    columns: dict[str, str] = {}
    """The columns of roles that are called otherwise in the data, as in {text: sentence}."""
    eval_path: Path | None = None
    """A file to evaluate on."""
    eval_split: str | None = None
    """The split of `dataset` to evaluate on."""
    eval_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """The share of the rows that is held out, to evaluate on."""
    max_length: int = Field(512, ge=1)
    """The number of tokens that are kept of each text."""


class TrainerSection(Section):
    """The trainer and its arguments: those of transformers' TrainingArguments, or TRL's SFTConfig or DPOConfig."""

    model_config = ConfigDict(extra="allow", title="Trainer")
    kind: Literal["trainer", "sft", "dpo", "pairs"] = "trainer"
    """transformers' Trainer, TRL's SFTTrainer or DPOTrainer, or contrastive training on pairs."""

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, as they are written in the recipe."""
        return dict(self.model_extra or {})

    def arguments(self, directory: Path, max_length: int) -> Any:
        """Return the trainer's arguments as its dataclass.

        Raises:
            LoraError: An argument has a value of another type, or the dataclass refuses it, or TRL is missing.
        """
        cls = arguments_class(self.kind)
        if cls is None:
            raise LoraError(f"trainer.kind: {self.kind} needs the package trl", way_out="pip install trl")
        hints, values, problems = typing.get_type_hints(cls), dict[str, Any](), []
        for key, value in self.settings.items():
            try:  # YAML reads 2e-4 as a text, which this makes a number
                values[key] = TypeAdapter(hints[key]).validate_python(value)
            except ValidationError as e:
                problems.append(f"trainer.{key}: {e.errors()[0]['msg']}, not {value!r}")
        for key, (least, most) in BOUNDS.items():
            if key in values and not (values[key] is not None and least <= values[key] <= most):
                problems.append(f"trainer.{key} must be from {least:g} to {most:g}, not {values[key]!r}")
        problems += [f"trainer.{key}: recipes do not shard models" for key in ("fsdp", "deepspeed") if values.get(key)]
        if problems:
            raise SpecError("invalid arguments:", problems, "correct them")
        preset: dict[str, Any] = {"report_to": "none", "logging_steps": 1, "output_dir": str(directory)}
        if not torch.cuda.is_available():
            preset["dataloader_pin_memory"] = False
        preset |= {"remove_unused_columns": False} if CONFIGS[self.kind][0] == "transformers" else {
            "max_length": max_length, "bf16": torch.cuda.is_available()}  # fmt: skip
        try:
            return cls(**preset | values)
        except (ValueError, TypeError, ImportError, OSError) as e:
            raise SpecError(f"trainer: {str(e).splitlines()[0]}", way_out="correct the arguments") from e


class Output(Section):
    """What is written, and where."""

    directory: Path
    """A folder for checkpoints, the adapter, the report, the loss curve and the recipe."""
    merged: bool = False
    """Write the merged model as well."""
    resume: bool = False
    """Go on from the last checkpoint in `directory`, if there is one."""


RUN_SETTINGS = {f"lora.{name}" for name in Lora.model_fields if name != "optimizer"}
RUN_SETTINGS |= {"trainer.learning_rate", "trainer.seed"}
"""What a run of a sweep can set."""


class Sweep(RootModel[dict[str, dict[str, Any]]]):
    """Adapters that are trained at once, by name, each with settings in place of those of the recipe, such as
    {r4: {lora.r: 4}, r4-fast: {lora.r: 4, trainer.learning_rate: 1e-2}}."""

    model_config = ConfigDict(frozen=True)

    def runs(self, lora: Lora, arguments: Any) -> dict[str, Run]:
        """Return the run of each adapter. Raise SpecError with every setting that is invalid.

        Args:
            lora: The section of the recipe.
            arguments: The trainer's arguments, with the learning rate and the seed of runs that set none.
        """
        runs, problems = dict[str, Run](), []
        for name, settings in self.root.items():
            changed = {key.removeprefix("lora."): v for key, v in settings.items() if key.startswith("lora.")}
            others = {key: v for key, v in settings.items() if not key.startswith("lora.")}
            if unknown := sorted(settings.keys() - RUN_SETTINGS):
                problems += [f"sweep.{name}.{key}: {_no_run_setting(key)}" for key in unknown]
                continue
            rate = others.get("trainer.learning_rate", arguments.learning_rate)
            seed = others.get("trainer.seed", arguments.seed)
            try:
                spec = Lora.model_validate(lora.model_dump(exclude_unset=True) | changed).spec()
                seed = TypeAdapter(Annotated[int, Field(ge=0, lt=2**32)]).validate_python(seed)
                runs[name] = Run(spec=spec, lr=TypeAdapter(float).validate_python(rate), seed=seed)
            except ValidationError as e:
                places = ((".".join(map(str, x["loc"])) or "trainer", x["msg"]) for x in e.errors())
                problems += [f"sweep.{name}: {place}: {reason}" for place, reason in places]
            except SpecError as e:
                problems += [f"sweep.{name}: {problem}" for problem in e.problems]
        if problems:
            raise SpecError("invalid runs:", problems, "correct them")
        return runs


def _no_run_setting(key: str) -> str:
    near = difflib.get_close_matches(key, RUN_SETTINGS, 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"a run sets lora.*, trainer.learning_rate and trainer.seed{meant}"


def arguments_class(kind: str) -> Any:
    """Return the dataclass of a trainer's arguments, or None if its package is not installed."""
    package, name = CONFIGS[kind]
    return getattr(importlib.import_module(package), name) if importlib.util.find_spec(package) else None


def known_keys(section: type[BaseModel], kind: Any) -> tuple[set[str], dict[str, str]] | None:
    """Return the keys that a section can have, and what to write instead of others.

    Args:
        section: The class of the section.
        kind: What the recipe has as `trainer.kind`.

    Returns:
        None if that depends on a package that is not installed, or on a kind that does not exist, and for a sweep,
        whose keys are names of runs.
    """
    if issubclass(section, RootModel):
        return None
    keys = {field.alias or name for name, field in section.model_fields.items()}
    if section is Lora:
        return keys, {key: ours for key, names in PEFT_SETTINGS.items() for ours in names if ours in keys}
    if section is not TrainerSection:
        return keys, {}
    cls = arguments_class(kind) if isinstance(kind, str) and kind in CONFIGS else None
    if cls is None:
        return None
    return keys | {f.name for f in dataclasses.fields(cls) if f.init} - set(SET_ELSEWHERE), SET_ELSEWHERE

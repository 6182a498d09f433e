"""Trainers whose checkpoints hold the adapters and nothing of the base.

`adapter_checkpoints` derives a class from that of a trainer, as a graft does from that of a module, and gives it to the
trainer. The training itself is the trainer's own; what changes is what is written and read:

    output_dir/checkpoint-8/adapter_model.safetensors, ...    the adapters (checkpoint.py)
    output_dir/checkpoint-8/optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json    as the Trainer writes them
    output_dir/_lorainject-unfinished/checkpoint-8            while the checkpoint is being written

A checkpoint gets its name when all of it is on the disk. A process that is killed while it writes therefore leaves
nothing that looks like a checkpoint, neither to this trainer nor to any other program, and the next checkpoint deletes
what it has left. The name begins with "_" because the Trainer uploads no such file to the hub.

A trainer's constructor has decided several things before `adapter_checkpoints(trainer)` can act: that a quantized model
is refused, that A and B are cast to bfloat16 beside 4-bit weights (TRL), that a second base is loaded as the reference.
The class `adapter_checkpoints(SFTTrainer)` has a constructor that prevents them.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..errors import FileError, StateError
from ..files.io.atomic_write import sync_folder
from ..lora.model_index import ModelIndex
from .checkpoint import has_adapters, load_adapters, save_adapters
from .model_card import add_recipe
from .reference import Reference

UNFINISHED = "_lorainject-unfinished"
"""The folder beside the checkpoints in which one is written."""
T = TypeVar("T")
Untyped: Any = object


def adapter_checkpoints(trainer: T) -> T:
    """Let a trainer write and read checkpoints that hold the adapters, and return the same trainer.

    A checkpoint has the adapters as `li.save` writes them, the states of the optimizer, the scheduler and the random
    generators, and the trainer's state; nothing of the base. A training that is resumed from it goes on to the bit,
    whether the model carries the adapters or is the bare base model, which then gets them from the checkpoint.
    Checkpoints of an unchanged Trainer are read as well. `save_model` and the hub get the adapters alone, too, and the
    model card their recipe.

    Args:
        trainer: A trainer of transformers or TRL: an instance, whose class is changed; or a class, of which a derived
            class is returned. The class is needed for quantized models, and for trainers of TRL that need a reference
            model: its constructor lets quantized models train, keeps the dtype of A and B, and takes
            `ref_model=reference(model)`, also where TRL's own constructor does not (GRPO, RLOO).

    Returns:
        The trainer, or the derived class.

    Raises:
        StateError: The trainer shards the model (FSDP, DeepSpeed), or its model carries adapters of PEFT.
    """
    if isinstance(trainer, type):
        return cast(T, _derived(cast(Any, trainer)))
    _require_supported(trainer)
    reference = getattr(trainer, "ref_model", None)
    if isinstance(reference, nn.Module) and not isinstance(reference, Reference):
        warnings.warn(
            "this trainer has loaded a second base as its reference, and compares with the base even if the adapter was"
            f" trained before. Derive the class instead: adapter_checkpoints({type(trainer).__name__})(model,"
            " ref_model=training.reference(model), ...)",
            stacklevel=2,
        )
    if not isinstance(trainer, AdapterCheckpoints):
        trainer.__class__ = _derived(cast(Any, type(trainer)))
    return trainer


@functools.cache
def _derived(cls: Any) -> Any:
    if issubclass(cls, AdapterCheckpoints):
        return cls
    return type(
        f"Lora{cls.__name__}", (AdapterCheckpoints, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}
    )


class AdapterCheckpoints(Untyped):  # type: ignore[misc]
    """What `adapter_checkpoints` puts on top of a trainer's class. It overrides methods of transformers' Trainer."""

    _staging: str | None = None
    """The folder in which a checkpoint is being written."""

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any) -> None:
        signature = inspect.signature(super().__init__)
        if takes_reference := "ref_model" in signature.parameters:
            kwargs |= {} if ref_model is None else {"ref_model": ref_model}
        passed = signature.bind_partial(*args, **kwargs).arguments
        model, ref_model = passed.get("model"), passed.get("ref_model", ref_model)
        # TRL's trainers with reward functions make their reference themselves, unless beta is 0.
        settings: Any = passed.get("args")
        beta = getattr(settings, "beta", 0.0) if "reward_funcs" in signature.parameters else 0.0
        needs_reference = takes_reference and not getattr(settings, "precompute_ref_log_probs", False)
        is_injected = isinstance(model, nn.Module) and bool(ModelIndex(model).sites)
        problems = []
        if is_injected and passed.get("peft_config") is not None:
            problems.append("peft_config was passed, and would put a second adapter on top: leave it out")
        if is_injected and ref_model is None and (needs_reference or beta):
            problems.append(
                "no reference was passed, so that the trainer would load the base a second time, and compare with it"
                " even if the adapter is trained already: pass ref_model=training.reference(model) for the base, or"
                " ref_model=training.reference(model, name) for the base with an adapter"
            )
        if ref_model is not None and not (takes_reference or beta):
            problems.append("ref_model was passed to a trainer that uses none (GRPO and RLOO: set beta above 0)")
        if isinstance(ref_model, Reference) and getattr(settings, "sync_ref_model", False):
            problems.append(
                "sync_ref_model would copy the policy onto a reference that shares its memory: set it False"
            )
        if problems:
            raise StateError(f"no {type(self).__name__} was made:", problems, "correct the arguments and call again")
        if ref_model is None or takes_reference:
            with _as_trainable(model if is_injected else None):
                super().__init__(*args, **kwargs)
        else:
            settings.beta = 0.0
            try:
                with _as_trainable(model if is_injected else None):
                    super().__init__(*args, **kwargs)
            finally:
                settings.beta = beta
            self.beta, self.ref_model = beta, self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        _require_supported(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, if the model carries an adapter."""
        if not ModelIndex(self.model).sites:
            raise StateError(
                "the model carries no adapter, so that the trainer would train the base and save nothing of it",
                way_out="call inject(model, targets) before the training, or resume from a checkpoint of adapters",
            )
        return super().create_optimizer(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        from transformers.trainer import TRAINER_STATE_NAME
        from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

        run = self._get_output_dir(trial)
        staging, name = os.path.join(run, UNFINISHED), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, final = os.path.join(staging, name), os.path.join(run, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        is_best = self.state.best_model_checkpoint == written
        if is_best:
            self.state.best_model_checkpoint = final
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            _finish(written, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run, save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True,
            )  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what the Trainer writes with a model, with the adapters in the model's place."""
        from transformers.trainer import TRAINING_ARGS_NAME

        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(folder, exist_ok=True)
        save_adapters(self.model, folder, others_are_kept=self._staging is not None)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if UNFINISHED in Path(resume_from_checkpoint).parts:
            raise FileError(
                f"{resume_from_checkpoint} was not written to its end",
                way_out="pass resume_from_checkpoint=True, which takes the last whole checkpoint",
            )
        if not has_adapters(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_adapters(self.model, resume_from_checkpoint)
        if not os.path.isfile(os.path.join(resume_from_checkpoint, "optimizer.pt")):
            warnings.warn(
                f"{resume_from_checkpoint} was saved with save_only_model, so that the optimizer, the scheduler and the"
                " random generators start anew: the training will not go on as it would have",
                stacklevel=3,
            )

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if has_adapters(best):
            load_adapters(self.model, best, is_wrapped=self.model_wrapped is not self.model)
        else:
            super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card of the trainer, with the recipe of the adapters."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_recipe(Path(self.args.output_dir, "README.md"), self.model, self.args, self.state.log_history)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:  # it is pushed when it is whole
            return
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            save_adapters(self.model, self.args.output_dir, others_are_kept=True)
        super()._push_from_checkpoint(checkpoint_folder)


def _require_supported(trainer: Any) -> None:
    """Raise StateError if the checkpoints of a trainer cannot hold adapters alone."""
    problems = []
    for flag, engine in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        if getattr(trainer, flag, False):
            problems.append(f"{engine} shards A and B, and writes checkpoints of the whole model")
    if any(type(module).__module__.startswith("peft.") for module in trainer.model.modules()):
        problems.append("the model carries adapters of PEFT, for which the Trainer has checkpoints of its own")
    if problems:
        raise StateError(
            "this trainer cannot write checkpoints of adapters:",
            problems,
            "use the trainer without adapter_checkpoints",
        )


@contextmanager
def _as_trainable(model: Any) -> Iterator[None]:
    """Let a trainer's constructor take a quantized model with adapters, and leave its A and B as they are.

    transformers refuses to train a quantized model unless this flag says that it has adapters of PEFT. With the flag
    on, its save_pretrained and others would look for PEFT's config, so it is on within the constructor alone. TRL casts
    everything that trains beside 4-bit and 8-bit weights to bfloat16.
    """
    if model is None or not getattr(model, "is_quantized", False):
        yield
        return
    before = [(p, p.data) for p in model.parameters() if p.requires_grad]
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
        for p, data in before:
            if p.dtype != data.dtype:
                p.data = data.to(p.device)


def _finish(written: str, final: str) -> None:
    """Give a checkpoint its name, when all of it is on the disk. An older one of the name makes way."""
    for folder, _, files in os.walk(written):
        for file in files:
            fd = os.open(os.path.join(folder, file), os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        sync_folder(Path(folder))
    staging = os.path.dirname(written)
    if os.path.exists(final):
        os.replace(final, os.path.join(staging, "replaced"))
    os.replace(written, final)
    sync_folder(Path(final).parent)
    shutil.rmtree(staging)

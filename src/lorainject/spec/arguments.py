"""The settings of a LoraSpec as arguments of the verbs: read from them, and explained where PEFT's names are passed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from ..errors import SpecError
from .lora_spec import LoraSpec, Override, brief

PEFT_SETTINGS: dict[str, tuple[str, ...]] = {
    "target_modules": ("targets",), "target_parameters": ("targets",), "exclude_modules": ("exclude",),
    "lora_alpha": ("alpha",), "lora_dropout": ("dropout",), "lora_r": ("r",), "rank": ("r",),
    "layers_to_transform": ("layers",), "layers_pattern": ("layers",), "rank_pattern": ("overrides",),
    "alpha_pattern": ("overrides",), "use_rslora": ("scaling",), "init_lora_weights": ("init",), "use_dora": ("dora",),
    "trainable_token_indices": ("trainable_tokens",), "adapter_name": ("name", "names"),
    "adapter_names": ("names", "name"), "selected_adapters": ("name",), "peft_config": ("spec",),
    "lora_config": ("spec",), "config": ("spec",), "safe_merge": ("strict",), "fan_in_fan_out": (), "task_type": (),
    "inference_mode": (), "is_trainable": (), "safe_serialization": (), "low_cpu_mem_usage": (), "progressbar": (),
}  # fmt: skip
"""Arguments under PEFT's names, with the names that they have here; empty if they are not needed."""
EXAMPLES = {
    "targets": 'targets=["q_proj"], or targets=["re:..."] for a regular expression',
    "overrides": 'overrides={"k_proj": {"r": 4, "alpha": 8}}',
    "scaling": 'scaling="rslora"',
    "init": 'init="gaussian"',
    "layers": "layers=[0, 1]",
    "spec": "spec=LoraSpec(targets=[...], r=8)",
}
P = ParamSpec("P")
T = TypeVar("T")


def explains_settings(verb: Callable[P, T]) -> Callable[P, T]:
    """Let a function or class raise a SpecError that says what PEFT's arguments are called here, where it gets them."""
    if isinstance(verb, type):
        verb.__init__ = _explaining(verb.__init__, verb.__name__)  # type: ignore[misc]
        return verb
    return _explaining(verb, verb.__name__)


def _explaining(function: Callable[P, T], name: str) -> Callable[P, T]:
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        unknown = kwargs.keys() - known.keys()
        # Python's own error says enough of other keywords.
        if unknown.isdisjoint({*PEFT_SETTINGS, *LoraSpec.__dataclass_fields__}):
            return function(*args, **kwargs)
        problems = [f"{key}: {_in_our_words(key, known)}" for key in kwargs if key in unknown]
        way_out = f"correct them and call again; nothing was changed (help({name}) lists all arguments)"
        raise SpecError(f"{name} does not take these arguments:", problems, way_out)

    return wrapped


def _in_our_words(key: str, known: Mapping[str, inspect.Parameter]) -> str:
    """Return what to write in place of an argument that a function does not know."""
    names = PEFT_SETTINGS.get(key, (key,))
    if not names:
        return "leave it out, nothing here depends on it"
    if (ours := next((name for name in names if name in known), None)) is None:
        is_setting = not LoraSpec.__dataclass_fields__.keys().isdisjoint(names)
        return "inject sets it, and a file tells it" if is_setting else "there is no such argument"
    if known[ours].kind is inspect.Parameter.VAR_POSITIONAL:
        return "give the names without a keyword"
    return f"write {EXAMPLES.get(ours, f'{ours}=...')}"


def spec_from_arguments(spec: Any, targets: Any, **settings: Any) -> LoraSpec:
    """Return `spec`, or a LoraSpec of the targets and settings if it is None. A LoraConfig of PEFT is translated.

    Raises:
        SpecError: `spec` is something else, or was passed along with targets or with settings other than the defaults.
    """
    if spec is None:
        return LoraSpec(targets=() if targets is None else targets, **settings)
    if hasattr(spec, "peft_type"):
        spec = LoraSpec.from_peft(spec)
    if not isinstance(spec, LoraSpec):
        way_out = "pass the settings as a LoraSpec: spec=LoraSpec(targets=[...], r=8, alpha=16, dropout=0.1)"
        raise SpecError(f"spec must be a LoraSpec, not {brief(spec)}", way_out=way_out)
    passed = ["targets"] * (targets is not None)
    passed += [name for name, value in settings.items() if value != LoraSpec.__dataclass_fields__[name].default]
    if passed:
        way_out = "put all settings into the spec, as with dataclasses.replace(spec, r=4)"
        raise SpecError(f"spec and {', '.join(passed)} cannot be passed together", way_out=way_out)
    return spec


explains_settings(LoraSpec)
explains_settings(Override)

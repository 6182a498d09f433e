"""The settings of a LoraSpec as arguments of the verbs: read from them, and explained where PEFT's names are passed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ..errors import SpecError
from .lora_spec import LoraSpec, brief

PEFT_SETTINGS = {
    "target_modules": "targets", "target_parameters": "targets", "exclude_modules": "exclude", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "lora_r": "r", "rank": "r", "layers_to_transform": "layers", "layers_pattern": "layers",
    "rank_pattern": "overrides", "alpha_pattern": "overrides", "use_rslora": "scaling", "init_lora_weights": "init",
    "use_dora": "dora", "trainable_token_indices": "trainable_tokens", "adapter_name": "name", "peft_config": "spec",
    "lora_config": "spec", "config": "spec", "fan_in_fan_out": "", "task_type": "", "inference_mode": "",
    "is_trainable": "",
}  # fmt: skip
"""Settings under PEFT's names, with the names that they have here; empty if they are not needed."""
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


def spec_from_arguments(spec: LoraSpec | None, targets: Any, **settings: Any) -> LoraSpec:
    """Return `spec`, or a LoraSpec of the targets and settings if it is None.

    Raises:
        SpecError: `spec` is something else, or was passed along with targets or with settings other than the defaults.
    """
    if spec is None:
        return LoraSpec(targets=() if targets is None else targets, **settings)
    if not isinstance(spec, LoraSpec):
        way_out = "pass the settings as a LoraSpec: spec=LoraSpec(targets=[...], r=8, alpha=16, dropout=0.1)"
        raise SpecError(f"spec must be a LoraSpec, not {brief(spec)}", way_out=way_out)
    passed = ["targets"] * (targets is not None)
    passed += [name for name, value in settings.items() if value != LoraSpec.__dataclass_fields__[name].default]
    if passed:
        way_out = "put all settings into the spec, as with dataclasses.replace(spec, r=4)"
        raise SpecError(f"spec and {', '.join(passed)} cannot be passed together", way_out=way_out)
    return spec


def explains_settings(verb: Callable[P, T]) -> Callable[P, T]:
    """Let a verb raise a SpecError that says what PEFT's settings are called here, where it gets them."""
    known = inspect.signature(verb).parameters

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        unknown = [key for key in kwargs if key not in known]
        foreign = {key: PEFT_SETTINGS.get(key, key) for key in unknown}
        settings = {*LoraSpec.__dataclass_fields__, *known}
        if {*PEFT_SETTINGS, *settings}.isdisjoint(unknown):  # Python's own error says enough of other keywords
            return verb(*args, **kwargs)
        problems = []
        for key, ours in foreign.items():
            absent = "the file tells it" if ours in settings else "there is no such setting"
            answer = f"write {EXAMPLES.get(ours, f'{ours}=...')}" if ours in known else absent
            problems.append(f"{key}: {answer if ours else 'leave it out, nothing here depends on it'}")
        way_out = f"correct them and call again; nothing was changed (help({verb.__name__}) lists all arguments)"
        raise SpecError(f"{verb.__name__} does not take these arguments:", problems, way_out)

    return wrapped

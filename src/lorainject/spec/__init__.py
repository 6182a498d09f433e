"""The settings of an injection.

lora_spec      LoraSpec and Override: all settings as one valid value
arguments      the settings as arguments of the verbs, and what PEFT calls them
peft_config    the settings as PEFT's LoraConfig, and back
yaml_file      the settings as YAML, and back; safe_yaml reads YAML without what makes it expensive
"""

from .arguments import PEFT_SETTINGS, explains_settings, spec_from_arguments
from .lora_spec import FUNCTION, INITS, KEYWORDS, REGEX, SCALINGS, Init, LoraSpec, Override, Target, is_alpha

__all__ = [
    "FUNCTION", "INITS", "KEYWORDS", "PEFT_SETTINGS", "REGEX", "SCALINGS", "Init", "LoraSpec", "Override", "Target",
    "explains_settings", "is_alpha", "spec_from_arguments",
]  # fmt: skip

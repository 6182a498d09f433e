"""A recipe: a training as a YAML file that can be checked, kept and run again.

    model:    the base                       data:     files or data sets, and what a row is
    lora:     the settings of LoraSpec       trainer:  which trainer, with its arguments
    output:   the folder that is written

`Recipe.read` lists everything that is wrong with a recipe at once, before anything is loaded: keys (sections.py), and
files, columns and targets (prepare.py). `train` (train.py) trains it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from ...errors import FileError, SpecError
from ...spec.safe_yaml import parse_yaml, write_yaml
from .prepare import Preparation, prepare, setting_problems
from .sections import Data, Lora, Model, Output, Section, Sweep, TrainerSection, known_keys

CHANGEABLE = (
    "output.", "data.eval", "trainer.max_steps", "trainer.num_train_epochs", "trainer.save", "trainer.eval",
    "trainer.logging", "trainer.use_cpu", "trainer.report_to", "trainer.disable_tqdm", "trainer.dataloader_num_workers",
)  # fmt: skip
"""Settings that may differ when a training is resumed."""


class Recipe(Section):
    """A training: the base model, the adapter, the data, the trainer and what is written."""

    model_config = ConfigDict(title="A lorainject recipe")
    model: Model
    lora: Lora
    data: Data
    trainer: TrainerSection = TrainerSection()
    output: Output
    sweep: Sweep = Sweep({})

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Recipe:
        """Read a recipe.

        Args:
            path: A YAML file. Paths in it are relative to the current directory.
            overrides: Settings that replace those of the file, as "trainer.max_steps=10". Values are YAML.
            check: Check the data, and the targets on the model's config, as well. False reads the recipe alone.

        Raises:
            FileError: The file is missing, or is not YAML.
            SpecError: With everything that is wrong: unknown keys, invalid settings, files and columns that are
                missing, targets that match nothing.
        """
        path = Path(path)
        if not path.is_file():
            raise FileError(f"there is no recipe {path}", way_out="give a YAML file, such as configs/code-search.yaml")
        raw, problems = _yaml(path, path.read_bytes()), list[str]()
        for override in overrides:
            problems += _apply(raw, override)
        problems += _unknown("", raw, set(cls.model_fields))
        kind = trainer.get("kind", "trainer") if isinstance(trainer := raw.get("trainer", {}), dict) else None
        sections: dict[str, Any] = {}
        for name, field in cls.model_fields.items():
            section: Any = field.annotation
            if name not in raw and field.is_required():
                problems.append(f"the section {name!r} is missing")
                continue
            content = raw.get(name, {})
            if isinstance(content, dict) and (known := known_keys(section, kind)) is not None:
                content = dict(content)
                problems += _unknown(f"{name}.", content, *known)
            try:
                sections[name] = section.model_validate(content)
            except ValidationError as e:
                problems += (_line(name, error) for error in e.errors())
        if check:
            try:
                prepare(sections)
            except SpecError as e:
                problems += e.problems
        else:
            problems += setting_problems(sections)
        if problems:
            raise SpecError(f"{path} cannot be trained:", problems, "correct the recipe; nothing was loaded")
        return cls(**{name: section for name, section in sections.items() if name in raw})

    def write(self, path: str | Path) -> None:
        """Write the recipe as YAML, without settings that have the default."""
        write_yaml(Path(path), self.model_dump(mode="json", by_alias=True, exclude_unset=True))

    def differences(self, other: Recipe) -> list[str]:
        """Return a line for each setting that differs from another recipe's, but for those that a resume may change."""
        ours, theirs = (_flat(recipe.model_dump(mode="json", by_alias=True)) for recipe in (self, other))
        keys = [
            key for key in {**ours, **theirs} if not key.startswith(CHANGEABLE) and ours.get(key) != theirs.get(key)
        ]
        return [f"{key}: {ours.get(key, 'not set')!r}, and it was {theirs.get(key, 'not set')!r}" for key in keys]

    def prepare(self) -> Preparation:
        """Return what the recipe comes to, before any weight is loaded: the plan, the data, the steps, the memory.

        Raises:
            SpecError: With everything that is wrong.
        """
        return prepare({name: getattr(self, name) for name in type(self).model_fields})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _yaml(path: Path, text: bytes) -> dict[str, Any]:
    try:
        return parse_yaml(path, text)
    except FileError as e:
        raise FileError(str(e).splitlines()[0], e.problems, "correct the recipe") from e


def _apply(raw: dict[str, Any], override: str) -> Iterable[str]:
    """Replace one setting, and yield what is wrong with the override."""
    path, equals, text = override.partition("=")
    *parents, last = keys = path.strip().split(".")
    if not equals or not all(keys):
        yield f"{override!r} is no setting: write, for instance, trainer.max_steps=10"
        return
    try:
        value = _yaml(Path(override), b"value: " + text.encode())["value"]
    except (FileError, KeyError) as e:
        yield f"{override!r} cannot be read: {e}"
        return
    if keys[0] == "sweep" and len(parents) > 1:  # a run's settings have dots in their names
        parents, last = parents[:2], ".".join((*parents[2:], last))
    section = raw
    for key in parents:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            yield f"{override!r}: {key} has no settings"
            return
    section[last] = value


def _unknown(prefix: str, content: dict[str, Any], keys: set[str], renamed: Any = None) -> Iterable[str]:
    """Take the keys that do not exist out of a mapping, and yield a line for each, with the nearest name."""
    for key in [key for key in content if key not in keys]:
        del content[key]
        if key in (renamed or {}):
            instead = renamed[key]
            yield f"{prefix}{key}: " + (f"write {instead}" if instead else "the recipe sets it")
        else:
            near = difflib.get_close_matches(str(key), sorted(keys), 1)
            yield f"{prefix}{key}: there is no such setting" + (f"; did you mean {near[0]!r}?" if near else "")


def _line(section: str, error: Any) -> str:
    place = ".".join(map(str, (section, *error["loc"])))
    if error["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r:.60}"

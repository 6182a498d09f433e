"""The settings of a LoraSpec as YAML, as in the section `lora` of a recipe."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, SpecError
from .safe_yaml import parse_yaml, write_yaml


def plain(spec: Any) -> dict[str, Any]:
    """Return the fields of a LoraSpec that are not the defaults, as values that YAML and JSON have.

    Raises:
        SpecError: A value is a function.
    """
    values = {f.name: v for f in dataclasses.fields(spec) if (v := getattr(spec, f.name)) != f.default}
    entries = [(name, e) for name, v in values.items() for e in (v if isinstance(v, tuple) else (v,))]
    if functions := [f"{name}: {entry!r}" for name, entry in entries if callable(entry)]:
        raise SpecError("functions cannot be written to a file:", functions, "name the weights, or one of the inits")
    if "dtype" in values:
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    if "overrides" in values:
        fields = {o.target: {"r": o.r, "alpha": o.alpha} for o in reversed(values["overrides"])}  # the first one counts
        values["overrides"] = {
            target: {k: v for k, v in fields[target].items() if v is not None} for target in reversed(fields)
        }
    if "trainable_tokens" in values:
        rows: dict[str, list[int]] = {}
        for path, ids in values["trainable_tokens"]:
            rows.setdefault(path, []).extend(ids)
        values["trainable_tokens"] = rows
    if values["targets"] in (("all-linear",), ("all-conv",)):
        values["targets"] = values["targets"][0]
    numbers = {name: float(v) for name, v in values.items() if isinstance(v, float)}  # of numpy, too
    return {name: list(v) if isinstance(v, tuple) else v for name, v in (values | numbers).items()}


def from_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of LoraSpec of values as YAML has them: a dtype by its name."""
    settings = dict(values)
    if isinstance(name := settings.get("dtype"), str):
        settings["dtype"] = getattr(torch, name, name)
    return settings


def read(path: Path, fields: Collection[str]) -> dict[str, Any]:
    """Return the arguments of LoraSpec in a YAML file.

    Args:
        path: The file.
        fields: The names of the arguments.

    Raises:
        FileError: The file is missing, or is not YAML.
        SpecError: The file has other fields.
    """
    if not path.is_file():
        raise FileError(f"there is no file {path}", way_out="give a YAML file, as LoraSpec.to_yaml writes it")
    values = parse_yaml(path, path.read_bytes())
    if isinstance(section := values.get("lora"), dict):  # a recipe
        values = {name: value for name, value in section.items() if name != "optimizer"}
    problems = []
    for name in values.keys() - set(fields):
        near = difflib.get_close_matches(str(name), sorted(fields), 1)
        problems.append(f"{name}: there is no such setting" + (f"; did you mean {near[0]!r}?" if near else ""))
    if "targets" not in values:
        problems.append("targets is missing")
    if problems:
        raise SpecError(f"{path} holds no settings of a LoRA:", sorted(problems), "correct the file")
    return from_plain(values)


def write(path: Path, spec: Any) -> None:
    """Write a LoraSpec to a YAML file. Raise SpecError if a value is a function, FileError if it cannot be written."""
    write_yaml(path, plain(spec))

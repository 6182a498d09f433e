"""Configs in YAML, read without what makes YAML expensive.

An alias repeats a node, so that a few lines can describe more than any memory holds, and a number such as 1:30 is in
base 60, whose conversion takes quadratic time. No config needs either. 2e-4 is a number, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError, system_errors

EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def parse_yaml(path: Path, text: bytes) -> dict[str, Any]:
    """Return the mapping in a YAML text, or an empty one if it holds something else.

    Raises:
        FileError: The text is not YAML, has aliases or numbers in base 60, or the package pyyaml is missing.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise FileError(f"{path} is YAML", way_out='pip install "lorainject[formats]"') from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """A safe loader that refuses aliases and numbers in base 60."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has aliases, which no config needs")
            return super().compose_node(parent, index)

        def construct_scalar(self, node: Any) -> Any:
            if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in str(node.value):
                raise ValueError("it has a number in base 60, which no config needs")
            return super().construct_scalar(node)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, KeyError, AttributeError) as e:
        way_out = "if it was edited, correct it; else copy or download the adapter again"
        mark = getattr(e, "problem_mark", None)
        what = (
            str(e) if mark is None else f"{getattr(e, 'problem', e)} (line {mark.line + 1}, column {mark.column + 1})"
        )
        raise FileError(f"{path} cannot be read as YAML: {what}", way_out=way_out) from e
    return value if isinstance(value, dict) else {}


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write values to a YAML file that parse_yaml reads back.

    Raises:
        FileError: The file cannot be written, or the package pyyaml is missing.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise FileError(f"{path} is YAML", way_out='pip install "lorainject[formats]"') from None

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """A safe dumper that puts texts in quotes that parse_yaml would take for numbers."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))
    with system_errors(f"{path} cannot be written"):
        path.write_text(yaml.dump(dict(values), Dumper=Dumper, sort_keys=False), encoding="utf-8")

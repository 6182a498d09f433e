"""The house: what is public, which room may import which, and what an import loads."""

from __future__ import annotations

import ast
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorainject as li

SOURCE = Path(li.__file__).parent
# The rooms from the ground up. Each room imports only from the rooms before it in this list, and from itself.
ROOMS = ["errors", "numerics", "spec", "plan", "lora", "targets", "merging", "surgery", "probe", "files", "checkpoint"]
FACES = ["", "cli"]  # the public names, and the command line on top of them


def name_of(path: Path) -> str:
    """Return the dotted name of a module within the package, "" for the package itself."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imported(path: Path) -> set[str]:
    """Return the modules of lorainject that a file imports."""
    package = ("lorainject." + name_of(path)).removesuffix(".").split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
            whole = [f"{module}.{alias.name}" for alias in node.names]
            found |= {w if (SOURCE.parent / (w.replace(".", "/") + ".py")).exists() else module for w in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("lorainject")}
    return {f.removeprefix("lorainject").removeprefix(".") for f in found}


def room_of(module: str) -> int:
    """Return the place of a module's room in the list."""
    return (ROOMS + FACES).index(module.split(".")[0])


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=name_of)
def test_imports_point_downward(path):
    """Every module imports only from its own room and from rooms below; a new room needs a place in the list."""
    assert not {m for m in imported(path) if room_of(m) > room_of(name_of(path))}


def test_no_import_circle():
    """Within a room, too, no module imports another that imports it back, at any remove."""
    modules = {name_of(path): imported(path) for path in SOURCE.rglob("*.py")}
    graphlib.TopologicalSorter(modules).prepare()  # raises CycleError


def test_public_names():
    """__all__ is what the package offers: sorted, all there, nothing public beside it but submodules."""
    public = {n for n, v in vars(li).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(li.__all__)
    assert sorted(li.__all__) == li.__all__


@pytest.mark.parametrize("name", [n for n in li.__all__ if callable(getattr(li, n))])
def test_public_names_are_documented(name):
    """Every public function, class, and public method or property has a docstring of its own."""
    value = getattr(li, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{key}"


def test_inject_and_find_take_the_specs_fields():
    """inject, find and LoraSpec have the same settings with the same defaults."""
    fields = {k: f.default for k, f in li.LoraSpec.__dataclass_fields__.items()}
    for verb in (li.inject, li.find):
        parameters = {k: p.default for k, p in inspect.signature(verb).parameters.items()}
        assert set(fields) == set(parameters) - {"model", "name", "spec"}
        assert {k: v for k, v in parameters.items() if k in fields and k != "targets"} == {
            k: v for k, v in fields.items() if k != "targets"
        }


def test_import_is_light():
    """`import lorainject` brings neither transformers nor any of the extras."""
    code = """
import sys, lorainject
heavy = {"transformers", "peft", "accelerate", "rich", "typer", "matplotlib", "numpy.testing"} & set(sys.modules)
print(sorted(heavy))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"

"""The house: public names, which room may import which (docs/architecture.md), and that documents name what exists."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import lorainject as li

ROOT = Path(__file__).parent.parent
SOURCE = Path(li.__file__).parent


class Room(NamedTuple):
    """A row of the table in docs/architecture.md."""

    floor: int
    imports: frozenset[str]


def documented_rooms() -> dict[str, Room]:
    """Return the rooms by name, from the table | floor | `room` | what it is | `imports`, ... | of the page."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| .* \|(.*)\|$", page, flags=re.MULTILINE)
    return {room: Room(int(floor), frozenset(re.findall(r"`(\w+)`", imports))) for floor, room, imports in rows}


ROOMS = documented_rooms()


def module_name(path: Path) -> str:
    """Return the dotted name of a module within the package; "__init__" for the package itself."""
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Return the modules of lorainject that a file imports, at its top or inside a function."""
    package = ["lorainject", *path.relative_to(SOURCE).parts[:-1]]
    imports = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            for alias in node.names:
                submodule = SOURCE.parent.joinpath(*module, alias.name)
                is_module = submodule.is_dir() or submodule.with_suffix(".py").exists()
                imports.add(".".join([*module, alias.name] if is_module else module))
        elif isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lorainject"}
    return {name.removeprefix("lorainject").removeprefix(".") or "__init__" for name in imports}


def room_of(module: str) -> str:
    """Return the room of a module: its folder, or the module itself if it lies in none."""
    return module.split(".")[0]


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_to_lower_floors(module):
    """A module imports only from its own room, and from rooms on lower floors of docs/architecture.md."""
    room = room_of(module)
    for other in map(room_of, imported_modules(FILES[module])):
        assert other == room or ROOMS[other].floor < ROOMS[room].floor, f"{module} imports {other}"


def test_architecture_page_lists_every_room_and_its_imports():
    """The table of docs/architecture.md has all rooms, with the imports that they have, on ten floors."""
    imports: dict[str, set[str]] = {room_of(module): set() for module in FILES}
    for module, path in FILES.items():
        imports[room_of(module)] |= set(map(room_of, imported_modules(path))) - {room_of(module)}
    assert {name: set(room.imports) for name, room in ROOMS.items()} == imports
    assert {room.floor for room in ROOMS.values()} == set(range(1, 11))


def test_no_import_circle():
    """Within a room, too, no module imports another one that imports it back, directly or through others."""
    graphlib.TopologicalSorter({module: imported_modules(path) for module, path in FILES.items()}).prepare()


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_pages_name_real_files_and_functions(page):
    """Every path in backticks exists, and so does every function or class that is named as `file: name`."""
    text = (ROOT / page).read_text()
    for path, name in re.findall(r"`([\w./-]+\.py)(?:: ([\w.]+))?`", text):
        file = next((f for f in (ROOT / path, SOURCE / path) if f.exists()), None)
        assert file is not None, path
        if name:
            assert re.search(rf"\b(def|class) {name.rpartition('.')[2]}\b", file.read_text()), f"{path}: {name}"


def test_laws_page_names_real_tests():
    """Every test that docs/laws.md names exists."""
    tests = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "laws.md").read_text()))
    assert named
    assert not named - tests


def test_public_names():
    """__all__ is what the package offers: it is sorted, and nothing else is public but submodules."""
    public = {name for name, value in vars(li).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(li.__all__)
    assert sorted(li.__all__) == li.__all__


@pytest.mark.parametrize("name", [n for n in li.__all__ if callable(getattr(li, n))])
def test_public_names_are_documented(name):
    """Every public function, class, and public method or property has a docstring."""
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
    """`import lorainject` loads neither transformers nor any of the extras, nor the room for training."""
    code = """
import sys, lorainject
heavy = {"transformers", "peft", "accelerate", "rich", "typer", "matplotlib", "numpy.testing", "pydantic", "yaml",
         "lorainject.training"}
heavy &= set(sys.modules)
print(sorted(heavy))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"

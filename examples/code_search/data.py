"""The data of the code search task: pairs of a docstring (the query) and the function that it documents (the positive).

The pairs come from Python's standard library, which every machine has, or from a JSONL file whose lines are
{"query": ..., "positive": ...}.

What makes the task fair:
- A function's name often repeats its docstring, so the name becomes `f` wherever it stands in the code.
- All docstrings leave the code, those of inner functions too.
- The query is the docstring's first paragraph, which is about what a person would type.
- A pair is dropped if its query or its function occurred before; otherwise a right answer would count as wrong.
- A module or package is either in the training set or in the test set, never in both.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import lorainject as li

PER_MODULE = 25
NOT_CODE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}


class Pair(NamedTuple):
    """A text to search with, and the text that the search should find."""

    module: str
    query: str
    positive: str


def extract_pairs(source: str, module: str) -> list[Pair]:
    """Return a pair for each documented function in a source text, inner functions and methods included."""
    documented = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]
            if not isinstance(node, ast.ClassDef) and not all(isinstance(s, ast.Pass | ast.Raise) for s in node.body):
                documented.append((node, " ".join(re.split(r"\n\s*\n", doc.strip())[0].split())))
    # The code is printed only now, when the docstrings of inner functions have been removed as well.
    return [
        Pair(module, query, re.sub(rf"\b{node.name}\b", "f", ast.unparse(node)))
        for node, query in documented
        if query.count(" ") > 1
    ]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements in the order of the text. Expressions are most of the nodes and hold no definitions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _statements(child)


def stdlib_pairs(root: Path | None = None) -> list[Pair]:
    """Return the pairs of the standard library (or of the folder `root`). A package counts as one module."""
    root, pairs = root or Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not NOT_CODE & set(parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some of these sources have invalid escapes
                pairs += extract_pairs(path.read_text(encoding="utf-8"), parts[0].removesuffix(".py"))
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a JSONL file. Each line counts as a module.

    Raises:
        FileError: With every line that is not a pair of two texts.
    """
    pairs, problems = [], []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also split at U+2028, within a string
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                pair = Pair(f"line {number}", row["query"].strip(), row["positive"].strip())
                if not (pair.query and pair.positive):
                    raise ValueError
                pairs.append(pair)
            except (ValueError, LookupError, TypeError, AttributeError):
                problems.append(f"line {number}: {line[:60]!r}")
    if problems:
        what = f'{path} has lines that are not {{"query": "...", "positive": "..."}}:'
        raise li.FileError(what, problems, "correct or remove these lines")
    return pairs


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs without those whose query or positive occurred before."""
    kept: list[Pair] = []
    seen: set[str] = set()
    for pair in pairs:
        if not {pair.query, pair.positive} & seen:
            kept.append(pair)
        seen |= {pair.query, pair.positive}
    return kept


def split_by_module(
    pairs: Iterable[Pair], size: int, seed: int, most: int = PER_MODULE
) -> tuple[list[Pair], list[Pair]]:
    """Split the pairs into a training set and a test set of `size` pairs that share no module.

    Modules go into the test set in random order until it is full. Each gives at most `most` pairs, so that no large
    module dominates the test; the rest of such a module is not used at all.
    """
    by_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.module, []).append(pair)
    rng, training, held_out = random.Random(seed), list[Pair](), list[Pair]()
    for module in rng.sample(sorted(by_module), len(by_module)):
        if len(held_out) < size:
            held_out += rng.sample(by_module[module], min(most, len(by_module[module])))
        else:
            training += by_module[module]
    return training, held_out[:size]

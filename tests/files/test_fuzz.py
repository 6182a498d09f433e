"""The fuzzer (tools/fuzz.py): inputs that once broke a reader stay fixed, and every reader survives some fresh ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal

import pytest

import lorainject as li
from lorainject.files.io import safetensors_file
from lorainject.files.io.open_adapter import FILES

import fuzz
from mutations import mutated
from oracle import FIXTURES

CORPUS = sorted((FIXTURES.parent / "fuzz").iterdir())
HINTS = li.Hints(
    alpha=6, heads=(4, 2), groups={"m101": [True, False, True], "m111": [True] * 3, "mf": [True, False, True]}
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("finding", CORPUS, ids=lambda path: path.name)
def test_earlier_findings_stay_fixed(finding, tmp_path):
    """These files once raised an error of Python or torch. Now they are read or refused, and written or refused."""
    shutil.copytree(finding, tmp_path / "in")
    files = [p for p in (tmp_path / "in").iterdir() if p.name != "adapter_config.json"]
    is_single_file = files[0].name not in FILES or len(list(finding.iterdir())) == 1
    path = files[0] if is_single_file else tmp_path / "in"
    results = {fuzz.try_input(path, HINTS, n) for n in range(2 * len(li.FORMATS))}
    assert results in ({"read"}, {"refused"})


@needs_fork
def test_every_reader_survives_fresh_inputs(monkeypatch):
    """The first six inputs of every reader end as read or refused, in a child with bounded memory and time."""
    monkeypatch.setattr(fuzz, "SECONDS", 60.0)  # for a machine with other work
    for reader, seeds in fuzz.seeds().items():
        fuzz.try_seeds(seeds[:1])
        results = [result for _, result, _ in fuzz.run_batch(reader, seeds, 0, 6)]
        assert len(results) == 6
        assert set(results) <= {"read", "refused"}, reader


@needs_fork
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("hang", "hang: more than 1 s"),
        ("die", "death: signal 9"),
        ("fill", "MemoryError outside lorainject: "),
        ("raise", "KeyError outside lorainject: 'x'"),
    ],
)
def test_failures_are_findings(failure, expected, monkeypatch):
    """A reader that hangs, dies, takes too much memory or raises anything but LoraError is reported as a finding."""

    def broken_reader(*_: object) -> str:
        if failure == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while failure == "hang":
            pass
        json.dumps(bytearray(fuzz.MEMORY + 2**28) and 0) if failure == "fill" else {}["x"]
        return "read"

    monkeypatch.setattr(fuzz, "SECONDS", 1.0 if failure == "hang" else 60.0)
    monkeypatch.setattr(fuzz, "try_input", broken_reader)
    seed = fuzz.Seed({"x": b"x" * 100}, "x")
    assert [result for _, result, _ in fuzz.run_batch("x", [seed], 0, 1)] == [expected]


def raise_from(filename: str) -> KeyError:
    """Return an exception that passed through a function `broken` of a file of this name."""
    scope: dict[str, object] = {}
    exec(compile("def broken():\n    {}['x']", filename, "exec"), scope)
    try:
        scope["broken"]()
    except KeyError as e:
        return e
    raise AssertionError


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("/home/somebody/lorainject/tests/files/test_fuzz.py", "KeyError outside lorainject: 'x'"),
        (str(fuzz.PACKAGE / "files" / "record.py"), "KeyError in record.py:broken: 'x'"),
    ],
)
def test_a_folder_called_lorainject_is_not_the_package(filename, expected):
    """A finding names a function of the package, also if the repository lies in a folder with the package's name."""
    assert fuzz.signature(raise_from(filename)) == expected


def test_mutations_do_not_depend_on_the_order_of_tensors(monkeypatch):
    """The same random state mutates a safetensors file equally, though the package safetensors shuffles the tensors."""
    files = fuzz.file_seed(FIXTURES / "kohya_lycoris" / "lora.safetensors").files
    before = [mutated(files, random.Random(n)) for n in range(30)]
    parse = safetensors_file.parse

    def parse_reversed(data, path):
        tensors, metadata = parse(data, path)
        return dict(reversed(tensors.items())), metadata

    monkeypatch.setattr(safetensors_file, "parse", parse_reversed)
    assert [mutated(files, random.Random(n)) for n in range(30)] == before

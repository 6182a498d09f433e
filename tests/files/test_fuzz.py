"""What fuzzing found stays found, and each reader stands a few fresh inputs; `scripts/fuzz` is the long form (fuzz.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

import lorainject as li
from lorainject.files.io.open_adapter import FILES

import fuzz
from oracle import FIXTURES

CORPUS = sorted((FIXTURES.parent / "fuzz").iterdir())
TOLD = li.Hints(
    alpha=6, heads=(4, 2), groups={"m101": [True, False, True], "m111": [True] * 3, "mf": [True, False, True]}
)


@pytest.mark.parametrize("found", CORPUS, ids=lambda p: p.name)
def test_what_was_found(found, tmp_path):
    """Each raised something of Python's or torch's own once: now it is read or refused, and what is read is written or refused."""
    shutil.copytree(found, tmp_path / "in")
    files = [p for p in (tmp_path / "in").iterdir() if p.name != "adapter_config.json"]
    at = files[0] if files[0].name not in FILES or len(list(found.iterdir())) == 1 else tmp_path / "in"
    ends = [fuzz.tried(at, TOLD, n) for n in range(2 * len(li.FORMATS))]
    assert set(ends) in ({"read"}, {"refused"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_each_reader_a_little(monkeypatch):
    """The same inputs each time, in a child with bounded memory and time."""
    monkeypatch.setattr(fuzz, "SECONDS", 60.0)  # for a machine with other work
    for reader, of in fuzz.seeds().items():
        fuzz.warm(of[:1])
        ends = [end for _, end, _ in fuzz.batch(reader, of, 0, 6)]
        assert len(ends) == 6
        assert set(ends) <= {"read", "refused"}, reader


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("does", "end"),
    [
        ("hang", "hang: more than 1 s"),
        ("die", "death: signal 9"),
        ("fill", "MemoryError in outside: "),
        ("raise", "KeyError in outside: 'x'"),
    ],
)
def test_fuzzing_sees(does, end, monkeypatch):
    """A reader that hangs, dies, takes too much or raises what is not ours is a finding."""

    def wrong(*_: object) -> str:
        if does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while does == "hang":
            pass
        json.dumps(bytearray(fuzz.MEMORY + 2**28) and 0) if does == "fill" else {}["x"]
        return "read"

    monkeypatch.setattr(fuzz, "SECONDS", 1.0 if does == "hang" else 60.0)
    monkeypatch.setattr(fuzz, "tried", wrong)
    seed = fuzz.Seed({"x": b"x" * 100}, "x")
    assert [found for _, found, _ in fuzz.batch("x", [seed], 0, 1)] == [end]

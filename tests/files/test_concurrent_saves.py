"""Saves from several processes, killed ones, and readers meanwhile: always one adapter, the old or the new, and never parts of two."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorainject as li
from lorainject.files.io import atomic_write

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SITES = 4
TWO_FILES = ("lorainject", "peft", "mlx", "litgpt")


def adapter(k: int, mixed: bool) -> li.AdapterFile:
    """Number k: it stands in every tensor and in the scale, so in both files, and the ranks follow from it."""
    r = 1 + k % 3
    sites = [
        li.StoredSite(
            path=f"model.layers.{i}.mlp.up_proj",
            A=torch.full((r, 3), float(k)),
            B=torch.full((2000, r), float(k)),
            alpha=k * r,
        )
        for i in range(SITES)
    ]
    if mixed and k % 5 == 0:  # of which PEFT has nothing, so that our own directory has no config
        sites[0] = li.StoredSite(
            path="a",
            kind="conv^T",
            shape=(3, 2, 1),
            A=torch.full((r, 3), float(k)),
            B=torch.full((2, r), float(k)),
            alpha=k * r,
        )
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=tuple(sites))


def put(k: int, folder: Path, format: str) -> None:
    li.write(adapter(k, format == "lorainject"), folder, format=format, lossy=True)


def number(folder: Path) -> int:
    """Which adapter is there. Fails if it is of two."""
    file = li.read(folder, allow_pickle=True, hints=li.Hints(heads=(1, 1)))
    ks = {float(x) for s in file.sites for t in (s.A, s.B) for x in t.unique()} | {s.scale for s in file.sites}
    assert len(ks) == 1, ks
    k = int(ks.pop())
    assert {s.r for s in file.sites} == {1 + k % 3}
    if file.format == "lorainject" and folder.is_dir():
        assert bool(file.config) == (k % 5 > 0)
        assert file.config.get("lora_alpha", k * (1 + k % 3)) == k * (1 + k % 3)
    return k


def child(job: Callable[[], object]) -> int:
    """In a process of its own; what it raises is its exit status, and said."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            job()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def saves(folder: Path, format: str, first: int, rounds: int) -> None:
    for k in range(first, first + 2 * rounds, 2):
        put(k, folder, format)


LONG = pytest.mark.long
RACES = [("lorainject", 20), ("peft", 20), *(pytest.param(f, 400, marks=LONG) for f in TWO_FILES)]
KILLED = [("lorainject", 1, 5), ("lorainject", 5, 2), ("peft", 1, 2),
          *(pytest.param(f, *pair, marks=LONG) for f in TWO_FILES for pair in ((1, 2), (2, 5), (5, 1)))]  # fmt: skip


@pytest.mark.parametrize(("format", "rounds"), RACES)
def test_two_writers_and_a_reader(format, rounds, tmp_path):
    """Two processes save to one place, odd and even numbers; a reader always finds one of them whole, and each writer's in their order."""
    folder = tmp_path / "a"
    put(1, folder, format)
    writers, seen = [child(lambda first=first: saves(folder, format, first, rounds)) for first in (2, 3)], [1]
    alive = set(writers)
    while alive:
        seen.append(number(folder))
        alive -= {pid for pid in alive if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)}
    assert [ended(pid) for pid in writers] == [0, 0]
    for parity in (0, 1):
        of_one = [k for k in seen if k % 2 == parity and k > 1]
        assert of_one == sorted(of_one)
    assert len(set(seen)) > 3
    assert number(folder) in (2 * rounds, 2 * rounds + 1)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def _counted(real: Callable[..., object], calls: Iterator[int], step: int) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return call


def dying(step: int, job: Callable[[], object]) -> None:
    """Do it until the system call `step` that changes the disk, before which it is killed."""
    calls = itertools.count()
    for name in ("open", "replace", "fsync", "unlink"):
        setattr(os, name, _counted(getattr(os, name), calls, step))
    job()


@pytest.mark.parametrize(("format", "old", "new"), KILLED)
def test_killed_before_each_step(format, old, new, tmp_path):
    """kill -9 before each system call of a save in turn: the old one, from some step on the new one, and the next save is as ever."""
    found = []
    for step in itertools.count():
        folder = tmp_path / str(step)
        put(old, folder, format)
        code = ended(child(lambda folder=folder, step=step: dying(step, lambda: put(new, folder, format))))
        found.append(number(folder))
        put(7, folder, format)
        assert number(folder) == 7
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found == sorted(found, key=(old, new).index)
    assert set(found) == {old, new}
    assert len(found) > 10


@pytest.mark.parametrize("kills", [8, pytest.param(400, marks=LONG)])
def test_killed_at_any_moment(kills, tmp_path):
    """Writers that save without end, killed at random moments, two at a time; a reader and the next writers never see half a save."""
    folder, rng = tmp_path / "a", random.Random(kills)
    for _ in range(kills):
        put(1, folder, "peft")
        pids = [child(lambda first=first: saves(folder, "peft", first, 10**6)) for first in (2, 3)]
        while number(folder) == 1:  # until a writer has saved; how long that takes depends on the machine
            assert not any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids)
        until = time.monotonic() + rng.uniform(0, 0.1)
        while time.monotonic() < until:
            number(folder)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert [ended(pid) for pid in pids] == [-signal.SIGKILL] * 2
        number(folder)


def test_threads_of_one_process(tmp_path):
    """They have one pid, and still their own temporaries."""
    folder, wrong = tmp_path / "a", []
    put(1, folder, "peft")

    def job(first: int) -> None:
        try:
            saves(folder, "peft", first, 15)
            saves(tmp_path / "b.safetensors", "lorainject", first, 15)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=job, args=(first,)) for first in (2, 3, 4)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        number(folder)
    assert not wrong
    number(tmp_path / "b.safetensors")
    assert not [p for p in (*folder.iterdir(), *tmp_path.iterdir()) if p.name.startswith(".")]


def test_an_error_leaves_the_old(tmp_path, monkeypatch):
    """A full disk before the commit: what was there is unchanged, and no temporary file is left."""
    folder = tmp_path / "a"
    put(1, folder, "peft")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        li.FileError, match=r"can't be written: No space left on device\n  - what was there before is unchanged"
    ):
        put(2, folder, "peft")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.binary(max_size=20), max_size=12),
    most=st.lists(st.integers(1, 30), min_size=1),
    many=st.integers(1, 5),
    one=st.booleans(),
)
def test_a_system_that_writes_less_than_it_was_given(tmp_path, pieces, most, many, one):
    """Every piece is in the file, whole and in its order; also where there is no call for several at once."""
    written, limits = os.write, itertools.cycle(most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_write, "MAX_PIECES", many)
        patch.setattr(atomic_write, "MAX_BYTES", 15)
        patch.setattr(os, "write", lambda fd, piece: written(fd, piece[: next(limits)]))
        if one:
            patch.delattr(os, "writev")
        else:
            patch.setattr(os, "writev", lambda fd, pieces: written(fd, b"".join(pieces)[: next(limits)]))
        atomic_write.write({tmp_path / "x": pieces})
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


@pytest.mark.parametrize(
    "text",
    [
        '{"adapter_config.json": "../../x"}',
        '{"../x": ".../x.0123456789abcdef.tmp"}',
        "[]",
        "{",
        '{"adapter_config.json": 3}',
        "[" * 10**5,
    ],
)
def test_a_journal_that_a_stranger_made(text, tmp_path):
    """Its names become paths: anything but our own names beside it is refused, by readers and writers."""
    folder = tmp_path / "a"
    put(1, folder, "peft")
    (folder / atomic_write.JOURNAL).write_text(text)
    with pytest.raises(li.FileError, match="is not the journal of a save"):
        li.read(folder)
    with pytest.raises(li.FileError, match="is not the journal of a save"):
        put(2, folder, "peft")


def test_a_writer_that_waits_in_vain(tmp_path, monkeypatch):
    """It gives up with a reason."""
    fcntl = pytest.importorskip("fcntl")
    put(1, tmp_path / "a", "peft")
    monkeypatch.setattr(atomic_write, "LOCK_SECONDS", 0.05)
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(li.FileError, match=r"another process is at work in .*, for more than 0\.05 s\n=> wait for it to end"):
            put(2, tmp_path / "a", "peft")
    finally:
        os.close(fd)
    put(2, tmp_path / "a", "peft")
    assert number(tmp_path / "a") == 2

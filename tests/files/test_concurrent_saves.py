"""Several processes save, some are killed, and readers always find one whole adapter, the old or the new one."""

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
    """Return adapter number k: the number is in every tensor and in the scale, so in both files, and decides the
    rank."""
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
    """Return the number of the adapter in a folder. Fail if parts of two adapters are there."""
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
    """Run a job in a new process and return the pid. An error is printed and ends the process with status 1."""
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
KILLED = [("peft", 1, 2), *(pytest.param("lorainject", *pair, marks=LONG) for pair in ((1, 5), (5, 2))),
          *(pytest.param(f, *pair, marks=LONG) for f in TWO_FILES for pair in ((1, 2), (2, 5), (5, 1)))]  # fmt: skip


@pytest.mark.parametrize(("format", "rounds"), RACES)
def test_two_writers_and_a_reader(format, rounds, tmp_path):
    """While two processes save odd and even numbers, a reader always finds one whole, and each writer's in order."""
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
    """Run a job in this process, and kill the process before its system call number `step` that changes the disk."""
    calls = itertools.count()
    for name in ("open", "replace", "fsync", "unlink"):
        setattr(os, name, _counted(getattr(os, name), calls, step))
    job()


@pytest.mark.parametrize(("format", "old", "new"), KILLED)
def test_killed_before_each_step(format, old, new, tmp_path):
    """kill -9 before each system call of a save leaves the old adapter or, from some step on, the new one."""
    numbers = []
    for step in itertools.count():
        folder = tmp_path / str(step)
        put(old, folder, format)
        code = ended(child(lambda folder=folder, step=step: dying(step, lambda: put(new, folder, format))))
        numbers.append(number(folder))
        put(7, folder, format)
        assert number(folder) == 7
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert numbers == sorted(numbers, key=(old, new).index)
    assert set(numbers) == {old, new}
    assert len(numbers) > 10


@pytest.mark.parametrize("kills", [8, pytest.param(400, marks=LONG)])
def test_killed_at_any_moment(kills, tmp_path):
    """Two writers are killed at random moments, and neither a reader nor the next writer ever finds half a save."""
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
    """Threads have one pid, and still their own temporary files."""
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


def test_an_error_leaves_the_old_files(tmp_path, monkeypatch):
    """When the disk is full before the commit, the old files are unchanged and no temporary file is left."""
    folder = tmp_path / "a"
    put(1, folder, "peft")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        li.FileError, match=r"cannot be written: No space left on device\n  - what was there before is unchanged"
    ):
        put(2, folder, "peft")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_error_after_the_commit_says_that_the_new_files_count(tmp_path, monkeypatch):
    """When the folder cannot be flushed after the commit, the error does not say that nothing has changed."""
    put(1, tmp_path / "a", "peft")

    def failing(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    for files in (2, 1):
        with monkeypatch.context() as patch:
            patch.setattr(atomic_write, "sync_folder", failing)
            with pytest.raises(li.FileError, match=r"Input/output error\n  - readers find the new files.*save again"):
                put(2, tmp_path / ("a" if files == 2 else "b.safetensors"), "peft" if files == 2 else "lorainject")
        assert number(tmp_path / ("a" if files == 2 else "b.safetensors")) == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.binary(max_size=20), max_size=12),
    most=st.lists(st.integers(1, 30), min_size=1),
    many=st.integers(1, 5),
    one=st.booleans(),
)
def test_short_writes_are_continued(tmp_path, pieces, most, many, one):
    """Every piece is in the file, in order, if the system writes fewer bytes than asked, or has no writev."""
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
def test_a_forged_journal_is_refused(text, tmp_path):
    """Names in the journal become paths, so readers and writers refuse any but our own temporary names."""
    folder = tmp_path / "a"
    put(1, folder, "peft")
    (folder / atomic_write.JOURNAL).write_text(text)
    with pytest.raises(li.FileError, match="is not the journal of a save"):
        li.read(folder)
    with pytest.raises(li.FileError, match="is not the journal of a save"):
        put(2, folder, "peft")


def test_a_writer_gives_up_waiting(tmp_path, monkeypatch):
    """The error says that another process is at work."""
    fcntl = pytest.importorskip("fcntl")
    put(1, tmp_path / "a", "peft")
    monkeypatch.setattr(atomic_write, "LOCK_SECONDS", 0.05)
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(
            li.FileError, match=r"another process is at work in .*, for more than 0\.05 s\n=> wait for it to end"
        ):
            put(2, tmp_path / "a", "peft")
    finally:
        os.close(fd)
    put(2, tmp_path / "a", "peft")
    assert number(tmp_path / "a") == 2

"""Break the verbs that write to disk at chosen moments, and check what is left: `python tools/faults.py FOLDER`.

FOLDER holds `base`, a sharded checkpoint, and `adapter0` and `adapter1`, adapters for it. A verb runs in a child
process, in which every function of `os` that changes the disk is replaced. A moment is a call and a stage: before it,
or after it, or, for a call that writes bytes, after half of them. The moments are spread evenly over the whole verb.

    killed          SIGKILL at the moment
    disk full       from the moment on, no call can write bytes or create a file (ENOSPC)
    one failure     the call of the moment fails (ENOSPC), and the disk is well afterwards
    read-only       no call can write to the folder (EROFS)
    two at once     two processes run the verb

Meanwhile the parent reads what the verb writes. It must always find all of the old bytes or all of the new ones, or
(in place) no index, so that nothing can be loaded. Afterwards the documented next call must restore or finish
everything to the byte. Whatever else is found ends the program with an AssertionError.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lorainject as li
from lorainject.checkpoint.merge_copy import ORIGIN
from lorainject.checkpoint.merge_in_place import FOLDER, MANIFEST
from lorainject.checkpoint.shards import INDEX
from lorainject.files.io.atomic_write import MARK, UNFINISHED

WRITES = ("pwrite", "write", "writev", "copy_file_range")
CREATES = ("mkdir", "posix_fallocate")  # and os.open with O_CREAT
NAMES = ("replace", "unlink", "rmdir", "fchmod", "fsync", "ftruncate")
SPREAD = ("killed", "disk full", "one failure")
FAULTS = (*SPREAD, "read-only", "two at once")
REFUSED, FAILED = 3, 4


@dataclass
class Moment:
    """When a fault strikes."""

    call: int
    """Counts the calls that change the disk, from 0."""
    stage: str
    """"before", "half" or "after"."""


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder, by their relative paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def break_calls(fault: str, moment: Moment, note: Callable[[str], None] = lambda name: None) -> None:
    """Replace the functions of `os` that change the disk in this process, so that the fault strikes at the moment."""
    calls = itertools.count()

    def strike(name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        note(name)
        n, needs_space = next(calls), name in (*WRITES, *CREATES, "open")
        if fault == "read-only" and name not in WRITES:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if n < moment.call or (n > moment.call and not (fault == "disk full" and needs_space)):
            return real(*args, **kwargs)
        if fault != "killed" and (fault != "disk full" or needs_space):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault == "killed":
            if moment.stage == "after":
                real(*args, **kwargs)
            elif moment.stage == "half":
                _write_half(name, args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    def replace(name: str, real: Callable[..., Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            return strike(name, real, args, kwargs)

        setattr(os, name, call)

    for name in ("open", *WRITES, *CREATES, *NAMES):
        replace(name, getattr(os, name))


_pwrite, _write, _copy_file_range = os.pwrite, os.write, os.copy_file_range


def _write_half(name: str, args: tuple[Any, ...]) -> None:
    """Do what a call that writes bytes does, with half of the bytes."""
    if name == "copy_file_range":
        _copy_file_range(args[0], args[1], args[2] // 2, *args[3:])
    elif name == "pwrite":
        _pwrite(args[0], args[1][: len(args[1]) // 2], *args[2:])
    else:
        data = b"".join(args[1]) if name == "writev" else args[1]
        _write(args[0], data[: len(data) // 2])


def start_child(job: Callable[[], object]) -> int:
    """Run a job in another process, and return its process id. The exit code says how the job ended."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            job()
        except li.LoraError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            code = FAILED
        os._exit(code)
    return pid


def watch(pids: list[int], read: Callable[[], None]) -> list[int]:
    """Read again and again until the processes have ended; return their exit codes. A signal's number is negative."""
    while any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in pids):
        read()
        time.sleep(0.005)  # the processes need the processor, too
    read()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert FAILED not in codes, "an error that is no LoraError"
    return codes


def moments(job: Callable[[], object], count: int) -> list[Moment]:
    """Return up to `count` moments, spread evenly over what a job changes on disk."""
    read_end, write_end = os.pipe()
    write = os.write

    def counted() -> None:
        break_calls("none", Moment(sys.maxsize, ""), lambda name: write(write_end, f"{name}\n".encode()) and None)
        job()

    pid = start_child(counted)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        names = pipe.read().split()
    assert watch([pid], lambda: None) == [0]
    stages = {name: ("before", "half", "after") if name in WRITES else ("before", "after") for name in names}
    every = [Moment(i, stage) for i, name in enumerate(names) for stage in stages[name]]
    count = min(count, len(every))
    return [every[i * (len(every) - 1) // max(count - 1, 1)] for i in range(count)]


class MergeCheckpoint:
    """merge_checkpoint: what it begins with, what it may leave, and the next call, which finishes it.

    `kept` has copies of what the verbs begin and end with; `work`, beside it, is where they run.
    """

    def __init__(self, kept: Path) -> None:
        self.kept, self.work = kept, kept.parent / "work"
        self.base, self.out, self.adapter = self.work / "base", self.work / "out", kept / "adapter0"
        self.before, self.merged = contents(kept / "base"), contents(kept / "merged")
        self.tensors = tensors(kept / "base"), tensors(kept / "merged")
        self.overtaken = 0

    def prepare(self) -> None:
        """Bring the disk into the state in which the verb begins."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.kept / "base", self.base)

    def call(self) -> object:
        """Do what the verb does."""
        return li.merge_checkpoint(self.base, self.adapter, self.out)

    def read(self) -> None:
        """Check that a reader finds all of the old bytes or all of the new ones."""
        assert same(tensors(self.base), self.tensors[0])
        if self.out.exists():
            assert same(tensors(self.out), self.tensors[1])

    def check(self, codes: list[int]) -> str:
        """Check what is left, and that the next call restores or finishes it; return a word for what was left."""
        assert contents(self.base) == self.before
        done = self.out.exists()
        if not done:
            assert 0 not in codes
            assert min(codes) < 0 or sorted(p.name for p in self.work.iterdir()) == ["base"]
            self.call()
        assert contents(self.out) == self.merged
        temporary = self.work / UNFINISHED.format(self.out.name)
        assert sorted({p.name for p in self.work.iterdir()} - {temporary.name}) == ["base", "out"]
        if temporary.exists():  # the fault struck when the copy was complete
            assert done
            assert contents(temporary) in ({}, {MARK: b""})
        return "after" if done else "before"


class MergeInPlace(MergeCheckpoint):
    """merge_in_place, after which unmerge_in_place restores everything."""

    ends: str = "after"

    def call(self) -> object:
        return li.merge_in_place(self.base, self.adapter)

    def read(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # without an index a reader finds no shards
            changed = (self.base / INDEX).stat().st_ctime_ns
            present = tensors(self.base)
            if not any(same(present, expected) for expected in self.tensors):
                # A reader that has read the index before the merge may find shards of both.
                assert (self.base / INDEX).stat().st_ctime_ns != changed, "a reader found a mixture"
                self.overtaken += 1

    def check(self, codes: list[int]) -> str:
        left = {name: data for name, data in contents(self.base).items() if not name.startswith(".")}
        merged = {name: data for name, data in self.merged.items() if name != ORIGIN}  # which is in the manifest here
        state = "before" if left == self.before else "after" if left == merged else "index hidden"
        assert state != "index hidden" or INDEX not in left, "a reader would load a mixture"
        assert 0 not in codes or state == self.ends
        if (self.base / FOLDER / MANIFEST).exists():
            with contextlib.suppress(li.StateError):
                li.merge_in_place(self.base, self.adapter)
                raise AssertionError("merged twice")
        else:  # the fault struck so early or so late that the checkpoint is the old one
            assert state == "before"
            li.merge_in_place(self.base, self.adapter)
        li.unmerge_in_place(self.base)
        assert contents(self.base) == self.before
        return state


class UnmergeInPlace(MergeInPlace):
    """unmerge_in_place, which may be called again."""

    ends = "before"

    def prepare(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.kept / "merged in place", self.base)

    def call(self) -> object:
        return li.unmerge_in_place(self.base)


class Save(MergeCheckpoint):
    """A save of an adapter over another one."""

    format = "lorainject"

    def __init__(self, kept: Path) -> None:
        super().__init__(kept)
        self.records, self.states = [li.read(kept / f"adapter{i}") for i in (1, 0)], {}
        for record, state in zip(self.records, ("before", "after"), strict=True):
            self.put(record)
            self.states[self.values()] = state
        assert len(self.states) == 2

    def put(self, record: li.AdapterFile) -> object:
        return li.write(record, self.out, format=self.format, lossy=True)

    def values(self) -> tuple[object, ...]:
        """Return the values of all sites, as a reader finds them."""
        sites = sorted(li.read(self.out).sites, key=lambda site: site.name)
        return tuple((s.name, s.scale, *(t.float().numpy().tobytes() for t in (s.A, s.B))) for s in sites)

    def prepare(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.put(self.records[0])
        self.before = contents(self.out)

    def call(self) -> object:
        return self.put(self.records[1])

    def read(self) -> None:
        assert self.values() in self.states, "a reader found a mixture"

    def check(self, codes: list[int]) -> str:
        state = self.states[self.values()]
        assert 0 not in codes or state == "after"
        assert min(codes) < 0 or state == "after" or contents(self.out) == self.before
        self.call()
        assert self.states[self.values()] == "after"
        assert contents(self.out).keys() == self.before.keys(), "a file is left over"
        return state


class SavePeft(Save):
    """A save in PEFT's format."""

    format = "peft"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint, as a reader that follows the index finds them."""
    names = json.loads((folder / INDEX).read_bytes())["weight_map"]
    return {key: t for name in sorted(set(names.values())) for key, t in load_file(folder / name).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """True if both have the same names and values."""
    return a.keys() == b.keys() and all(map(torch.equal, a.values(), (b[key] for key in a)))


VERBS = {"merge_checkpoint": MergeCheckpoint, "merge_in_place": MergeInPlace, "unmerge_in_place": UnmergeInPlace,
         "save": Save, "save as peft": SavePeft}  # fmt: skip


def keep(folder: Path, kept: Path) -> None:
    """Copy base and adapters to `kept`, and make what the verbs end with."""
    for name in ("base", "adapter0", "adapter1"):
        shutil.copytree(folder / name, kept / name)
    li.merge_checkpoint(kept / "base", kept / "adapter0", kept / "merged")
    shutil.copytree(kept / "base", kept / "merged in place")
    li.merge_in_place(kept / "merged in place", kept / "adapter0")
    for name, data in contents(kept / "merged").items():
        if name == "lorainject_merge.json":
            continue  # in place, the manifest of the merge says this
        assert (kept / "merged in place" / name).read_bytes() == data, "the two merges differ; take another rank"


def run(verb: MergeCheckpoint, fault: str, count: int) -> Iterator[str]:
    """Break a verb `count` times, or at all moments if it has fewer; yield what was left each time."""
    verb.prepare()
    struck = moments(verb.call, count) if fault in SPREAD else [Moment(0, "before")] * (count if "two" in fault else 1)
    for moment in struck:
        verb.prepare()

        def job(moment: Moment = moment) -> None:
            if fault != "two at once":
                break_calls(fault, moment)
            verb.call()

        codes = watch([start_child(job) for _ in range(1 + (fault == "two at once"))], verb.read)
        if fault == "read-only":
            assert codes == [REFUSED]
        try:
            yield verb.check(codes)
        except Exception as e:
            e.add_note(f"{fault}, {moment}, exit codes {codes}")
            raise


def main() -> None:
    """Break every verb in every way, and print a table of what was left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=100, help="for each verb and fault")
    parser.add_argument("--only", nargs="*", choices=VERBS, default=list(VERBS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        keep(args.folder, kept := Path(scratch) / "kept")
        print("| verb | fault | moments | left as before | as after | index hidden | readers overtaken |")
        print("|---|---|---|---|---|---|---|")
        for name in args.only:
            verb = VERBS[name](kept)
            for fault in FAULTS:
                verb.overtaken = 0
                left = Counter(run(verb, fault, args.moments if fault in SPREAD else -(-args.moments // 10)))
                figures = left.total(), left["before"], left["after"], left["index hidden"], verb.overtaken
                print(f"| {name} | {fault} | {' | '.join(map(str, figures))} |", flush=True)


if __name__ == "__main__":
    main()

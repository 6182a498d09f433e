"""Bytes from file to file, and files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import FileError, system_errors
from .shards import Shard, identity

PIECE = 1 << 25  # bytes copied at a time, between two reports of progress
UNFINISHED = ".{}.lorainject-unfinished"
Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


class Meter:
    """Counts bytes, and tells of them now and then."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done, self.told = total, progress, 0, -1

    def add(self, n: int) -> None:
        """So many more."""
        self.done += n
        if self.progress is not None and (self.done - self.told >= PIECE or self.done == self.total):
            self.told = self.done
            self.progress(self.done, self.total)


def copy(source: int, target: int, start: int, stop: int, meter: Meter) -> None:
    """Bytes from file to file, within the kernel where it can (and by reference where the file system can)."""
    while start < stop:
        n = min(PIECE, stop - start)
        try:
            n = os.copy_file_range(source, target, n, start, start)
        except (OSError, AttributeError) as e:
            if isinstance(e, OSError) and e.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            n = os.pwrite(target, os.pread(source, n, start), start)
        if n == 0:
            raise OSError(errno.EIO, "a file became shorter while it was copied")
        hasten(target, start, n)
        start += n
        meter.add(n)


def hasten(fd: int, start: int, n: int) -> None:
    """Begin to write these bytes to disk, that fsync finds little left to wait for. (What is on disk already may leave the page cache.)"""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, n, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def opened(shard: Shard) -> Iterator[int]:
    """A shard to read from. Raises FileError if it is not, or no longer at the end, the file that was looked at."""

    def check() -> None:
        if not identity(os.fstat(f.fileno())) == identity(shard.path.stat()) == shard.seen:
            raise FileError(
                f"{shard.path} was changed while it was being merged", way_out="merge again when nobody writes to it"
            )

    with shard.path.open("rb") as f:
        check()
        yield f.fileno()
        check()


@contextlib.contextmanager
def new(path: Path) -> Iterator[int]:
    """A file to write, on disk for good when this is done; gone if it fails."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield fd
        os.fsync(fd)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` when all is well, and else goes away; so does what a killed run has left."""
    folder = out.with_name(UNFINISHED.format(out.name))
    with system_errors(
        f"{out} can't be written", ["nothing is left of it"], "check the place, its permissions and the free space"
    ):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                for stale in folder.iterdir():
                    shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
                yield folder
                for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
                    sync(path)
                os.replace(folder, out)
                sync(out.parent)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """For this process alone, until it is done or dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileError(f"another process is at work in {folder}", way_out="wait for it to end") from None
        yield
    finally:
        os.close(fd)


def sync(folder: Path) -> None:
    """Renames in this folder are on disk for good."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

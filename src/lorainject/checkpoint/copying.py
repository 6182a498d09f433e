"""Copy bytes between files, within the kernel where it can, and report the progress.

copy_file_range copies by reference on file systems that can. Files and folders that appear all at once, or not at all,
are made by files/io/atomic_write.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

CHUNK = 1 << 25  # bytes copied per system call, and between two reports of progress
Progress = Callable[[int, int], None]
"""A function that is called with the bytes done and the bytes in total."""


class Meter:
    """Counts bytes, and reports them to `progress` after each CHUNK and at the end."""

    def __init__(self, total: int = 0, progress: Progress | None = None) -> None:
        self.total, self.progress, self.done, self.reported = total, progress, 0, -1

    def add(self, n: int) -> None:
        """Count n more bytes."""
        self.done += n
        if self.progress is not None and (self.done - self.reported >= CHUNK or self.done == self.total):
            self.reported = self.done
            self.progress(self.done, self.total)


def copy_bytes(source: int, target: int | None, start: int, stop: int, meter: Meter) -> None:
    """Copy bytes between file descriptors, to the same offsets. Without a target, do nothing."""
    while target is not None and start < stop:
        n = min(CHUNK, stop - start)
        try:
            n = os.copy_file_range(source, target, n, start, start)
        except (OSError, AttributeError) as e:  # not between these file systems, or not on this system
            if isinstance(e, OSError) and e.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            n = os.pwrite(target, os.pread(source, n, start), start)
        if n == 0:
            raise OSError(errno.EIO, "a file became shorter while it was copied")
        start_writeback(target, start, n)
        start += n
        meter.add(n)


def copy_mode(source: int, target: int) -> None:
    """Give a file the permissions of another one: a copy of a private file stays private."""
    if hasattr(os, "fchmod"):  # Windows has no such permissions
        os.fchmod(target, os.fstat(source).st_mode & 0o777)


def start_writeback(file: int, start: int, n: int) -> None:
    """Begin to write these bytes to disk, so that fsync has little left to wait for."""
    if hasattr(os, "posix_fadvise"):  # it starts to write dirty pages, and may drop the others from the page cache
        os.posix_fadvise(file, start, n, os.POSIX_FADV_DONTNEED)

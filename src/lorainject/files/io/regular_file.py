"""Open files that may come from strangers: regular files alone, of which no more is read than there is.

A pipe would let its reader wait forever, a device would never end, and a sparse file announces bytes that take no room
on the disk but all of them in memory.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from ...errors import FileError

MAX_SPARSE = 100  # times the bytes on the disk that a file may seem to have; file systems that compress reach less


def as_path(path: str | Path) -> Path:
    """Return a path. Raise FileError if the system cannot look it up: its name is too long, or holds a null byte."""
    path = Path(path)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as e:
        shown = ascii(str(path))[1:-1]
        shown = shown if len(shown) <= 120 else f"{shown[:60]}...{shown[-40:]}"
        reason = getattr(e, "strerror", None) or e
        raise FileError(f"{shown} cannot be looked up: {reason}", way_out="check the path and its permissions") from e
    return path


def is_plain_name(name: object) -> bool:
    """True if `name` names a file of a folder, and cannot lead out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. Raise FileError if it is a pipe, a device or a directory, and OSError as `open` does."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileError(f"{path} is not a regular file", way_out="give a file, not a pipe, a device or a directory")
    return os.fdopen(fd, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a file. Raise FileError if it has more than so many bytes, or is not a regular file."""
    with open_regular(path) as f:
        contents = f.read(most + 1)
    if len(contents) > most:
        raise FileError(f"{path} has more than {most:,} bytes", way_out="no file of this kind is that long: replace it")
    return contents


def require_dense(path: Path) -> None:
    """Raise FileError if almost all of a file's bytes are holes, which take no room on the disk."""
    status = path.stat()
    on_disk = getattr(status, "st_blocks", 0) * 512  # 0 where the file system does not say
    if on_disk and status.st_size > MAX_SPARSE * max(on_disk, 2**16):
        raise FileError(
            f"{path} is sparse: it seems to have {status.st_size:,} bytes, of which {on_disk:,} are on the disk",
            way_out="it is not whole, or an attack: copy or download it again",
        )
